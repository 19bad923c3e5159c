"""A QEMU by its gdbstub: breakpoints on trap instructions, under TCG or KVM.

    qemu-gdb:unix:/run/gdb.sock?site=0x401136
    qemu-gdb:tcp:localhost:1234?elf=vmlinux&symbol=call_host&ud-handler=0xffffffff81e00b10

- The VM stands still from a trap to its answer, all vCPUs of it: there is one trap at a time.
- An answer is one write, the registers and `c`; a trap is two round trips, the stop and `g`.
- What is not ours is stepped over: its breakpoint is taken away, one instruction of its vCPU
  runs while the others stand still, and the breakpoint is set again.
- A stop that is not a breakpoint's is somebody's who paused the VM: it is theirs to resume.
- On the way out the breakpoints are removed and the stub is left with `D`, so that the guest
  runs on; a VM that somebody else paused stays paused.
"""

import itertools
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Self, TypeVarTuple

import anyio
from anyio.abc import TaskGroup

from vmibridge.arch.forms import form_of
from vmibridge.arch.instruction import MAX_INSTRUCTION
from vmibridge.arch.segment import (
    ring_of,
)
from vmibridge.backend.qemu_gdb import commands
from vmibridge.backend.qemu_gdb.client import ClientLostError, GdbClient, reading
from vmibridge.backend.qemu_gdb.commands import Exit, ReplyError, Stop, StubError
from vmibridge.backend.qemu_gdb.inspection import Code, Inspector, Where
from vmibridge.backend.qemu_gdb.memory import QemuMemory
from vmibridge.backend.qemu_gdb.options import MOST_HARDWARE, QemuGdbOptions, parse_spec
from vmibridge.backend.qemu_gdb.packets import encode
from vmibridge.backend.qemu_gdb.regions import ACCELERATOR, STATUS
from vmibridge.backend.qemu_gdb.sockets import connect
from vmibridge.errors import BackendError, GuestMemoryError, QmpError, TrapQueueClosedError
from vmibridge.event import RegisterWrites, TrapEvent, TrapFilter
from vmibridge.qemu.qmp import Qmp
from vmibridge.qemu.ram import SharedRam, open_ram
from vmibridge.vmi import Backend, GuestEnd, TrapSink, VcpuEnd

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

_GONE = "the VM is gone"
_CONNECT = 10.0
_REFUSES = 1.0
_DETACH = 5.0
"""Seconds."""
_CONTINUE = encode(commands.CONTINUE)
_READ_REGISTERS = encode(commands.READ_REGISTERS)


class QemuGdbBackend(Backend):
    """One QEMU. Raises `BackendSpecError` for options that make no sense."""

    def __init__(
        self, where: str, options: QemuGdbOptions, sites: Sequence[int], vm: str = "vm"
    ) -> None:
        super().__init__(vm)
        self.where = where
        self.options = options
        self.sites = tuple(sites)
        self._ud_handler = options.ud_handler
        self._points = [*self.sites]
        if options.ud_handler is not None and options.ud_handler not in self._points:
            self._points.append(options.ud_handler)
        self._client: GdbClient
        self._memory: QemuMemory
        self._threads: dict[str, int] = {}
        self._hardware = False
        self._inspector: Inspector
        self._seq = itertools.count(1)
        self._traps = TrapFilter()
        self._sink: TrapSink
        self._tasks_of_run: TaskGroup | None = None
        self._pending: TrapEvent | None = None
        self._at: Where
        self._void = False
        self._stepped: anyio.Event | None = None
        self._paused = False
        self._started = False
        self._prelaunch = False
        self._over = anyio.Event()
        self._stopped = False
        self._shut_down = False
        self._ram: SharedRam | None = None
        self._watching: anyio.CancelScope

    @classmethod
    def from_spec(cls, where: str, options: str, vm: str) -> Self:
        """From the parts of `qemu-gdb:WHERE?OPTIONS`. Raises `BackendSpecError`."""
        given, sites = parse_spec(where, options)
        return cls(where, given, sites, vm)

    # --- life ----------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, which pauses a VM that runs. Raises `BackendError`."""
        spec = f"qemu-gdb:{self.where}"
        try:
            with anyio.fail_after(_CONNECT):
                connection = await self._connect()
        except TimeoutError as error:
            raise BackendError(f"{spec}: nobody answers") from error
        except OSError as error:
            raise BackendError(f"{spec}: {error.strerror or error}") from error
        self._client = GdbClient(connection)
        try:
            if self.options.ram:
                self._ram = open_ram(self.options.ram)
            async with reading(self._client):
                await self._get_ready()
        except BackendError as error:
            self._client.close()
            raise BackendError(f"{spec}: {error}") from error
        except BaseException:
            self._client.close()
            raise

    async def _connect(self) -> socket.socket:
        """QEMU makes its socket a moment before it listens."""
        until = anyio.current_time() + _REFUSES
        while True:
            try:
                return await connect(self.where)
            except ConnectionRefusedError:
                if anyio.current_time() >= until:
                    raise
            await anyio.sleep(0.02)

    async def _get_ready(self) -> None:
        client = self._client
        await client.shake_hands()
        memory = self._memory = QemuMemory(client, self._ram)
        self._inspector = Inspector(self.vm, memory, self._monitor, self._points, self._ud_handler)
        try:
            await self._memory.open()
            self._threads = {
                thread: commands.thread_number(thread) - 1 for thread in await client.threads()
            }
        except (StubError, ReplyError) as error:
            raise BackendError(f"the stub: {error}") from error
        if not client.layout.has_control:
            raise BackendError("the stub does not show CR0, CR3, CR4 and EFER: QEMU is too old")
        if self._ud_handler is not None and not client.layout.is_wide:
            raise BackendError("ud-handler needs a 64-bit vCPU")
        uses_kvm = "enabled" in await self._monitor(ACCELERATOR)
        self._prelaunch = "prelaunch" in await self._monitor(STATUS)
        chosen = self.options.breakpoints
        self._hardware = uses_kvm if chosen == "auto" else chosen == "hardware"
        if self._hardware and len(self._points) > MOST_HARDWARE:
            raise BackendError(
                f"{len(self._points)} sites, and a vCPU has {MOST_HARDWARE} hardware breakpoints"
            )
        if uses_kvm and not self._hardware:
            await self._save_code()

    async def _monitor(self, command: str) -> str:
        try:
            return await self._client.monitor(command)
        except (StubError, ReplyError):
            return ""

    async def _save_code(self) -> None:
        # KVM's software breakpoints are a byte in the guest's memory.
        for address in self._points:
            self._inspector.saved[address] = await self._memory.read_code(address, MAX_INSTRUCTION)
            if not self._inspector.saved[address]:
                raise BackendError(
                    f"nothing is mapped at {address:#x} yet, and with KVM a software breakpoint"
                    " changes memory: use breakpoints=hardware"
                )

    async def close(self) -> None:
        """Let go of a VM that was never run: it goes on, unless it had not begun."""
        if self._ram is not None:
            self._ram.close()
        if not self._started and not self._prelaunch and self._client.why_lost is None:
            with anyio.move_on_after(_DETACH):
                async with reading(self._client):
                    await self._detach()
        self._client.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Set the breakpoints and run the guest until QEMU ends."""
        self._traps, self._sink, self._started = traps, sink, True
        self._watching = anyio.CancelScope()
        client = self._client
        refused: str | None = None
        # What reads has to live on for a cancelled run, too: the guest is not left stopped.
        shield = anyio.CancelScope(shield=True)
        async with anyio.create_task_group() as readers:

            async def read() -> None:
                with shield:
                    async with anyio.create_task_group() as both:
                        both.start_soon(client.watch)
                        await client.read()
                        both.cancel_scope.cancel()
                self._over.set()

            client.on_stop = self._on_stop
            readers.start_soon(read)
            if self.options.qmp:
                readers.start_soon(self._watch_monitor)
            try:
                async with anyio.create_task_group() as self._tasks_of_run:
                    refused = await self._arm()
                    if refused is None:
                        await self._over.wait()
                    self._tasks_of_run.cancel_scope.cancel()
            finally:
                self._tasks_of_run = None
                self._watching.cancel()
                with anyio.CancelScope(shield=True), anyio.move_on_after(_DETACH):
                    await self._detach()
                shield.cancel()
        if refused is not None:
            raise BackendError(f"qemu-gdb:{self.where}: {refused}")
        return self._end()

    def stop(self) -> None:
        """Remove the breakpoints and leave the VM, which runs on."""
        self._stopped = True
        self._over.set()

    async def _watch_monitor(self) -> None:
        try:
            with self._watching:
                async with (
                    Qmp(await anyio.connect_unix(self.options.qmp)) as qmp,
                    qmp.events("RESET") as resets,
                ):
                    async for _ in resets:
                        self.was_reset()
        except (OSError, QmpError) as error:
            log.warning("vm %s: its monitor does not tell of resets: %s", self.vm, error)

    def was_reset(self) -> None:
        """Told by whoever knows, such as QMP: the VM was reset.

        A trap that is pending is no more: its answer only lets the VM go on. The breakpoints
        stay armed, but for software breakpoints under KVM, which the reset overwrites.
        """
        self._void = self._pending is not None
        self._inspector.forget()

    async def _arm(self) -> str | None:
        """Set the breakpoints and let the VM run; why not, where the stub refuses."""
        packets = [
            commands.set_breakpoint(address, hardware=self._hardware) for address in self._points
        ]
        address = 0
        try:
            replies = await self._client.ask_all(packets)
            for address, reply in zip(self._points, replies, strict=True):  # noqa: B007
                commands.check_ok(reply)
            self._client.send(_CONTINUE)
        except (StubError, ReplyError) as error:
            return f"no breakpoint at {address:#x}: {error}"
        except ClientLostError:
            self._over.set()
        return None

    async def _detach(self) -> None:
        client = self._client
        if client.why_lost is not None or client.exited:
            return
        self._stopped = self._stopped or not self._shut_down
        client.on_stop = lambda _stop: None
        packets = [
            commands.remove_breakpoint(address, hardware=self._hardware) for address in self._points
        ]
        packets += self._memory.restore()
        if not self._paused:
            packets.append(commands.DETACH)
        try:
            # Where the VM runs, the first byte stops it. A vCPU may have met a breakpoint at that
            # moment: QEMU forgets that in its next turn, or it would stop for nobody after `D`.
            await client.ask_all([commands.select("p0.0")], head=commands.INTERRUPT)
            await client.ask_all(packets)
        except ClientLostError:
            return
        client.lose("detached")

    def _end(self) -> GuestEnd:
        why = self._client.why_lost
        ends = []
        for vcpu in sorted(self._threads.values()) or [0]:
            pending = self._pending is not None and self._pending.vcpu == vcpu
            if self._stopped:
                ends.append(VcpuEnd(vcpu, "stopped"))
            elif pending:
                ends.append(VcpuEnd(vcpu, "lost", f"{why}, with a trap that was not answered"))
            elif self._shut_down or self._client.exited or why == "it hung up":
                ends.append(VcpuEnd(vcpu, "halted", "QEMU has ended"))
            else:
                ends.append(VcpuEnd(vcpu, "lost", f"the stub is of no more use: {why}"))
        return GuestEnd(tuple(ends))

    # --- stops ---------------------------------------------------------------------

    def _on_stop(self, stop: Stop | Exit) -> None:
        if isinstance(stop, Exit):
            self._over.set()
            return
        if self._stepped is not None:
            self._stepped.set()
            return
        if stop.signal != commands.SIGTRAP:
            self._on_pause(stop)
            return
        if self._pending is not None:
            log.warning("vm %s: somebody else let it go on in a trap", self.vm)
            return
        self._paused = False
        self._client.post(_READ_REGISTERS, 1, partial(self._on_registers, stop))

    def _on_pause(self, stop: Stop) -> None:
        # QEMU's `replies to a stop` name the reason by a signal: SIGQUIT is a shutdown.
        if stop.signal == commands.SIGQUIT:
            self._shut_down = True
            self._paused = True
            self._over.set()
            return
        log.info("vm %s: paused by somebody else (signal %d)", self.vm, stop.signal)
        self._paused = True

    def _on_registers(self, stop: Stop, reply: bytes) -> None:
        layout = self._client.layout
        if self._client.why_lost is not None or self._over.is_set():
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
        self._pending, self._at, self._void = event, where, False
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
            return self._ud_handler
        return address if address in self._points else None

    def _start(self, task: Callable[[*Ts], Coroutine[None, None, None]], *arguments: *Ts) -> None:
        """Run a task in the run, unless that is over: it is the detaching that goes on then."""
        if self._tasks_of_run is not None and not self._over.is_set():
            self._tasks_of_run.start_soon(task, *arguments)

    async def _look(self, where: Where) -> None:
        try:
            found = await self._inspector.look(where, self._vcpu_of(where.stop))
            if found is None:
                await self._step_over(where.stop.thread, self._point(where))
            else:
                self._on_trap(*found)
        except ClientLostError:
            self._over.set()

    # --- answers -------------------------------------------------------------------

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer; never waits. Raises `BackendError` when the VM is gone."""
        if self._pending is not event:
            raise BackendError(_GONE)
        client = self._client
        if client.why_lost is not None:
            # It stays pending: nobody has answered this vCPU.
            raise BackendError(f"{_GONE}: {client.why_lost}")
        if writes is None and not self._void:
            self._go_on_natively()
            return
        self._pending = None
        if writes is None or self._void:
            client.send(_CONTINUE)
            return
        where = self._at
        if where.frame is None:
            data = client.layout.write(where.data, writes)
        else:
            data = client.layout.write_frame(where.data, writes, where.frame)
        packets = encode(commands.write_registers(data)) + _CONTINUE
        client.post(packets, 1, self._on_written, runs=True)
        client.receive_at_once()

    def _on_written(self, reply: bytes) -> None:
        if self._client.why_lost is None:
            try:
                commands.check_ok(reply)
            except StubError as error:
                raise ReplyError(f"it writes no registers: {error}") from error

    def _go_on_natively(self) -> None:
        self._pending = None
        self._start(self._step_over, self._at.stop.thread, self._point(self._at))

    async def _step_over(self, thread: str, point: int | None) -> None:
        client, hardware = self._client, self._hardware
        points = self._points if point is None else [point]
        away = [commands.remove_breakpoint(address, hardware=hardware) for address in points]
        again = [commands.set_breakpoint(address, hardware=hardware) for address in points]
        count = len(points)
        self._stepped = anyio.Event()
        try:
            packets = b"".join(map(encode, [*away, commands.step(thread)]))
            client.post(packets, count, self._on_written, runs=True)
            with anyio.fail_after(_DETACH):
                await self._stepped.wait()
            self._stepped = None
            packets = b"".join(map(encode, again)) + _CONTINUE
            client.post(packets, count, self._on_written, runs=True)
        except TimeoutError:
            client.lose("one instruction does not end")
            self._over.set()
        except ClientLostError:
            self._over.set()
        finally:
            self._stepped = None

    # --- memory --------------------------------------------------------------------

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """Asks the stub, in pieces that are sent ahead."""
        self._check_pending(event, address)
        return await self._memory.read_physical(address, size)

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """The same. Cancelled, a write of several pieces may be left in part."""
        self._check_pending(event, address)
        await self._memory.write_physical(address, data)

    def _check_pending(self, event: TrapEvent, address: int) -> None:
        # A byte that is sent while the VM runs would stop it.
        if self._pending is not event:
            raise GuestMemoryError(address, _GONE)
