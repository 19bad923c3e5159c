"""MCAP with JSON, which Foxglove shows without a decoder.

| topic | a message is | its time |
|---|---|---|
| `trap` | a `FullTrapRecord`, as in JSON lines | when the trap was taken |
| `session` | a `Session` | of the first trap |
| `note` | a `Note` | of the trap before |

Of JSON Schema, Foxglove knows objects, arrays and plain types, and no choice between two: so a
field that may be null has the schema of what it is otherwise.
"""

from typing import Any, BinaryIO

import msgspec
from mcap.writer import CompressionType, Writer

from vmibridge.recording.export.exporter import OneFileExporter
from vmibridge.recording.export.jsonl import FullTrapRecord, trap_record
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.traps import RecordedTrap

_KINDS = {"trap": FullTrapRecord, "session": Session, "note": Note}
_MAX_EARLY = 1000
"""Messages before the first trap that are held; further ones get the time 0."""


class Foxglove(OneFileExporter):
    """Writes one file."""

    suffix = ".foxglove.mcap"

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._encode = msgspec.json.Encoder().encode
        self._writer = Writer(file, compression=CompressionType.ZSTD)
        self._writer.start(profile="", library="vmibridge export")
        self._channels: dict[str, int] = {}
        for topic, kind in _KINDS.items():
            schema = self._encode(_schema(msgspec.inspect.type_info(kind)))
            number = self._writer.register_schema(f"vmibridge.{topic}", "jsonschema", schema)
            self._channels[topic] = self._writer.register_channel(topic, "json", number)
        self._early: list[Session | Note] = []
        self._time = 0

    def hear(self, message: Session | Note) -> None:
        if not self._time and len(self._early) < _MAX_EARLY:
            self._early.append(message)
        else:
            self._write_other(message)

    def add(self, trap: RecordedTrap, start: int) -> None:
        self._time = trap.time
        self._write_early()
        self._write("trap", trap_record(trap, start, full=True))

    def finish(self) -> None:
        self._write_early()
        self._writer.finish()  # type: ignore[no-untyped-call]
        self._file.flush()

    def _write_early(self) -> None:
        for message in self._early:
            self._write_other(message)
        self._early.clear()

    def _write_other(self, message: Session | Note) -> None:
        self._write("session" if isinstance(message, Session) else "note", message)

    def _write(self, topic: str, message: msgspec.Struct) -> None:
        data = self._encode(message)
        self._writer.add_message(self._channels[topic], self._time, data, self._time)


def _schema(info: msgspec.inspect.Type) -> dict[str, Any]:
    """The JSON Schema of a type, in the words that Foxglove knows."""
    match info:
        case msgspec.inspect.Metadata(type=inner):
            return _schema(inner)
        case msgspec.inspect.UnionType(types):
            return _schema(
                next(each for each in types if type(each) is not msgspec.inspect.NoneType)
            )
        case msgspec.inspect.StructType(fields=fields):
            properties = {each.encode_name: _schema(each.type) for each in fields}
            return {"type": "object", "properties": properties}
        case msgspec.inspect.DictType():
            return {"type": "object", "properties": {}}
        case (
            msgspec.inspect.ListType(item_type=item) | msgspec.inspect.VarTupleType(item_type=item)
        ):
            return {"type": "array", "items": _schema(item)}
        case msgspec.inspect.TupleType(item_types=items):
            return {"type": "array", "items": _schema(items[0])}
        case msgspec.inspect.IntType():
            return {"type": "integer"}
        case msgspec.inspect.FloatType():
            return {"type": "number"}
        case msgspec.inspect.BoolType():
            return {"type": "boolean"}
        case _:
            return {"type": "string"}


EXPORTER = Foxglove
