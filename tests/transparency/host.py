"""What runs programs on a backend needs: an answer to each trap, and what came out otherwise.

Below the engine: a backend's traps are answered here, so what is compared is the backend's own.
"""

import struct
from collections.abc import Iterator

import anyio

from transparency import layout
from transparency.alu import ARITHMETIC, DF, RF
from transparency.processor import STRING_ORDER
from transparency.program import Linked
from transparency.records import Answer, End, Logged, Shown
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent

NOTHING = Answer((None, None, None, None))
_MASKS = {64: (1 << 64) - 1, 32: 0xFFFF_FFFF, 16: 0xFFFF}
_STEP, _POINTS = 0x4000, 0xF
"""Of DR6."""
GENERAL = Registers.__struct_fields__[:16]


class Sink:
    """Takes traps, as the engine's queue does."""

    def __init__(self) -> None:
        self._send, self.events = anyio.create_memory_object_stream[TrapEvent](64)

    def put_nowait(self, event: TrapEvent) -> None:
        self._send.send_nowait(event)

    async def put(self, event: TrapEvent) -> None:
        await self._send.send(event)

    def abandon(self, event: TrapEvent) -> None:
        pass

    def end(self) -> None:
        """No trap comes any more."""
        self._send.close()

    def close(self) -> None:
        self._send.close()
        self.events.close()


def writes_of(event: TrapEvent, answer: Answer) -> RegisterWrites:
    """The answer, for the instruction that the backend says it was."""
    return RegisterWrites(event.ip + event.length & _MASKS[event.width], *answer.values)


def compare_trap(number: int, event: TrapEvent, expected: Shown | None) -> Iterator[str]:
    """What a handler was shown otherwise than it had to be."""
    if expected is None:
        yield f"trap {number}: {event.reason.value} at {event.ip:#x} must not be one"
        return
    where = f"trap {number} ({expected.reason} at {expected.ip:#x}): "
    shown = (event.reason.value, event.ip, event.length, event.width, event.ring)
    for name, is_, must in zip(
        ("reason", "ip", "length", "width", "ring"), shown, expected, strict=False
    ):
        if is_ != must:
            yield f"{where}{name} {_hex(is_)}, must be {_hex(must)}"
    if event.registers.rip != event.ip:
        yield f"{where}registers.rip {event.registers.rip:#x} is not ip {event.ip:#x}"
    # Code that is not 64-bit has no R8 to R15: what a backend shows of them is its own affair.
    for name, must in list(zip(GENERAL, expected.registers, strict=True))[
        : 16 if expected.width == 64 else 8
    ]:
        if (is_ := getattr(event.registers, name)) != must:
            yield f"{where}{name} {is_:#x}, must be {must:#x}"
    ignored = RF
    if not getattr(event, "flags_known", True):
        ignored |= ARITHMETIC | DF
    if (event.registers.rflags ^ expected.rflags) & ~ignored:
        yield f"{where}rflags {event.registers.rflags:#x}, must be {expected.rflags:#x}"


def _hex(value: object) -> str:
    return hex(value) if isinstance(value, int) else str(value)


def compare_end(expected: End, *, registers: list[int], rip: int, rflags: int) -> Iterator[str]:
    """What the program left in registers otherwise than it had to be."""
    for name, at in zip(GENERAL, STRING_ORDER, strict=True):
        if registers[at] != expected.registers[at]:
            yield f"end: {name} {registers[at]:#x}, must be {expected.registers[at]:#x}"
    if rip != expected.rip:
        yield f"end: rip {rip:#x}, must be {expected.rip:#x}"
    if (rflags ^ expected.rflags) & ~RF:
        yield f"end: rflags {rflags:#x}, must be {expected.rflags:#x}"


def compare_memory(linked: Linked, address: int, data: bytes) -> Iterator[str]:
    at = address - layout.TABLE_A
    must = linked.expected.ram[at : at + len(data)]
    if data != must:
        first = next(i for i, (a, b) in enumerate(zip(data, must, strict=True)) if a != b)
        found, right = data[first : first + 8].hex(" "), must[first : first + 8].hex(" ")
        yield f"end: memory at {address + first:#x}: {found}, must be {right}"


def compare_result(linked: Linked, state: bytes) -> Iterator[str]:
    """`state`: the memory from `STATE`, to the end of the log."""
    expected = linked.expected
    result = state[layout.RESULT - layout.STATE :]
    registers = list(struct.unpack_from("<16Q", result))
    rip, _, cs, rflags, ss, vector, logged = struct.unpack_from("<6QI", result, 0x80)
    log = state[layout.LOG - layout.STATE :]
    exceptions = []
    for at in range(min(logged, layout.MAX_LOG)):
        kind, code, where, flags, dr6 = struct.unpack_from("<II3Q", log, 32 * at)
        # A processor may set the bits of breakpoints that are not enabled with that of a step.
        dr6 = 0 if kind != 1 else dr6 & _STEP or dr6 & _POINTS
        exceptions.append(Logged(kind, code, where, flags & ~RF, dr6))
    for at in range(max(len(exceptions), len(expected.log))):
        is_ = exceptions[at] if at < len(exceptions) else None
        must = expected.log[at] if at < len(expected.log) else None
        if is_ != must:
            yield f"exception {at}: {_text(is_)}, must be {_text(must)}"
            break
    if vector != expected.vector:
        yield f"end: vector {vector}, must be {expected.vector}"
    start = linked.start
    if (cs, ss) != (start.cs, start.ss):
        yield f"end: CS {cs:#x}, SS {ss:#x}, must be {start.cs:#x}, {start.ss:#x}"
    yield from compare_end(expected, registers=registers, rip=rip, rflags=rflags)
    for address, size in ((layout.DATA, layout.DATA_SIZE), (layout.STACK, layout.STACK_SIZE)):
        at = address - layout.STATE
        yield from compare_memory(linked, address, state[at : at + size])


def _text(logged: Logged | None) -> str:
    if logged is None:
        return "none"
    return (
        f"vector {logged.vector} at {logged.cs:#x}:{logged.rip:#x} flags {logged.rflags:#x}"
        f" dr6 {logged.dr6:#x}"
    )
