"""What a recording holds: one struct for each kind of message.

| channel | a message is | written |
|---|---|---|
| `session` | a `Session` | for each VM, before its guest runs, and in each further file |
| `trap` | a `TrapEvent` | when the trap was taken |
| `memory` | a `MemoryAccess` | when it was done, or had failed |
| `reply` | a `Reply` | when the answer was written to the guest |
| `step` | a `Step` | when a handler was queued, began after that, went on or ended |
| `outside` | an `Outside` | when `vmi.outside` had come to something |
| `note` | a `Note` | behind a trap that is a retry, or of the file before; at the end of each VM |
| `plain` | `PlainTraps` | when the last of them was answered, or later |

The order in the file is that of the event loop. A trap has one reply; what lies between
the two and names the trap belongs to it. Most have nothing in between: those are *plain*, and
stand together, each with its reply. The reader takes them apart, so whoever gets messages from it
knows `trap` and `reply` only. Times are nanoseconds since the Unix epoch, taken
from the monotonic clock, so that they never go back. Payloads are MessagePack maps; each
channel has a JSON Schema.

Memory is recorded as it was accessed, by physical address, page tables included: a replay
walks them again.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.outputs import OutputText
from vmibridge.recording.redaction import RedactionRule
from vmibridge.vm.arch import architecture_named
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent

FORMAT = 1
"""The version of these structs; another one means other fields. That of 0.2.0."""
FORMAT_OF_OTHERS = 2
"""The same fields, and registers that are those of `Session.architecture`. In 0.2.1
that is any VM but those of x86 version 1: 0.2.0 would find registers that are all 0."""
FORMAT_WITH_STEPS = 3
"""The same with the channels `step` and `outside`, and `Session.seed` and `clock`: what is recorded
0.2.1."""
FORMAT_WITH_PLAIN = 4
"""The same with the channel `plain`: what is recorded today."""
FORMATS = (FORMAT, FORMAT_OF_OTHERS, FORMAT_WITH_STEPS, FORMAT_WITH_PLAIN)
MAX_PLAIN = 1024
"""Traps in one message of the channel `plain`."""


class RecordedMethod(msgspec.Struct, frozen=True):
    """One method of a handler."""

    code: int
    name: str


class RecordedHandler(msgspec.Struct, frozen=True, omit_defaults=True):
    """One handler of a bridge, as it was at recording time."""

    name: str
    type: str
    """Its class, with the module."""
    request: int
    magic: int | None = None
    verify_values: tuple[int | None, int | None, int | None, int | None] = (None,) * 4
    methods: tuple[RecordedMethod, ...] = ()
    source: str | None = None
    """The name of the file that its class stands in, without folders."""
    sha256: str | None = None
    """Of that file."""
    settings: str | None = None
    """What it was made with, as JSON; `None`: nothing, or it is not known, or was left out."""
    modules: dict[str, str] = {}
    """The modules of its project that it imports, with the SHA-256 of their files."""


class RecordedArchitecture(msgspec.Struct, frozen=True):
    """The architecture of a VM, as `vmibridge.vm.arch` knows it."""

    name: str
    version: int
    """Of its registers."""


class Session(msgspec.Struct, frozen=True, omit_defaults=True):
    """One VM, and what served it."""

    vm: str
    format: int = FORMAT
    started: str = ""
    """ISO 8601, UTC."""
    versions: dict[str, str] = {}
    """Of vmibridge, Python and the libraries that recorded."""
    loop: str = ""
    handlers: tuple[RecordedHandler, ...] = ()
    settings: ServerSettings = ServerSettings()
    redaction: tuple[RedactionRule, ...] = ()
    """What was left out."""
    architecture: RecordedArchitecture | None = None
    """That of the registers of its traps. `None`: x86 version 1, as in all recordings of 0.2.0."""
    seed: int | None = None
    """Of the random numbers that its handlers got."""
    clock: int = 0
    """Nanoseconds from the times of its messages to those that its handlers got."""
    part: int = 1
    """Which file this is of a recording that has several: each of them begins with the sessions."""
    accepted: bool = False
    """Whether answers are those of a replay, which were accepted: then the times of what handlers
    do are not those of the guest."""


class Step(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What the handler of a request does. Not recorded where it is plain: a handler begins with its
    trap, unless a step says that it was queued, and ends with the reply, unless it was suspended.
    """

    vm: str
    seq: int
    """Of the trap that the request came with."""
    kind: Literal["queued", "began", "resumed", "thrown", "ended", "parked", "cut off"]
    """`queued`: it lines up, for its turn, for a place, or as a task of its own; `resumed`: it goes
    on after it was suspended, other than for guest memory; `thrown`: it goes on with an exception,
    such as a cancellation; `parked`, `cut off`: its soft deadline has passed, or its hard one."""


class MemoryAccess(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One access to physical memory."""

    vm: str
    seq: int
    """Of the trap that it was made for."""
    address: int
    size: int
    """Bytes."""
    data: bytes | None = None
    """What was read or written; `None`: left out, or a read that failed."""
    write: bool = False
    error: str | None = None
    """Why it failed."""


class Outside(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What came of one call of `vmi.outside`. Without `data`, `error` and `left_out` it was cut
    off, by a cancellation."""

    vm: str
    seq: int
    """Of the trap that the request came with."""
    key: str
    number: int = 0
    """Which call of its request it was with that key, in the order of their beginnings, from 0."""
    data: bytes | None = None
    """Its value, as MessagePack."""
    error: str | None = None
    """What was raised, as text."""
    types: tuple[str, ...] = ()
    """The names of its class and of those that it derives from."""
    at_once: bool = False
    """Whether the handler did not have to wait for it."""
    left_out: bool = False
    """Whether value or failure was left out."""

    @property
    def is_cut_off(self) -> bool:
        """Whether it did not come to an end."""
        return self.data is None and self.error is None and not self.left_out

    def without_content(self) -> "Outside":
        """The same with value and failure left out."""
        if self.is_cut_off:
            return self
        return msgspec.structs.replace(self, data=None, error=None, types=(), left_out=True)


class Reply(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What became of one trap: its `Outcome`, without the trap itself."""

    vm: str
    seq: int
    vcpu: int
    kind: OutcomeKind
    packet: BridgePacket
    writes: RegisterWrites | None = None
    """What went back into the vCPU; `None`: the instruction ran natively, or nothing could."""
    handler: str | None = None
    error: str | None = None
    output: str | None = None
    """The typed output as JSON, or its `repr`, as `outputs` has it; cut after 4,096 characters."""
    duration: float = 0.0
    """Seconds from taking the trap to the written answer."""
    retry_of: int | None = None
    """Of a retry: the trap that the request came with first."""
    output_sha256: str | None = None
    """Of the whole text of an output that was cut. Recordings of 0.2.0 do not have it."""


class PlainTrap(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A trap and its reply, between which nothing was recorded. Fields are those of `Reply`.

    As MessagePack an array: a recorder has these as tuples, and makes no struct of them.
    """

    time: Annotated[int, msgspec.Meta(ge=0)]
    """When the trap was taken, in nanoseconds since the Unix epoch."""
    event: TrapEvent
    answered: Annotated[int, msgspec.Meta(ge=0)]
    """When the answer was written, in nanoseconds since the Unix epoch."""
    kind: OutcomeKind = OutcomeKind.HANDLED
    writes: RegisterWrites | None = None
    handler: str | None = None
    error: str | None = None
    output: str | None = None
    duration: float = 0.0
    output_sha256: str | None = None
    packet: BridgePacket | None = None
    """`None`: that of the registers of the trap."""

    def reply(self) -> Reply | None:
        """Its reply; `None`: the trap carries no request, which no recorder writes."""
        event = self.event
        packet = self.packet or request_in(event)
        if packet is None:
            return None
        return Reply(
            event.vm,
            event.seq,
            event.vcpu,
            self.kind,
            packet,
            self.writes,
            self.handler,
            self.error,
            self.output,
            self.duration,
            None,
            self.output_sha256,
        )


class PlainTraps(msgspec.Struct, frozen=True):
    """Traps that were answered one after the other, with nothing else in between."""

    traps: Annotated[list[PlainTrap], msgspec.Meta(max_length=MAX_PLAIN)]


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something to know about the recording."""

    kind: Literal["end", "retry", "lost"]
    """`end`: a VM has ended, and its recording is whole; `retry`: the trap before this one
    asks again for what was told to wait; `lost`: something is missing."""
    text: str
    vm: str | None = None
    seq: int | None = None
    """Of the retry; with `lost`, of the trap before this one, which the file before has, too."""
    retry_of: int | None = None
    """The trap that its request came with first."""
    counts: dict[str, int] = {}
    """At the end: how many traps came to each outcome, and how many ran natively."""


RecordedMessage: TypeAlias = Session | TrapEvent | MemoryAccess | Reply | Note | Step | Outside


class ChannelKind(NamedTuple):
    """One channel of a recording."""

    id: int
    """Its number in the files that we write."""
    topic: str
    kind: type[Any]


SESSION, TRAP, MEMORY, REPLY, NOTE, STEP, OUTSIDE = CHANNELS = (
    ChannelKind(1, "session", Session),
    ChannelKind(2, "trap", TrapEvent),
    ChannelKind(3, "memory", MemoryAccess),
    ChannelKind(4, "reply", Reply),
    ChannelKind(5, "note", Note),
    ChannelKind(6, "step", Step),
    ChannelKind(7, "outside", Outside),
)

"""Those of messages, as the reader gives them."""
PLAIN = ChannelKind(8, "plain", PlainTraps)
FILE_CHANNELS = (*CHANNELS, PLAIN)
"""Those of a file."""

CHANNEL_OF_TOPIC: Mapping[str, ChannelKind] = MappingProxyType(
    {channel.topic: channel for channel in FILE_CHANNELS}
)


def output_text(output: object) -> str | None:
    """A typed output as a recording has it; `None` for none."""
    return OutputText.of(output).text


_OF_0_2_0 = RecordedArchitecture("x86", 1)


def architecture_of(session: Session) -> Architecture[Any]:
    """The architecture of a recorded VM. Raises `UnknownArchitectureError`."""
    named = session.architecture or _OF_0_2_0
    return architecture_named(named.name, named.version)


@cache
def trap_type(architecture: Architecture[Any]) -> type[TrapEvent]:
    """The `TrapEvent` whose registers are those of an architecture, to be decoded."""
    if architecture.registers is Registers:
        return TrapEvent
    kind: type[Any] = msgspec.defstruct(
        "TrapEvent",
        [("registers", architecture.registers)],
        bases=(TrapEvent,),
        frozen=True,
        gc=False,
        omit_defaults=True,
    )
    return kind


@cache
def plain_type(architecture: Architecture[Any]) -> type[PlainTrap]:
    """The `PlainTrap` whose trap is one of an architecture, to be decoded."""
    kind: type[Any] = msgspec.defstruct(
        "PlainTrap",
        [("event", trap_type(architecture))],
        bases=(PlainTrap,),
        frozen=True,
        gc=False,
        array_like=True,
    )
    return kind


@cache
def json_schema(channel: ChannelKind) -> bytes:
    """The JSON Schema of a channel's messages, without what is for people to read."""
    return msgspec.json.encode(_shortened(msgspec.json.schema(channel.kind)))


def _shortened(schema: object) -> object:
    if isinstance(schema, list):
        return [_shortened(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _shortened(value)
        for key, value in schema.items()
        # As a name of a field it has a schema, which is no text.
        if not (key in {"title", "description"} and isinstance(value, str))
        # Those of what has fields stand in its own schema.
        and not (key == "default" and (value is None or isinstance(value, dict | list)))
    }
