"""From a stop of the VM to its going on: which trap it is, whose, and the answer.

- The VM stands still from a trap to its answer, all vCPUs of it: there is one trap at a time.
- A trap is two round trips, the stop and `arrivals`; an answer is two, the registers, read before
  they are written, and `c`.
- What is not ours is stepped over (`steps`). So is an answered trap to which the processor owes
  more than its registers, in the form of an instruction that does nothing (`skipping`).
- Others control the VM by QMP at any moment (`others`). A stop that is not a breakpoint's is theirs
  to resume. The answer to a trap that they have taken the vCPU out of is undone.
"""

import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TypeVarTuple

import anyio
import msgspec
from anyio.abc import TaskGroup

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.arrivals import READ_REGISTERS, Arrivals
from vmibridge.backends.qemu.gdb.client import ClientLostError, GdbClient
from vmibridge.backends.qemu.gdb.commands import Exit, ReplyError, Stop, StubError
from vmibridge.backends.qemu.gdb.inspection import Code, Inspector, Where
from vmibridge.backends.qemu.gdb.memory import QemuMemory
from vmibridge.backends.qemu.gdb.others import Others, Standing
from vmibridge.backends.qemu.gdb.packets import encode
from vmibridge.backends.qemu.gdb.skipping import nop, patch_of
from vmibridge.backends.qemu.gdb.steps import StepEnd, Stepper
from vmibridge.backends.qemu.gdb.stop_log import StopLog
from vmibridge.bridge.registers import form_of
from vmibridge.errors import BackendError
from vmibridge.vm.arch.x86.segment import ring_of
from vmibridge.vm.backend import TrapSink, feed, feed_held
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

log: logging.Logger = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

GONE = "the VM is gone"
_LOOKS = 0.05
"""Seconds."""
_AT_ONCE = 0.05
"""Seconds of a trap after which others are expected to have let the VM go on and paused it. A look
for that takes as long as an answer."""
_RFLAGS_TF, _RFLAGS_RF = 1 << 8, 1 << 16
CONTINUE = encode(commands.CONTINUE)


class Stops:
    """Those of one VM, in one run of its backend."""

    def __init__(
        self,
        vm: str,
        client: GdbClient,
        memory: QemuMemory,
        inspector: Inspector,
        *,
        threads: Mapping[str, int],
        hardware: bool,
        steps_exactly: bool,
        stop_log: StopLog | None = None,
        over: anyio.Event,
    ) -> None:
        """`over` is set when the run comes to its end, here or elsewhere.

        `steps_exactly` says that a step delivers a single step of the guest's own, as TCG's does.
        """
        self.vm = vm
        self.over = over
        self.pending: TrapEvent | None = None
        """The trap that waits for its answer."""
        self.void: bool = False
        """The VM was reset in it."""
        self.paused: bool = False
        """Another client has stopped the VM, or QEMU as it shuts down."""
        self.shut_down: bool = False
        self.crashed: bool = False
        self._client = client
        self._memory = memory
        self._inspector = inspector
        self._threads = threads
        self._hardware = hardware
        self._steps_exactly = steps_exactly
        self._seq = itertools.count(1)
        self._traps = TrapFilter()
        self._sink: TrapSink
        self._tasks: TaskGroup | None = None
        self._at: Where
        self._code: Code
        self._since = 0.0
        self._stepper = Stepper(client)
        self._arrivals = Arrivals(client, memory, inspector, self._on_arrived, self._go_on)
        self._others = Others(client)
        self._stop_log = stop_log
        self._is_handling = False
        """From a stop of a breakpoint until the VM goes on."""
        self._seen: bytes | None = None
        self._interfered = 0

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
        self._stepper.lose()

    def was_reset(self) -> None:
        """The answer of a trap that is pending only lets the VM go on."""
        self.void = self.pending is not None
        self._inspector.forget()

    # --- stops ---------------------------------------------------------------------

    def _on_stop(self, stop: Stop | Exit) -> None:
        if isinstance(stop, Exit):
            self.lose()
            return
        if stop.signal in (commands.SIGQUIT, commands.SIGABRT):
            self._on_end(stop)
            return
        self._others.stops += 1
        if self._stepper.take(stop):
            return
        is_pause = stop.signal != commands.SIGTRAP
        if self._is_handling:
            # Another client has let the VM go on, and its vCPU is where it was.
            if is_pause and not self._client.owes and not self._others.is_looking:
                self._others.has_paused = True
        elif not is_pause:
            self.paused = False
            self._is_handling, self._others.has_paused = True, False
            self._arrivals.ask(stop)
        elif not (self._others.is_looking or self._client.owes):
            log.info("vm %s: paused by another client (signal %d)", self.vm, stop.signal)
            self.leave_paused()

    def _on_end(self, stop: Stop) -> None:
        # QEMU's `replies to a stop` name the reason by a signal: SIGQUIT is a shutdown.
        self.shut_down = self.shut_down or stop.signal == commands.SIGQUIT
        self.crashed = self.crashed or stop.signal == commands.SIGABRT
        self.paused = True
        self.over.set()
        self._stepper.lose()

    def leave_paused(self) -> None:
        """Another client has paused the VM; the next stop is to be reported, too."""
        self.paused, self._is_handling = True, False
        self._start(self._wait_for_others)

    def _go_on(self, *, theirs: bool = False) -> None:
        """Let the VM run; `theirs`: for a moment, after which it is paused as others have asked."""
        self.paused = self._is_handling = False
        theirs = theirs or self._is_to_pause()
        # Once the run is over the detaching lets it go on.
        if not self.over.is_set():
            packets = CONTINUE + commands.INTERRUPT if theirs else CONTINUE
            self._client.post(packets, 0, self._check_written, runs=True, probe=True)

    def _is_to_pause(self) -> bool:
        return self._stop_log is not None and self._stop_log.wants_pause()

    async def watch_stop_log(self) -> None:
        """Pause the VM for a `stop` that came just before it went on. Until cancelled."""
        while self._stop_log is not None:
            await anyio.sleep(_LOOKS)
            at_rest = not (self.paused or self._is_handling or self._stepper.is_busy)
            if at_rest and self._is_to_pause() and self._client.why_lost is None:
                self._client.send(commands.INTERRUPT)

    async def _wait_for_others(self) -> None:
        try:
            if await self._others.leave_paused():
                self._go_on()
        except ClientLostError:
            self.over.set()

    def _on_arrived(self, where: Where, code: Code | None) -> None:
        if self.over.is_set():
            return
        if self._others.has_paused:
            self.leave_paused()
        elif code is None:
            self._start(self._look, where)
        else:
            self._on_trap(where, code)

    def _on_trap(self, where: Where, code: Code) -> None:
        reason, length, width = code[:3]
        registers = where.registers
        if where.point is not None:
            self._arrivals.note(where.stop, where.point)
        magic = form_of(reason, width).get(registers)[0] & 0xFFFF_FFFF
        if not self._traps.wants(reason, magic):
            self._start(self._step_over, where)
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
        self.pending, self._at, self._code, self.void = event, where, code, False
        self._since = time.monotonic()
        feed(self._sink, event, self._hold, self._refuse)

    def _hold(self, event: TrapEvent) -> None:
        self._start(feed_held, self._sink, event, self._refuse)

    def _refuse(self, _event: TrapEvent) -> None:
        self._go_on_natively()

    def _vcpu_of(self, stop: Stop) -> int:
        return self._threads.get(stop.thread, 0)

    def _start(self, task: Callable[[*Ts], Coroutine[None, None, None]], *arguments: *Ts) -> None:
        """Run a task in the run, unless that is over: it is the detaching that goes on then."""
        if self._tasks is not None and not self.over.is_set():
            self._tasks.start_soon(task, *arguments)

    async def _look(self, where: Where) -> None:
        try:
            found, code = await self._inspector.look(where, self._vcpu_of(where.stop))
            if code is None:
                await self._step_over(found)
                return
            if code.patched:
                await self._restore(code)
            self._on_trap(found, code)
        except ClientLostError:
            self.over.set()

    async def _restore(self, code: Code) -> None:
        """A client that left has made the trap an instruction that does nothing."""
        patch = patch_of(code.reason, code.length)
        assert patch is not None, "a CPUID is never patched"
        ahead = self._memory.virtual()
        write = commands.write_memory(code.address + patch.offset, patch.trap)
        await self._client.ask_all([*ahead, write], probe=True)

    # --- answers -------------------------------------------------------------------

    def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer; never waits. Raises `BackendError` when the VM is gone."""
        if self.pending is not event:
            raise BackendError(GONE)
        client = self._client
        if client.why_lost is not None:
            # It stays pending: this vCPU has no answer yet.
            raise BackendError(f"{GONE}: {client.why_lost}")
        if writes is None and not self.void:
            self._go_on_natively()
            return
        self.pending = None
        if writes is None or self.void:
            self._go_on()
            return
        where, code = self._at, self._code
        if self._owes_more(where, code) and self._tasks is not None and not self.over.is_set():
            self._start(self._end_instruction, where, code, writes)
            return
        self._seen, self._interfered = None, client.interfered
        # In one write, the read first: it shows whether the vCPU is where it was when the answer
        # was written. If not, `_on_answered` puts back what was there.
        packets = READ_REGISTERS + encode(self._written(where, writes))
        client.post(packets, 2, self._on_answered, probe=True)
        client.receive_at_once()

    def _owes_more(self, where: Where, code: Code) -> bool:
        """Whether the end of the instruction has consequences beyond its registers."""
        return self._steps_exactly and (
            code.in_shadow or bool(where.registers.rflags & (_RFLAGS_TF | _RFLAGS_RF))
        )

    def _written(self, where: Where, writes: RegisterWrites) -> bytes:
        layout = self._client.layout
        if where.frame is None:
            data = layout.write(where.data, writes)
        else:
            data = layout.write_frame(where.data, writes, where.frame)
        return commands.write_registers(data)

    def _on_answered(self, reply: bytes) -> None:
        client = self._client
        if client.why_lost is not None:
            return
        if self._seen is None:
            self._seen = commands.parse_hex(reply[: 2 * client.layout.size])
            return
        self._check_written(reply)
        if self._seen != self._at.data:
            self._warn_of_move(self._at)
            # The answer was written into another place: what was there comes back.
            size = len(self._written(self._at, RegisterWrites(0))) // 2
            undo = commands.write_registers(self._seen[:size])
            client.post(encode(undo), 1, self._check_written)
        takes_long = time.monotonic() - self._since > _AT_ONCE
        if self._others.has_paused:
            self.leave_paused()
        elif takes_long and client.interfered == self._interfered and not self.over.is_set():
            self._start(self._go_on_as_asked)
        else:
            self._go_on()

    def _check_written(self, reply: bytes) -> None:
        if self._client.why_lost is None:
            try:
                commands.check_ok(reply)
            except StubError as error:
                raise ReplyError(f"it writes no registers: {error}") from error

    def _warn_of_move(self, where: Where) -> None:
        vcpu = self._vcpu_of(where.stop)
        log.warning(
            "vm %s: vCPU %d was taken out of a trap by another client (a reset, a snapshot):"
            " the answer is dropped",
            *(self.vm, vcpu),
        )

    async def _go_on_as_asked(self) -> None:
        """Unless others have let the VM go on and paused it, while it was in the trap."""
        with anyio.CancelScope(shield=True):
            try:
                standing, _ = await self._others.look()
                if standing is Standing.PAUSED:
                    self.leave_paused()
                else:
                    self._go_on()
            except ClientLostError:
                self.over.set()

    async def _end_instruction(self, where: Where, code: Code, writes: RegisterWrites) -> None:
        """The answer, where the processor owes more."""
        # An answer is written even if the run is cancelled now.
        with anyio.CancelScope(shield=True):
            try:
                standing, data = await self._others.look()
                theirs = standing is Standing.PAUSED
                if data[: len(where.data)] == where.data:
                    await self._end_the_instruction(where, code, writes, theirs=theirs)
                    return
                self._warn_of_move(where)
                if theirs:
                    self.leave_paused()
                else:
                    self._go_on()
            except ClientLostError:
                self.over.set()

    async def _end_the_instruction(
        self, where: Where, code: Code, writes: RegisterWrites, *, theirs: bool
    ) -> None:
        """Let the vCPU execute an instruction that does nothing in the place of its trap."""
        client, hardware = self._client, self._hardware
        at = code.address
        # What stands there now: a handler may have written over the instruction that it answers.
        there = await self._memory.read_code(at, code.length)
        stays = msgspec.structs.replace(writes, rip=where.registers.rip)
        # The breakpoint is removed before the code is written, and set again after it: a software
        # one is a byte of the code, and what its removal puts back would overwrite ours.
        before = [
            *([commands.remove_breakpoint(at, hardware=hardware)] if self._is_point(at) else []),
            *self._memory.virtual(),
            self._written(where, stays),
            commands.write_memory(at, nop(code.length)),
        ]
        after = [
            commands.write_memory(at, there),
            *([commands.set_breakpoint(at, hardware=hardware)] if self._is_point(at) else []),
        ]
        try:
            end = await self._stepper.step(where.stop.thread, where.registers.rip, before, after)
        except (StubError, ReplyError) as error:
            log.warning("vm %s: at %#x: no end of the instruction: %s", self.vm, at, error)
            end = StepEnd.INTERRUPTED
        if end is not StepEnd.DONE:
            _, data = await self._others.look()
            registers, _ = client.layout.read(data)
            if registers.rip == where.registers.rip:
                # It has not run: what the processor owes is lost, but the answer is not.
                client.post(encode(self._written(where, writes)), 1, self._check_written)
        if end is StepEnd.PAUSED:
            self.leave_paused()
        else:
            self._go_on(theirs=theirs)

    def _is_point(self, address: int) -> bool:
        return address in self._inspector.points

    def _go_on_natively(self) -> None:
        self.pending = None
        self._start(self._step_over, self._at)

    async def _step_over(self, where: Where) -> None:
        # QEMU finishes an interrupted step later: it would stop after `D`, with no client.
        with anyio.CancelScope(shield=True):
            hardware = self._hardware
            points = self._inspector.points if where.point is None else [where.point]
            away = [commands.remove_breakpoint(address, hardware=hardware) for address in points]
            again = [commands.set_breakpoint(address, hardware=hardware) for address in points]
            theirs = self._others.has_paused or self._is_to_pause()
            last = CONTINUE + commands.INTERRUPT if theirs else CONTINUE
            # Not that of a trap that has raised an exception: the vCPU is at its handler.
            at = self._client.layout.read(where.data)[0].rip
            self._is_handling = False
            try:
                end = await self._stepper.step(where.stop.thread, at, away, again, last)
                if end is StepEnd.PAUSED:
                    self.leave_paused()
            except ClientLostError:
                self.over.set()
            except (StubError, ReplyError) as error:
                self._client.lose(f"it broke the protocol: {error}")
