"""A new recording of an old one: the recorded traps, with the new answers where they differ.

    accepted = Accepted()
    ...                                  # a replay whose verdict has it
    write_accepted(source, target, accepted)

What is not replayed is copied, with its times. Of a request that is asked, the steps of its handler
are those of now, in the order in which they were made (`journal`), and its reply is there where it
was given, at the latest in its recorded place. Of one that is accepted

- the final reply is the new one;
- memory accesses and calls of `vmi.outside` that are in the recording stay where they were, if they
  were made; the others are where they were made, or had come to something;
- nothing is left where it ran natively now: no recording has such traps.

Traps, and replies that told the guest to wait, are left as they were: they are what the guest did.
So what was accepted replays without a difference, and to accept it again changes nothing.
"""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from stat import S_IMODE

from vmibridge.recording.export import new_files
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import CHANNELS, RecordedMessage
from vmibridge.recording.replay.accept_messages import accepted_messages
from vmibridge.recording.replay.accepted import Accepted

__all__ = ["Accepted", "write_accepted"]

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""


def write_accepted(
    source: Path, target: Path, accepted: Accepted, *, replace: bool = False
) -> None:
    """Write the new recording. Blocking; one chunk in memory at a time.

    With `replace` it takes the place of a `target` that is there, such as `source`, and its mode,
    once it is whole. Raises `RecordingReadError` when `source` cannot be read, `ConfigError` when
    `target` is there already, `RecordingError` when it cannot be written. Then `target` is as it
    was.
    """
    with RecordingReader(source) as reader, new_files([target], replace=replace) as (path,):
        if replace and target.exists():
            path.chmod(S_IMODE(target.stat().st_mode))
        writer = RecordingWriter(path, f"vmibridge {version('vmibridge')}", overwrite=True)
        try:
            recorded = reader.messages()
            # Where nothing is new, nothing changes, whatever the order was in which it was made.
            _write(accepted_messages(recorded, accepted) if accepted.count else recorded, writer)
            writer.finish()
        except BaseException:
            writer.close()
            raise


def _write(messages: Iterable[tuple[int, RecordedMessage]], writer: RecordingWriter) -> None:
    chunk = ChunkBuilder()
    for time, message in messages:
        # The traps of an architecture have a type of their own.
        number = next(each.id for each in CHANNELS if isinstance(message, each.kind))
        if chunk.add(number, time, message) >= _CHUNK:
            writer.add(chunk.pack())
            chunk = ChunkBuilder()
    if len(chunk):
        writer.add(chunk.pack())
