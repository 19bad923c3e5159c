"""The protocol between the QEMU plugin and its host; docs/qemu-plugin.md has it byte by byte.

A frame is a type and a length, 32 bits each, and a body; all numbers are little-endian.

| from | frame | body |
|---|---|---|
| plugin | HELLO | who it is: `Hello` |
| host | WELCOME, REFUSED | which traps are ours; or why not, in text |
| plugin | TRAP | a trap; the vCPU stands still until ANSWER or NATIVE |
| host | ANSWER, NATIVE | the registers to write; or run the instruction |
| host | READ, WRITE | an access to physical memory, while the vCPU stands still |
| plugin | MEMORY | whether it failed, and what was read |

The registers of a trap are those of an architecture, which HELLO names, in its order: without the
instruction pointer, which has a field of its own, and with CS, which the host needs to find a ring.

Plain functions over bytes, and `FrameReader`, which puts frames together. What a peer sends
is checked; an error is a `ValueError`.
"""

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from vmibridge.errors import UnknownArchitectureError
from vmibridge.vm.arch import architecture_named
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter, TrapReason

PROTOCOL = 3
PROTOCOLS = (2, PROTOCOL)
"""Those of plugins that are served. In 2, that of 0.2.0, HELLO does not name the architecture."""
MAX_MAGICS = 64
MAX_VCPUS = 1024
"""Of one QEMU."""
MAX_HELLO = 4096
MAX_BODY = 512
"""Bytes of a frame's body, where it has no memory in it."""


class FrameType(IntEnum):
    """What a frame is."""

    HELLO = 1
    TRAP = 2
    MEMORY = 3
    WELCOME = 16
    REFUSED = 17
    ANSWER = 18
    NATIVE = 19
    READ = 20
    WRITE = 21


_REASONS = {1: TrapReason.CPUID, 2: TrapReason.VMCALL, 3: TrapReason.VMMCALL}
_ALL_KINDS = 1 << 1 | 1 << 2 | 1 << 3
_ANY_HYPERCALL, _ANY_CPUID = 1, 2
_FLAGS_UNKNOWN = 2

_FRAME = struct.Struct("<II")
_HELLO = struct.Struct("<IIQII16s12sI")
_HELLO_2 = struct.Struct("<IIQII16s")
_WELCOME = struct.Struct("<IIII")
_ANSWER = struct.Struct("<IIQII4Q")
_ACCESS = struct.Struct("<IIQII")

_NATIVE = _FRAME.pack(FrameType.NATIVE, 0)
# Asking an Enum for a member takes as long as a call before Python 3.12.
_ANSWER_TYPE = int(FrameType.ANSWER)


class TrapLayout(NamedTuple):
    """How the plugin sends the traps of one architecture."""

    names: tuple[str, ...]
    """The registers of a TRAP, as QEMU calls them."""
    struct: struct.Struct
    registers: Callable[..., Any]
    ip_at: int
    """Where the instruction pointer is among those of `registers`."""
    taken: int
    """How many registers `registers` takes."""
    widths: frozenset[int]
    highest_ring: int
    longest: int
    """Bytes of an instruction."""


def layout_of(
    architecture: Architecture[Any], others: tuple[str, ...], names: Mapping[str, str]
) -> TrapLayout:
    """The layout that a description makes, with `others` behind its registers; `names` has those
    that QEMU calls something else."""
    pointer = architecture.instruction_pointer
    sent = [names.get(name, name) for name in architecture.names if name != pointer]
    sent += others
    return TrapLayout(
        tuple(sent),
        struct.Struct(f"<QBBBBI{len(sent)}Q"),
        architecture.registers,
        architecture.names.index(pointer),
        len(architecture.names),
        architecture.widths,
        architecture.rings - 1,
        architecture.longest_instruction,
    )


_X86 = layout_of(X86, ("cs",), {X86.flags: "eflags"})
_TRAP = _X86.struct
REGISTER_NAMES = _X86.names


class Hello(NamedTuple):
    """What one vCPU of a QEMU says when it connects."""

    protocol: int
    api: int
    """The plugin API of that QEMU."""
    process: int
    """The same for all vCPUs of one QEMU, another for each QEMU."""
    vcpu: int
    vcpus: int
    """How many that QEMU begins with."""
    target: str
    registers: tuple[str, ...]
    """The names of the registers of a trap, in their order."""
    architecture: str = "x86"
    architecture_version: int = 1


class FrameReader:
    """Puts frames together out of pieces of any size.

    `most` is the longest body, in bytes, that may come now: who asked for memory raises it.
    """

    def __init__(self, most: int = MAX_HELLO) -> None:
        self.most = most
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """More bytes have come."""
        self._buffer += data

    def next(self) -> tuple[int, bytes] | None:
        """The next frame, its type and its body; `None`: it has not all come yet.

        Raises `ValueError` for one that is too long.
        """
        buffer = self._buffer
        size = len(buffer)
        if size < 8:
            return None
        kind, length = _FRAME.unpack_from(buffer)
        if length > self.most:
            raise ValueError(f"a frame of {length} bytes")
        if size < 8 + length:
            return None
        body = bytes(buffer[8 : 8 + length])
        if size == 8 + length:
            buffer.clear()
        else:
            del buffer[: 8 + length]
        return kind, body


def parse_hello(body: bytes) -> Hello:
    """Raises `ValueError` for what is none."""
    if not _HELLO_2.size <= len(body) <= MAX_HELLO:
        raise ValueError(f"a HELLO of {len(body)} bytes")
    # What stands behind these is of the protocol, which may be one that is not known here.
    protocol, api, process, vcpu, vcpus, target = _HELLO_2.unpack_from(body)
    named: tuple[str, int] | tuple[()] = ()
    rest = body[_HELLO_2.size :]
    if protocol == PROTOCOL:
        if len(body) < _HELLO.size:
            raise ValueError(f"a HELLO of {len(body)} bytes")
        *_, architecture, version = _HELLO.unpack_from(body)
        named = _text(architecture), version
        rest = body[_HELLO.size :]
    names = tuple(rest.decode("ascii", "replace").split(","))
    return Hello(protocol, api, process, vcpu, vcpus, _text(target), names, *named)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


def check_hello(hello: Hello) -> str | None:
    """Why this plugin cannot be served; `None`: it can."""
    if hello.protocol not in PROTOCOLS:
        return (
            f"the plugin speaks protocol {hello.protocol}, and this vmibridge {PROTOCOL}:"
            " build the plugin that comes with it"
        )
    if hello.vcpu >= MAX_VCPUS:
        return f"vCPU {hello.vcpu}, and {MAX_VCPUS} of a QEMU are served"
    try:
        architecture_named(hello.architecture, hello.architecture_version)
    except UnknownArchitectureError as error:
        return str(error)
    if hello.registers != REGISTER_NAMES:
        return "the plugin has other registers: build the plugin that comes with this vmibridge"
    return None


def welcome(traps: TrapFilter, protocol: int = PROTOCOL) -> bytes:
    """The frame that says which traps are ours, to a plugin that speaks `protocol`.

    Raises `ValueError` for more than 64 magics.
    """
    if len(traps.magics) > MAX_MAGICS:
        raise ValueError(f"{len(traps.magics)} magics, and the plugin has room for {MAX_MAGICS}")
    any_of = traps.any_hypercall * _ANY_HYPERCALL | traps.any_cpuid * _ANY_CPUID
    magics = sorted(traps.magics)
    body = _WELCOME.pack(protocol, _ALL_KINDS, any_of, len(magics))
    body += struct.pack(f"<{len(magics)}I", *magics)
    return _FRAME.pack(FrameType.WELCOME, len(body)) + body


def refused(why: str) -> bytes:
    """The frame that says why not."""
    body = why.encode()[:500]
    return _FRAME.pack(FrameType.REFUSED, len(body)) + body


def parse_trap(body: bytes, seq: int, vm: str, lane: int, layout: TrapLayout = _X86) -> TrapEvent:
    """The trap in a TRAP frame. Raises `ValueError` for what is none."""
    # At once: on the path of every trap, where each attribute of a named tuple is felt.
    _, trap, registers, ip_at, taken, widths, highest_ring, longest = layout
    if len(body) != trap.size:
        raise ValueError(f"a TRAP of {len(body)} bytes")
    ip, kind, length, width, ring, flags, *values = trap.unpack(body)
    reason = _REASONS.get(kind)
    if reason is None or width not in widths or ring > highest_ring or not 2 <= length <= longest:
        raise ValueError(f"a TRAP of kind {kind}, {length} bytes, {width} bits, ring {ring}")
    values.insert(ip_at, ip)
    return TrapEvent(
        seq,
        reason,
        registers(*values[:taken]),
        vm,
        lane,
        ip,
        length,
        width,
        ring,
        not flags & _FLAGS_UNKNOWN,
    )


def answer(writes: RegisterWrites | None) -> bytes:
    """The frame that lets the vCPU go on."""
    if writes is None:
        return _NATIVE
    a, b, c, d = writes.rax, writes.rbx, writes.rcx, writes.rdx
    mask = (a is not None) | (b is not None) << 1 | (c is not None) << 2 | (d is not None) << 3
    return _ANSWER.pack(
        _ANSWER_TYPE, _ANSWER.size - 8, writes.rip, mask, 0, a or 0, b or 0, c or 0, d or 0
    )


def read_memory(address: int, size: int) -> bytes:
    """The frame that asks for physical memory."""
    return _ACCESS.pack(FrameType.READ, _ACCESS.size - 8, address, size, 0)


def write_memory(address: int, data: bytes) -> bytes:
    """The frame that writes physical memory."""
    size = len(data)
    return _ACCESS.pack(FrameType.WRITE, _ACCESS.size - 8 + size, address, size, 0) + data


def parse_memory(body: bytes, size: int) -> bytes | None:
    """What was read, `size` bytes; `None`: it failed. Raises `ValueError` for neither."""
    if len(body) < 4:
        raise ValueError("a MEMORY without a result")
    if int.from_bytes(body[:4], "little"):
        return None
    if len(body) != 4 + size:
        raise ValueError(f"a MEMORY of {len(body) - 4} bytes, and {size} were asked for")
    return body[4:]
