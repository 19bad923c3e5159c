"""A vCPU has stopped at a breakpoint: one round trip tells where, in which state, before which
code.

The registers and the code are asked for in one write. Which code is a guess: that of the breakpoint
that followed the vCPU's last one before. A wrong guess takes a second look.
"""

from collections.abc import Callable

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import GdbClient
from vmibridge.backends.qemu.gdb.commands import ReplyError, Stop, StubError
from vmibridge.backends.qemu.gdb.inspection import Code, Inspector, Where, Window
from vmibridge.backends.qemu.gdb.memory import QemuMemory
from vmibridge.backends.qemu.gdb.packets import encode

_MAX_GUESSES = 4096
READ_REGISTERS = encode(commands.READ_REGISTERS)


class Arrivals:
    """Those of one VM, one at a time."""

    def __init__(
        self,
        client: GdbClient,
        memory: QemuMemory,
        inspector: Inspector,
        on_arrived: Callable[[Where, Code | None], None],
        on_dropped: Callable[[], None],
    ) -> None:
        """`on_arrived` gets the vCPU, and its trap if that was guessed.

        `on_dropped` is called instead if another client of QEMU had let the VM go on
        meanwhile: it is paused.
        """
        self._client = client
        self._memory = memory
        self._inspector = inspector
        self._on_arrived = on_arrived
        self._on_dropped = on_dropped
        self._stop: Stop
        self._window: Window | None = None
        self._read: bytes | None = None
        self._due = 0
        self._last: dict[str, int] = {}
        self._following: dict[tuple[str, int | None], int] = {}

    def ask(self, stop: Stop) -> None:
        """Ask where the vCPU of a stop is. Raises `ClientLostError`."""
        likely = self._following.get((stop.thread, self._last.get(stop.thread)))
        window = None if likely is None else self._inspector.window(likely)
        if window is None:
            packets = [commands.PROBE]
        else:
            read = commands.read_memory(window.start, len(window.data))
            packets = [*self._memory.virtual(), read]
        self._stop, self._window, self._read = stop, window, None
        self._due = len(packets) + 1
        ahead = b"".join(map(encode, packets))
        self._client.post(ahead + READ_REGISTERS, self._due, self._on_part)

    def note(self, stop: Stop, point: int) -> None:
        """A vCPU was at a breakpoint."""
        if len(self._following) >= _MAX_GUESSES:
            self._following.clear()
        self._following[stop.thread, self._last.get(stop.thread)] = point
        self._last[stop.thread] = point

    def _on_part(self, reply: bytes) -> None:
        client, window = self._client, self._window
        if client.why_lost is not None:
            return
        self._due -= 1
        size = client.layout.size
        if self._due and len(reply) < 2 * size:
            if window is not None and len(reply) == 2 * len(window.data):
                self._read = commands.parse_hex(reply)
            return
        if self._due:
            # The registers come last, and they are there: the first command was dropped.
            client.drop(self._due)
            self._on_dropped()
            return
        try:
            # What lies behind is of no use here, and takes its time.
            data = commands.parse_hex(commands.check(reply)[: 2 * size])
        except StubError as error:
            raise ReplyError(f"no registers: {error}") from error
        registers, cs = client.layout.read(data)
        where = Where(self._stop, data, registers, cs)
        code = None
        if window is not None:
            code = self._inspector.known(registers, window, self._read)
        if code is not None:
            where = where._replace(point=code.address)
        self._on_arrived(where, code)
