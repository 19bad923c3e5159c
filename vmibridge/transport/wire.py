"""The frames between an agent and a server; docs/remote.md has them byte by byte.

- A frame is four bytes, the size of its body (little-endian), and the body: one MessagePack
  array, whose first element says which frame it is.
- The size is checked before anything is kept for the body. What may be sent depends on the
  direction: each end has a decoder of its own.
- An element that this version does not know, at the end of an array, is skipped. The first
  six elements of HELLO, and REFUSED, stay as they are in every version.
- Registers are bytes to a frame: how many, in which order and of which size is said by the
  architecture that HELLO names (`TrapLayout`).

Plain functions and a small state machine over bytes: no I/O.
"""

import struct
from collections.abc import Callable
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec.structs import astuple

from vmibridge.bridge.contract import GuestRead
from vmibridge.errors import WireError
from vmibridge.text import fault_of
from vmibridge.vm.arch import ARCHITECTURES
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.memory import MAX_ACCESS
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter, TrapReason

HELLO_LIMIT: Final = 64 << 10
"""Bytes of a frame, before the server has said WELCOME."""
FRAME_LIMIT: Final = 1 << 20
"""Bytes of a frame after that, without the guest memory in it."""
MEMORY_LIMIT: Final = FRAME_LIMIT + MAX_ACCESS
SMALL_ACCESS: Final = 64 << 10
"""Bytes; of accesses beyond that few may be under way."""
MAX_ACCESSES: Final = 256
MAX_LARGE_ACCESSES: Final = 2
MAX_PREFETCHED_PER_TRAP: Final = 128 << 10
"""Bytes of memory that may travel with a trap."""
NO_DEADLINE: Final = 0xFFFF_FFFF
"""Milliseconds."""

_SIZE = struct.Struct("<I")
_REASONS = (
    TrapReason.CPUID,
    TrapReason.VMCALL,
    TrapReason.VMMCALL,
    TrapReason.PORT_IO,
    TrapReason.MSR,
    TrapReason.BREAKPOINT,
    TrapReason.DEVICE,
)
_REASON_OF = dict(enumerate(_REASONS, 1))
_CODES = {reason: code for code, reason in _REASON_OF.items()}
_NO_SIZE = bytes(4)
_pack_size, _unpack_size = _SIZE.pack_into, _SIZE.unpack_from
_encode_into = msgspec.msgpack.Encoder().encode_into

_U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
_U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
# MessagePack has no larger integers than 64 bits.
_U64 = Annotated[int, msgspec.Meta(ge=0)]
_Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=1000)]
_Pieces = Annotated[tuple[tuple[_U64, bytes], ...], msgspec.Meta(max_length=256)]
_MAX_REGISTERS = max(each.size for each in ARCHITECTURES)
"""Bytes."""


# --- frames of the agent ------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=1):
    """Who the agent is; the first frame of a connection."""

    word: Annotated[str, msgspec.Meta(max_length=16)]
    version: _U16
    """The newest one that the agent speaks."""
    oldest: _U16
    session: _Id
    """Random; one run of one VM."""
    vm: _Name
    features: _U32 = 0
    """None are defined yet."""
    other_hypercalls: bool = False
    """As that of the backend."""
    architecture: _Name = "x86"
    """Of the guest; agents of 0.2.0 have x86 only, and do not say so."""
    architecture_version: _U16 = 1
    """How its registers are sent."""


class Trap(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=2):
    """A vCPU stands still and waits for its ANSWER."""

    seq: _U64
    left: _U32
    """Milliseconds that the agent still waits for the answer."""
    elsewhere: bool
    """It was sent before, to another incarnation, and may have run there."""
    reason: _U8
    vcpu: _U16
    ip: _U64
    length: _U8
    width: _U8
    ring: _U8
    registers: Annotated[bytes, msgspec.Meta(max_length=_MAX_REGISTERS)]
    """As the architecture of HELLO has them."""
    memory: _Pieces = ()
    """Physical memory that its handler is known to read: address and bytes."""
    flags_known: bool = True
    """As in `TrapEvent`."""


class Memory(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=3):
    """The reply to READ or WRITE."""

    access: _U64
    data: bytes = b""
    error: _Text | None = None


class Ping(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=4):
    """Is the server there? Sent by the agent only."""


class WireEnd(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """How one vCPU ended."""

    vcpu: _U16
    reason: Annotated[str, msgspec.Meta(max_length=16)]
    detail: _Text = ""
    registers: Annotated[dict[_Name, _U64], msgspec.Meta(max_length=64)] = {}


class End(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=5):
    """The guest has ended: no trap will come any more."""

    vcpus: Annotated[tuple[WireEnd, ...], msgspec.Meta(max_length=0xFFFF)] = ()


class Cancel(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=6):
    """Nobody waits for the answer to this trap any more."""

    seq: _U64


# --- frames of the server -----------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=16):
    """What the agent is to do."""

    version: _U16
    incarnation: _Id
    """Random; which incarnation of the server serves the agent from here on. One life of a
    server process has one of each session: what it remembers of a VM ends with it."""
    features: _U32
    magics: Annotated[tuple[_U32, ...], msgspec.Meta(max_length=4096)]
    any_hypercall: bool
    any_cpuid: bool
    timeout: _U32
    """Milliseconds: the highest hard deadline of any handler."""
    fallback: tuple[_U64 | None, _U64 | None, _U64 | None, _U64 | None]
    """What the guest gets when no answer has come in time."""
    vcpus: _U16
    reads: Annotated[tuple["WireRead", ...], msgspec.Meta(max_length=4096)] = ()
    architecture: _Name = "x86"
    """That of HELLO, as the server takes it; one of 0.2.0 takes any guest for x86."""
    architecture_version: _U16 = 1


class WireRead(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Memory that the handler of a request reads."""

    magic: _U32 | None
    request: _U16
    method: _U16 | None
    read: tuple[_U8, _U32, _U8]
    """As `GuestRead`: the value with the address, bytes at the most, the value with the size."""


class Refused(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=17):
    """The server does not want this agent, and hangs up."""

    why: _Text
    final: bool = True
    """Trying again is of no use."""


class Answer(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=18):
    """Write registers and go on. The names are those of `RegisterWrites`, on every architecture."""

    seq: _U64
    rip: _U64
    rax: _U64 | None = None
    rbx: _U64 | None = None
    rcx: _U64 | None = None
    rdx: _U64 | None = None


class Native(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=19):
    """Run the instruction as if it had not been trapped."""

    seq: _U64


class Returned(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=20):
    """The server stops, and has asked no handler: the trap is as if it had not been sent."""

    seq: _U64


class Read(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=21):
    """Send physical memory, while trap `seq` waits."""

    access: _U64
    seq: _U64
    address: _U64
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_ACCESS)]


class Write(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=22):
    """Write physical memory, while trap `seq` waits."""

    access: _U64
    seq: _U64
    address: _U64
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_ACCESS)]


class Pong(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=23):
    """The reply to PING."""


class Ended(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=24):
    """The reply to END: the VM is forgotten."""


FromAgent: TypeAlias = Hello | Trap | Memory | Ping | End | Cancel
FromServer: TypeAlias = Welcome | Refused | Answer | Native | Returned | Read | Write | Pong | Ended
Frame: TypeAlias = FromAgent | FromServer

FROM_AGENT: Final = msgspec.msgpack.Decoder(FromAgent)
FROM_SERVER: Final = msgspec.msgpack.Decoder(FromServer)

F = TypeVar("F")


def encode_into(buffer: bytearray, frame: Frame) -> None:
    """Append a frame."""
    at = len(buffer)
    buffer += _NO_SIZE
    _encode_into(frame, buffer, at + 4)
    _pack_size(buffer, at, len(buffer) - at - 4)


def encode(frame: Frame) -> bytes:
    """One frame, with its size."""
    buffer = bytearray()
    encode_into(buffer, frame)
    return bytes(buffer)


class FrameReader(Generic[F]):
    """Takes frames out of a stream of bytes. Keeps less than `limit` bytes and what is fed."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[F]", limit: int = HELLO_LIMIT) -> None:
        self.limit = limit
        """Bytes of the body of a frame; may change at any time."""
        self._decode = decoder.decode
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[F]:
        """The frames that end in `data`. Raises `WireError`; then the stream is of no use."""
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < 4 or len(partial) < 4 + self._checked(_unpack_size(partial)[0]):
                return []
            data = bytes(partial)
            partial.clear()
        frames: list[F] = []
        decode, limit = self._decode, self.limit
        at, last = 0, len(data) - 4
        try:
            while at <= last:
                size = _unpack_size(data, at)[0]
                if size > limit:
                    self._checked(size)
                end = at + 4 + size
                if end > last + 4:
                    break
                frames.append(decode(data[at + 4 : end]))
                at = end
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"a frame that is none: {fault_of(error)}") from error
        if at < len(data):
            partial += data[at:]
        return frames

    def _checked(self, size: int) -> int:
        if size > self.limit:
            raise WireError(f"a frame of {size} bytes, where {self.limit} are the most")
        return size


# --- between frames and what the engine knows ---------------------------------------


class TrapLayout(NamedTuple):
    """How the traps of one architecture travel."""

    pack: Callable[..., bytes]
    unpack: Callable[[bytes], tuple[int, ...]]
    registers: Callable[..., Any]
    """Makes registers of what `unpack` gives."""
    widths: frozenset[int]
    highest_ring: int
    longest: int
    """Bytes of an instruction."""


def layout_of(architecture: Architecture[Any]) -> TrapLayout:
    """The layout that a description makes."""
    registers = struct.Struct(f"<{architecture.layout}")
    return TrapLayout(
        registers.pack,
        registers.unpack,
        architecture.registers,
        architecture.widths,
        architecture.rings - 1,
        architecture.longest_instruction,
    )


_X86 = layout_of(X86)


def trap_frame(
    event: TrapEvent,
    left: int,
    elsewhere: bool = False,
    memory: _Pieces = (),
    layout: TrapLayout = _X86,
) -> Trap:
    """A trap to send. Raises `ValueError` for what no machine has."""
    try:
        registers = layout.pack(*astuple(event.registers))
    except struct.error as error:
        raise ValueError(f"trap {event.seq}: registers have 64 bits: {error}") from error
    return Trap(
        event.seq,
        left,
        elsewhere,
        _CODES[event.reason],
        event.vcpu,
        event.ip,
        event.length,
        event.width,
        event.ring,
        registers,
        memory,
        event.flags_known,
    )


def trap_event(frame: Trap, vm: str, layout: TrapLayout = _X86) -> TrapEvent:
    """The trap that came. Raises `WireError` for what no machine has."""
    reason = _REASON_OF.get(frame.reason)
    if (
        reason is None
        or frame.width not in layout.widths
        or frame.ring > layout.highest_ring
        or frame.length > layout.longest
        or not frame.seq
    ):
        raise WireError(f"a trap that no machine has: {frame.reason=} {frame.width=}")
    try:
        values = layout.unpack(frame.registers)
    except struct.error as error:
        raise WireError(f"registers of {len(frame.registers)} bytes: {error}") from error
    return TrapEvent(
        frame.seq,
        reason,
        layout.registers(*values),
        vm,
        frame.vcpu,
        frame.ip,
        frame.length,
        frame.width,
        frame.ring,
        frame.flags_known,
    )


def answer_frame(seq: int, writes: RegisterWrites | None) -> Answer | Native:
    """What a trap is answered."""
    if writes is None:
        return Native(seq)
    return Answer(seq, writes.rip, writes.rax, writes.rbx, writes.rcx, writes.rdx)


def register_writes(frame: Answer) -> RegisterWrites:
    """What is to be written."""
    return RegisterWrites(frame.rip, frame.rax, frame.rbx, frame.rcx, frame.rdx)


def trap_filter(frame: Welcome) -> TrapFilter:
    """Which traps the server wants."""
    return TrapFilter(frozenset(frame.magics), frame.any_hypercall, frame.any_cpuid)


def milliseconds(seconds: float) -> int:
    """Rounded down, within 32 bits."""
    return max(0, int(min(seconds * 1000, NO_DEADLINE)))


def wire_read(magic: int | None, request: int, read: GuestRead) -> WireRead:
    """What a handler declares, to be sent."""
    return WireRead(magic, request, read.method, (read.address, read.size, read.size_in or 0))


def guest_read(frame: WireRead) -> GuestRead:
    """What came. Raises `WireError` if a frame is malformed."""
    address, size, size_in = frame.read
    try:
        return GuestRead(address, size, size_in=size_in or None, method=frame.method)
    except ValueError as error:
        raise WireError(str(error)) from error
