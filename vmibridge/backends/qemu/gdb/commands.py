"""Commands of GDB's remote protocol and what their replies say. No I/O.

GDB manual, appendix E.2 (packets), E.3 (stop replies), E.4 (queries); QEMU's own are in its
`docs/system/gdb.rst`. A command is what goes into a packet. What a stub replies is checked;
an error of the stub is a `StubError`, and a malformed reply a `ReplyError`.
"""

from typing import NamedTuple

from vmibridge.backends.qemu.gdb.packets import PacketError

OK = b"OK"
SUPPORTED = b"qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+;xmlRegisters=i386"
NO_ACKS = b"QStartNoAckMode"
WHY_STOPPED = b"?"
"""QEMU removes every breakpoint at it."""
READ_REGISTERS = b"g"
CONTINUE = b"c"
DETACH = b"D;1"
"""Of process 1, which is all of a QEMU with one machine."""
FIRST_THREADS, MORE_THREADS = b"qfThreadInfo", b"qsThreadInfo"
MEMORY_IS_VIRTUAL, MEMORY_IS_PHYSICAL = b"Qqemu.PhyMemMode:0", b"Qqemu.PhyMemMode:1"
PROBE = b"qC"
"""Answered by `QC...`, and by nothing else: see `is_probed`."""
PERMIT = b"vCont;x"
"""An action that no stub knows: it is refused, and QEMU since 8.1 may then send a stop reply again.

QEMU since 8.1 sends one stop reply for each command that resumes the VM, and drops the others."""
INTERRUPT = b"\x03+\x03"
"""Pauses the VM, in whatever state QEMU's reader is. After a reply that was not acknowledged it
drops all but `+` and `$`; otherwise a `+` would pause the VM, and QEMU since 8.1 tells a pause
only if it is by the other byte. What comes while the VM stands still is dropped."""

SIGQUIT, SIGTRAP, SIGABRT = 3, 5, 6
"""QEMU tells a shutdown by SIGQUIT, a pause by SIGINT, a breakpoint by SIGTRAP, and by SIGABRT that
it cannot run the VM any further: the state "internal-error" of its monitor."""
_MAX_THREADS = 4096


class ReplyError(PacketError):
    """A reply that does not answer the command."""


class StubError(Exception):
    """The stub refuses a command: `E..`, or nothing at all for one that it does not know."""


class Stop(NamedTuple):
    """The VM stands still."""

    signal: int
    thread: str = ""
    """The one that was stopped, such as `p01.02`; empty if the stub did not say."""


class Exit(NamedTuple):
    """There is nothing left to run."""

    status: int
    killed: bool


def is_stop(data: bytes) -> bool:
    """Whether this is a stop reply: no other reply begins like one."""
    return data[:1] in (b"T", b"S", b"W", b"X")


def is_probed(data: bytes) -> bool:
    """Whether this is the reply to `PROBE`. Where it is missing, the stub has swallowed the
    command.

    QEMU takes the first byte that comes while the VM runs as a wish to pause it, and drops the
    packet that the byte belongs to; what follows it is done.
    """
    return data[:2] == b"QC"


def parse_stop(data: bytes) -> Stop | Exit:
    """Raises `ReplyError` for what is not a stop reply."""
    kind = data[:1]
    code = _number(data[1:3], data)
    if kind in (b"W", b"X"):
        return Exit(code, kind == b"X")
    if kind == b"S":
        return Stop(code)
    if kind != b"T":
        raise ReplyError(f"{_shown(data)} is not a stop reply")
    for pair in data[3:].split(b";"):
        name, _, value = pair.partition(b":")
        if name == b"thread":
            return Stop(code, _thread(value))
    return Stop(code)


def parse_threads(data: bytes) -> list[str]:
    """The threads of a reply to a list; empty at its end.

    Raises `ReplyError`, `StubError`.
    """
    if check(data) == b"l":
        return []
    if not data.startswith(b"m"):
        raise ReplyError(f"{_shown(data)} is not a list of threads")
    threads = [_thread(name) for name in data[1:].split(b",")]
    if len(threads) > _MAX_THREADS:
        raise ReplyError(f"{len(threads)} threads")
    return threads


def thread_number(thread: str) -> int:
    """The number of a thread in its process, from 1; QEMU's vCPUs are threads in their order."""
    return int(thread.rpartition(".")[2], 16)


def parse_features(data: bytes) -> dict[str, str]:
    """What `qSupported` replies: a value for each name, `+` or `-` for one that has none."""
    found = {}
    for pair in check(data).decode("ascii", "replace").split(";"):
        name, equals, value = pair.partition("=")
        found[name if equals else name[:-1]] = value if equals else name[-1:]
    return found


def packet_size(features: dict[str, str], default: int = 400, most: int = 1 << 17) -> int:
    """Bytes that the stub takes in a packet. Raises `ReplyError` for less than it has to."""
    stated = features.get("PacketSize")
    if stated is None:
        return default
    size = _number(stated.encode(), stated.encode())
    if size < 256:
        raise ReplyError(f"packets of {size} bytes")
    return min(size, most)


def read_feature(annex: str, offset: int, size: int) -> bytes:
    """Asks for a part of a target description."""
    return b"qXfer:features:read:%b:%x,%x" % (annex.encode(), offset, size)


def parse_part(data: bytes) -> tuple[bytes, bool]:
    """A part of an object, and whether it is the last one. Raises `ReplyError`, `StubError`."""
    check(data)
    if data[:1] not in (b"l", b"m"):
        raise ReplyError(f"{_shown(data)} is not part of an object")
    return data[1:], data[:1] == b"l"


def select(thread: str) -> bytes:
    """Makes registers and memory those of a thread."""
    return b"Hg" + thread.encode()


def step(thread: str) -> bytes:
    """Runs one instruction of a thread; all others stand still meanwhile."""
    return b"vCont;s:" + thread.encode()


def write_registers(data: bytes) -> bytes:
    """Writes registers from the first one on; those behind the end of `data` stay."""
    return b"G" + data.hex().encode()


def read_memory(address: int, size: int) -> bytes:
    """Reads memory."""
    return b"m%x,%x" % (address, size)


def write_memory(address: int, data: bytes) -> bytes:
    """Writes memory."""
    return b"M%x,%x:%b" % (address, len(data), data.hex().encode())


def set_breakpoint(address: int, *, hardware: bool) -> bytes:
    """Sets a breakpoint."""
    return b"Z%d,%x,1" % (hardware, address)


def remove_breakpoint(address: int, *, hardware: bool) -> bytes:
    """Removes a breakpoint."""
    return b"z%d,%x,1" % (hardware, address)


def monitor(command: str) -> bytes:
    """Gives a command to QEMU's monitor, which replies with text in `O` packets, then `OK`."""
    return b"qRcmd," + command.encode().hex().encode()


def parse_output(data: bytes) -> str | None:
    """Text of the monitor; `None`: this is its end. Raises `ReplyError`, `StubError`."""
    if check(data) == OK:
        return None
    if not data.startswith(b"O"):
        raise ReplyError(f"{_shown(data)} is not text of the monitor")
    return parse_hex(data[1:]).decode("utf-8", "replace")


def check(data: bytes) -> bytes:
    """The reply itself. Raises `StubError` for an error, and for the empty reply."""
    if not data:
        raise StubError("the stub does not know the command")
    if data[:1] == b"E" and (len(data) == 3 or data[1:2] == b"."):
        raise StubError(f"error {data[1:].decode('ascii', 'replace').lstrip('.')}")
    return data


def check_ok(data: bytes) -> None:
    """Raises `StubError`, and `ReplyError` for a reply that is not `OK`."""
    if check(data) != OK:
        raise ReplyError(f"{_shown(data)} where OK was due")


def parse_hex(data: bytes, size: int | None = None) -> bytes:
    """Bytes from hex digits. Raises `ReplyError` for others, or another number of bytes."""
    try:
        found = bytes.fromhex(data.decode("ascii"))
    except ValueError:
        raise ReplyError(f"{_shown(data)} is not hexadecimal") from None
    if size is not None and len(found) != size:
        raise ReplyError(f"{len(found)} bytes, and {size} were asked for")
    return found


def parse_memory(data: bytes, size: int) -> bytes:
    """What was read. Raises `StubError` where there is no memory, `ReplyError`."""
    return parse_hex(check(data), size)


def _thread(name: bytes) -> str:
    process, dot, number = name.rpartition(b".")
    if dot and not process.startswith(b"p"):
        raise ReplyError(f"{_shown(name)} is not a thread")
    for part in (process[1:], number) if dot else (number,):
        _number(part, name)
    return name.decode("ascii")


def _number(digits: bytes, whole: bytes) -> int:
    if not digits or len(digits) > 16 or not digits.isalnum():
        raise ReplyError(f"{_shown(whole)} has no number where one was due")
    try:
        return int(digits, 16)
    except ValueError:
        raise ReplyError(f"{_shown(whole)} has no number where one was due") from None


def _shown(data: bytes) -> str:
    return repr(data[:40])[1:]
