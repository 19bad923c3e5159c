"""From a stop of the VM to its going on: which trap it is, whose, and the answer.

- The VM stands still from a trap to its answer, all vCPUs of it: there is one trap at a time.
- An answer is one write, the registers and `c`; a trap is two round trips, the stop and `g`.
- What is not ours is stepped over: its breakpoint is taken away, one instruction of its vCPU
  runs while the others stand still, and the breakpoint is set again.
- A stop that is not a breakpoint's is somebody's who paused the VM: it is theirs to resume.
"""

import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TypeVarTuple

import anyio
from anyio.abc import TaskGroup

from vmibridge.arch.forms import form_of
from vmibridge.arch.segment import ring_of
from vmibridge.backend.qemu_gdb import commands
from vmibridge.backend.qemu_gdb.client import ClientLostError, GdbClient
from vmibridge.backend.qemu_gdb.commands import Exit, ReplyError, Stop, StubError
from vmibridge.backend.qemu_gdb.inspection import Code, Inspector, Where
from vmibridge.backend.qemu_gdb.packets import encode
from vmibridge.errors import BackendError, TrapQueueClosedError
from vmibridge.event import RegisterWrites, TrapEvent, TrapFilter
from vmibridge.vmi import TrapSink

log: logging.Logger = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

GONE = "the VM is gone"
_STEP = 5.0
"""Seconds."""
CONTINUE = encode(commands.CONTINUE)
_READ_REGISTERS = encode(commands.READ_REGISTERS)


class Stops:
    """Those of one VM, in one run of its backend."""

    def __init__(
        self,
        vm: str,
        client: GdbClient,
        inspector: Inspector,
        *,
        threads: Mapping[str, int],
        hardware: bool,
        over: anyio.Event,
    ) -> None:
        """`over` is set when the run comes to its end, here or elsewhere."""
        self.vm = vm
        self.over = over
        self.pending: TrapEvent | None = None
        """The trap that waits for its answer."""
        self.void: bool = False
        """The VM was reset in it."""
        self.paused: bool = False
        """Somebody else has stopped the VM, or QEMU on its way out."""
        self.shut_down: bool = False
        self.crashed: bool = False
        self._client = client
        self._inspector = inspector
        self._threads = threads
        self._hardware = hardware
        self._seq = itertools.count(1)
        self._traps = TrapFilter()
        self._sink: TrapSink
        self._tasks: TaskGroup | None = None
        self._at: Where
        self._stepped: anyio.Event | None = None

    def begin(self, traps: TrapFilter, sink: TrapSink, tasks: TaskGroup) -> None:
        """From here on a stop of a breakpoint is a trap."""
        self._traps, self._sink, self._tasks = traps, sink, tasks
        self._client.on_stop = self._on_stop

    def end(self) -> None:
        """From here on a stop is nothing."""
        self._tasks = None
        self._client.on_stop = lambda _stop: None

    def lose(self) -> None:
        """No stop comes any more."""
        self.over.set()
        if self._stepped is not None:
            self._stepped.set()

    def was_reset(self) -> None:
        """The answer of a trap that is pending only lets the VM go on."""
        self.void = self.pending is not None
        self._inspector.forget()

    def _on_stop(self, stop: Stop | Exit) -> None:
        if isinstance(stop, Exit):
            self.lose()
            return
        if self._stepped is not None:
            self._stepped.set()
            return
        if stop.signal != commands.SIGTRAP:
            self._on_pause(stop)
            return
        if self.pending is not None:
            log.warning("vm %s: somebody else let it go on in a trap", self.vm)
            return
        self.paused = False
        self._client.post(_READ_REGISTERS, 1, partial(self._on_registers, stop))

    def _on_pause(self, stop: Stop) -> None:
        # QEMU's `replies to a stop` name the reason by a signal: SIGQUIT is a shutdown.
        if stop.signal == commands.SIGQUIT:
            self.shut_down = True
            self.paused = True
            self.over.set()
            return
        if stop.signal == commands.SIGABRT:
            self.crashed = True
            self.paused = True
            self.over.set()
            return
        log.info("vm %s: paused by somebody else (signal %d)", self.vm, stop.signal)
        self.paused = True

    def _on_registers(self, stop: Stop, reply: bytes) -> None:
        layout = self._client.layout
        if self._client.why_lost is not None or self.over.is_set():
            return
        try:
            # What lies behind is of no use here, and takes its time.
            data = commands.parse_hex(commands.check(reply)[: 2 * layout.size])
        except StubError as error:
            raise ReplyError(f"no registers: {error}") from error
        registers, cs = layout.read(data)
        where = Where(stop, data, registers, cs)
        code = self._inspector.known(registers, cs)
        if code is None:
            self._start(self._look, where)
        else:
            self._on_trap(where, code)

    def _on_trap(self, where: Where, code: Code) -> None:
        reason, length, width = code
        registers = where.registers
        magic = form_of(reason, width).get(registers)[0] & 0xFFFF_FFFF
        if not self._traps.wants(reason, magic):
            self._start(self._step_over, where.stop.thread, self._point(where))
            return
        event = TrapEvent(
            next(self._seq),
            reason,
            registers,
            self.vm,
            self._vcpu_of(where.stop),
            registers.rip,
            length,
            width,
            ring_of(where.cs, registers.cr0, registers.rflags),
        )
        self.pending, self._at, self.void = event, where, False
        try:
            self._sink.put_nowait(event)
        except anyio.WouldBlock:
            self._start(self._put, event)
        except TrapQueueClosedError:
            self._go_on_natively()

    async def _put(self, event: TrapEvent) -> None:
        try:
            await self._sink.put(event)
        except TrapQueueClosedError:
            self._go_on_natively()

    def _vcpu_of(self, stop: Stop) -> int:
        return self._threads.get(stop.thread, 0)

    def _point(self, where: Where) -> int | None:
        """The breakpoint that a vCPU stands at; `None`: it is not known which."""
        address = where.registers.rip
        if where.frame is not None:
            return self._inspector.ud_handler
        return address if address in self._inspector.points else None

    def _start(self, task: Callable[[*Ts], Coroutine[None, None, None]], *arguments: *Ts) -> None:
        """Run a task in the run, unless that is over: it is the detaching that goes on then."""
        if self._tasks is not None and not self.over.is_set():
            self._tasks.start_soon(task, *arguments)

    async def _look(self, where: Where) -> None:
        try:
            found = await self._inspector.look(where, self._vcpu_of(where.stop))
            if found is None:
                await self._step_over(where.stop.thread, self._point(where))
            else:
                self._on_trap(*found)
        except ClientLostError:
            self.over.set()

    # --- answers -------------------------------------------------------------------

    def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer; never waits. Raises `BackendError` when the VM is gone."""
        if self.pending is not event:
            raise BackendError(GONE)
        client = self._client
        if client.why_lost is not None:
            # It stays pending: nobody has answered this vCPU.
            raise BackendError(f"{GONE}: {client.why_lost}")
        if writes is None and not self.void:
            self._go_on_natively()
            return
        self.pending = None
        if writes is None or self.void:
            client.send(CONTINUE)
            return
        where = self._at
        if where.frame is None:
            data = client.layout.write(where.data, writes)
        else:
            data = client.layout.write_frame(where.data, writes, where.frame)
        packets = encode(commands.write_registers(data)) + CONTINUE
        client.post(packets, 1, self._on_written, runs=True)
        client.receive_at_once()

    def _on_written(self, reply: bytes) -> None:
        if self._client.why_lost is None:
            try:
                commands.check_ok(reply)
            except StubError as error:
                raise ReplyError(f"it writes no registers: {error}") from error

    def _go_on_natively(self) -> None:
        self.pending = None
        self._start(self._step_over, self._at.stop.thread, self._point(self._at))

    async def _step_over(self, thread: str, point: int | None) -> None:
        # QEMU keeps a step in mind that it is interrupted in, and would stop for nobody after `D`.
        with anyio.CancelScope(shield=True):
            await self._step(thread, point)

    async def _step(self, thread: str, point: int | None) -> None:
        client, hardware = self._client, self._hardware
        points = self._inspector.points if point is None else [point]
        away = [commands.remove_breakpoint(address, hardware=hardware) for address in points]
        again = [commands.set_breakpoint(address, hardware=hardware) for address in points]
        count = len(points)
        self._stepped = anyio.Event()
        try:
            packets = b"".join(map(encode, [*away, commands.step(thread)]))
            client.post(packets, count, self._on_written, runs=True)
            with anyio.fail_after(_STEP):
                await self._stepped.wait()
            self._stepped = None
            if client.exited:
                return
            packets = b"".join(map(encode, again)) + CONTINUE
            client.post(packets, count, self._on_written, runs=True)
        except TimeoutError:
            client.lose("one instruction does not end")
            self.over.set()
        except ClientLostError:
            self.over.set()
        finally:
            self._stepped = None
