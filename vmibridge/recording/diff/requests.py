"""A recording request by request, each as the fields that two recordings may differ in.

| field | is |
|---|---|
| `request` | what was asked: instruction, magic, request, method, value1 to value4 |
| `registers` | all registers of the trap, where the instruction stands, and the ring |
| `outcome`, `handler`, `error` | as recorded; addresses of objects in an error count for nothing |
| `rip` | where the guest went on, from where it had been |
| `value1` to `value4` | what was written to the guest |
| `output` | as a value of JSON, or as text without addresses of objects |
| `read`, `write` | accesses to guest memory, in their order |

Times are in none of them.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Final

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.edit.changes import OF_OUTPUT, Changes
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import MemoryAccess, Reply
from vmibridge.recording.selection import SelectedTraps, Selection
from vmibridge.recording.traps import NO_REPLY, VALUE_NAMES, RecordedTrap, outcome_word
from vmibridge.recording.vm_names import VmNames
from vmibridge.text import counted
from vmibridge.vm.trap import TrapEvent

__all__ = ["FIELDS", "Request", "fields_of", "requests_of"]

FIELDS: Final = (
    "request", "registers", "outcome", "handler", "rip", *VALUE_NAMES, "error", "output", "read",
    "write",
)  # fmt: skip
_MAX_WAITING = 4096
"""Requests told to wait that are remembered."""
_MAX_ACCESSES = 8
"""Of a request that are shown."""
_MAX_NAME = 100
"""Characters of a handler's name."""
_MAX_SHOWN = 32
"""Bytes of an access that are shown."""
_ABOUT = ("ip", "length", "ring", "flags_known")
"""What is compared of a trap beside its registers."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MASK = (1 << 64) - 1
_encode = msgspec.msgpack.Encoder().encode


class _Accesses(msgspec.Struct):
    """Those of a request in one direction."""

    count: int = 0
    left_out: bool = False
    """Whether the bytes of one are not in the recording."""
    places: bytes = b""
    """A digest of addresses, sizes and errors."""
    data: bytes = b""
    """A digest of the bytes."""
    shown: list[str] = []

    def add(self, access: MemoryAccess) -> None:
        self.count += 1
        self.places = _digest(self.places + _encode((access.address, access.size, access.error)))
        if access.data is None:
            self.left_out = self.left_out or access.error is None
        else:
            self.data = _digest(self.data + _digest(access.data))
        if len(self.shown) < _MAX_ACCESSES:
            self.shown.append(_shown(access))

    def __str__(self) -> str:
        more = self.count - len(self.shown)
        return "; ".join([*self.shown, *([f"{more} more"] if more else [])]) or "none"


class Request(msgspec.Struct):
    """One request, from its first trap to its last reply."""

    event: TrapEvent
    """Its first trap."""
    trap: RecordedTrap
    """Its last one."""
    read: _Accesses
    write: _Accesses
    is_partial: bool = False
    """Whether something was left out of it, so that not all of it is compared."""

    @property
    def where(self) -> str:
        """Who was asked for what, in words."""
        packet, reply = self.trap.packet, self.trap.reply
        if packet is None:
            return self.event.reason.value
        handler = None if reply is None else reply.handler
        name = f"{packet.magic:08x}" if handler is None else handler[:_MAX_NAME]
        return f"{name} {packet.request:#06x}/{packet.method:#06x}"


def requests_of(
    messages: Iterable[TimedMessage], selection: Selection, changes: Changes
) -> Iterator[Request]:
    """The requests that are selected, in the order of their last replies; those without one, and
    those that were told to wait and never came back, at the end. `changes` are made first."""
    waiting: OrderedDict[tuple[str, int], Request] = OrderedDict()
    names = VmNames()
    traps = SelectedTraps(messages, selection, lambda _: None)
    for trap in traps:
        request = _begun(trap, changes)
        reply = trap.reply
        first = trap.event.seq
        if reply is not None and reply.retry_of is not None:
            first = reply.retry_of
        before = waiting.pop((trap.event.vm, first), None)
        if before is not None:
            before.trap = trap
            request = before
        _add_accesses(request, trap)
        if reply is not None and reply.kind is OutcomeKind.WAITING:
            vm = names.once(trap.event.vm)
            _shorten(request, trap, reply, vm)
            waiting[vm, first] = request
            if len(waiting) > _MAX_WAITING:
                yield waiting.popitem(last=False)[1]
            continue
        yield request
    yield from waiting.values()


def _shorten(request: Request, trap: RecordedTrap, reply: Reply, vm: str) -> None:
    """What is held for a request that waits has a bound, whatever a file says."""
    trap.event = msgspec.structs.replace(trap.event, vm=vm)
    request.event = msgspec.structs.replace(request.event, vm=vm)
    handler = None if reply.handler is None else reply.handler[:_MAX_NAME]
    trap.reply = msgspec.structs.replace(reply, vm=vm, handler=handler, output=None, error=None)
    trap.notes = []


def _begun(trap: RecordedTrap, changes: Changes) -> Request:
    """A request of one trap so far, which is changed."""
    left_out = changes.left_out_of(trap.event) if changes.redacts else frozenset[str]()
    if changes.redacts or changes.renames:
        event = changes.of(TimedMessage(0, trap.event), left_out).message
        assert isinstance(event, TrapEvent)
        trap.event = event
        if trap.reply is not None:
            reply = changes.of(TimedMessage(0, trap.reply), left_out).message
            assert isinstance(reply, Reply)
            trap.reply = reply
        if trap.packet is not None:
            trap.packet = changes.packet(trap.packet, left_out)
        if "memory" in left_out:
            trap.accesses = [msgspec.structs.replace(each, data=None) for each in trap.accesses]
    return Request(trap.event, trap, _Accesses(), _Accesses(), bool(left_out - {"memory"}))


def _add_accesses(request: Request, trap: RecordedTrap) -> None:
    for access in trap.accesses:
        (request.write if access.write else request.read).add(access)
    if trap.left_out:
        request.is_partial = True
    trap.accesses = []


def fields_of(request: Request) -> Mapping[str, object]:
    """What is compared, by field; of `read` and `write` without the bytes."""
    event, packet, reply = request.event, request.trap.packet, request.trap.reply
    asked: object = None
    if packet is not None:
        asked = (packet.magic, packet.request, packet.method, *packet.values)
    fields: dict[str, object] = {
        "request": (event.reason.value, event.width, asked),
        "registers": (
            *(getattr(event, name) for name in _ABOUT),
            msgspec.to_builtins(event.registers),
        ),
        "outcome": outcome_word(request.trap),
        "read": (request.read.count, request.read.places),
        "write": (request.write.count, request.write.places),
    }
    if reply is None:
        return fields
    fields["handler"] = reply.handler
    fields["error"] = None if reply.error is None else _ADDRESS.sub("", reply.error)
    if reply.output is not None:
        more = [getattr(reply, name) for name in OF_OUTPUT if name != "output"]
        fields["output"] = (_value(reply.output), *more) if any(more) else _value(reply.output)
    if reply.writes is not None:
        fields["rip"] = reply.writes.rip - request.trap.event.ip & _MASK
        fields.update(zip(VALUE_NAMES, reply.writes.values, strict=True))
    return fields


def is_answered(request: Request) -> bool:
    """Whether it has a reply that can be compared."""
    return outcome_word(request.trap) != NO_REPLY


def shown_field(request: Request, field: str) -> str:
    """A field for people."""
    if field in ("read", "write"):
        return str(request.write if field == "write" else request.read)
    value = fields_of(request).get(field)
    packet = request.trap.packet
    if field == "request" and packet is not None:
        values = " ".join(f"{each:x}" for each in packet.values)
        return (
            f"{request.event.reason.value}{request.event.width}"
            f" {packet.magic:08x}/{packet.request:04x}/{packet.method:04x} {values}"
        )
    if field == "registers":
        registers = msgspec.to_builtins(request.event.registers)
        about = {name: getattr(request.event, name) for name in _ABOUT}
        named = {**{name.replace("_", "-"): int(each) for name, each in about.items()}, **registers}
        return " ".join(f"{name}={each:#x}" for name, each in named.items())
    if isinstance(value, int):
        return f"{value:#x}"
    if value is None and field in ("rip", *VALUE_NAMES):
        return "left alone"
    return "none" if value is None else str(value)


def _value(output: str) -> str:
    """An output, so that two are equal which mean the same."""
    try:
        return msgspec.json.encode(msgspec.json.decode(output), order="deterministic").decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _ADDRESS.sub("", output)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _shown(access: MemoryAccess) -> str:
    if access.error is not None:
        what = f"failed: {access.error[:80]}"
    elif access.data is None:
        what = "left out"
    else:
        what = access.data[:_MAX_SHOWN].hex() + ("..." if len(access.data) > _MAX_SHOWN else "")
    return f"{counted(access.size, 'byte')} at {access.address & _MASK:#x}: {what}"
