"""A QEMU by its gdbstub: breakpoints on trap instructions, under TCG or KVM.

    qemu-gdb:unix:/run/gdb.sock?site=0x401136
    qemu-gdb:tcp:localhost:1234?elf=vmlinux&symbol=call_host&ud-handler=0xffffffff81e00b10

- What happens from a stop to an answer is in `stops`; here is the life around.
- Connecting pauses the VM; the breakpoints are set when it is run.
- On the way out the VM is left as the option `leave` says (`leaving`), and the guest runs on; a VM
  that another client paused stays paused.
"""

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import anyio
import msgspec

from vmibridge.aio import sockets
from vmibridge.aio.listening import fail_after_listening
from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import (
    CLOSED,
    ClientLostError,
    GdbClient,
    connect,
    reading,
)
from vmibridge.backends.qemu.gdb.commands import PROBE, ReplyError, StubError
from vmibridge.backends.qemu.gdb.inspection import Inspector
from vmibridge.backends.qemu.gdb.leaving import check_status, restore_sites, skip_sites
from vmibridge.backends.qemu.gdb.memory import QemuMemory
from vmibridge.backends.qemu.gdb.monitor import ACCELERATOR, STATUS
from vmibridge.backends.qemu.gdb.options import MAX_HARDWARE, QemuGdbOptions, parse_spec
from vmibridge.backends.qemu.gdb.stop_log import StopLog
from vmibridge.backends.qemu.gdb.stops import CONTINUE, GONE, Stops
from vmibridge.backends.qemu.qmp import Qmp
from vmibridge.backends.qemu.ram import SharedRam, open_ram
from vmibridge.errors import BackendError, GuestMemoryError, QmpError
from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

log: logging.Logger = logging.getLogger(__name__)

_CONNECT = 10.0
_REFUSES = 1.0
_DETACH = 5.0
"""Seconds."""


class _Status(msgspec.Struct):
    status: str


class QemuGdbBackend(Backend):
    """One QEMU. Raises `BackendSpecError` if an option is out of range."""

    def __init__(
        self, where: str, options: QemuGdbOptions, sites: Sequence[int], vm: str = "vm"
    ) -> None:
        super().__init__(vm)
        self.where = where
        self.options = options
        self.sites: tuple[int, ...] = tuple(sites)
        self._ud_handler = options.ud_handler
        self._points = [*self.sites]
        if options.ud_handler is not None and options.ud_handler not in self._points:
            self._points.append(options.ud_handler)
        self._client: GdbClient
        self._memory: QemuMemory
        self._threads: dict[str, int] = {}
        self._hardware = False
        self._inspector: Inspector
        self._stops: Stops
        self._started = False
        self._prelaunch = False
        self._theirs = False
        """Another client had paused the VM before this host came."""
        self._over = anyio.Event()
        self._stopped = False
        self._ram: SharedRam | None = None
        self._stop_log: StopLog | None = None
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
            with fail_after_listening(_CONNECT + self.options.within):
                connection = await self._connect()
        except TimeoutError as error:
            raise BackendError(f"{spec}: no answer") from error
        except OSError as error:
            raise BackendError(f"{spec}: {error.strerror or error}") from error
        self._client = GdbClient(connection)
        try:
            if self.options.ram:
                self._ram = open_ram(self.options.ram)
            if self.options.stop_log:
                self._stop_log = StopLog(self.options.stop_log)
            async with reading(self._client):
                await self._get_ready()
        except BackendError as error:
            self._client.close()
            raise BackendError(f"{spec}: {error}") from error
        except BaseException:
            self._client.close()
            raise

    async def _was_paused(self) -> bool:
        """Whether another client has paused the VM; without a monitor that is not known."""
        if not self.options.qmp:
            return False
        try:
            async with Qmp(await sockets.connect(socket.AF_UNIX, self.options.qmp)) as qmp:
                return (await qmp.execute("query-status", _Status)).status == "paused"
        except (OSError, QmpError):
            return False

    async def _connect(self) -> socket.socket:
        """QEMU makes its socket a moment before it listens, and may itself come later."""
        within, is_told = self.options.within, False
        until = anyio.current_time() + max(_REFUSES, within)
        while True:
            try:
                # Connecting pauses the VM, so who has paused it is not to be seen afterwards.
                self._theirs = await self._was_paused()
                return await connect(self.where)
            except (ConnectionRefusedError, FileNotFoundError) as error:
                may_come = within or isinstance(error, ConnectionRefusedError)
                if not may_come or anyio.current_time() >= until:
                    raise
            if within and not is_told:
                is_told = True
                log.info("vm %s: waiting for QEMU at %s, for %g s", self.vm, self.where, within)
            await anyio.sleep(0.02)

    async def _get_ready(self) -> None:
        client = self._client
        await client.shake_hands()
        memory = self._memory = QemuMemory(client, self._ram)
        self._inspector = Inspector(
            *(self.vm, memory, self._monitor, self._points, self._ud_handler), client.layout
        )
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
        status = await self._monitor(STATUS)
        check_status(self.vm, status)
        self._prelaunch = "prelaunch" in status
        if not self._prelaunch:
            await restore_sites(client, memory, self.sites, self._threads)
        chosen = self.options.breakpoints
        self._hardware = uses_kvm if chosen == "auto" else chosen == "hardware"
        if self._hardware and len(self._points) > MAX_HARDWARE:
            raise BackendError(
                f"{len(self._points)} sites, and a vCPU has {MAX_HARDWARE} hardware breakpoints"
            )
        if uses_kvm and not self._hardware:
            await self._save_code()
        if self._stop_log is not None:
            for command in self._stop_log.commands:
                if said := (await self._monitor(command)).strip():
                    raise BackendError(f"stop-log: QEMU's monitor says {said!r} to {command!r}")
        self._stops = Stops(
            *(self.vm, client, memory, self._inspector),
            threads=self._threads,
            hardware=self._hardware,
            steps_exactly=not uses_kvm,
            stop_log=self._stop_log,
            over=self._over,
        )

    async def _monitor(self, command: str) -> str:
        try:
            return await self._client.monitor(command)
        except (StubError, ReplyError):
            return ""

    async def _save_code(self) -> None:
        # KVM's software breakpoints are a byte in the guest's memory.
        for address in self._points:
            code = await self._memory.read_code(address, MAX_INSTRUCTION)
            traps = address == self._ud_handler or decode_trap(code, 64) or decode_trap(code, 32)
            if not code or not traps:
                raise BackendError(
                    f"the code at {address:#x} is not there yet, and with KVM a software breakpoint"
                    " changes memory: use breakpoints=hardware, or connect when the guest runs"
                )
            self._inspector.saved[address] = code

    async def close(self) -> None:
        """Leave a VM that was never run: it goes on, unless it had not begun."""
        if self._ram is not None:
            self._ram.close()
        if self._stop_log is not None:
            self._stop_log.close()
        if not self._started and self._client.why_lost is None:
            with suppress(TimeoutError), fail_after_listening(_DETACH):
                async with reading(self._client):
                    if self.options.leave == "wait":
                        await self._set_breakpoints()
                    self._stops.paused = self._theirs or self._prelaunch
                    await self._detach()
        self._client.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Set the breakpoints and run the guest until QEMU ends."""
        self._started = True
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
                self._stops.lose()

            async def arm() -> None:
                nonlocal refused
                # From its first trap on a reset of the guest has to be known.
                await watched.wait()
                refused = await self._arm()
                if refused is not None:
                    self._over.set()

            watched = anyio.Event()
            readers.start_soon(read)
            readers.start_soon(self._watch_monitor, watched)
            try:
                async with anyio.create_task_group() as tasks:
                    self._stops.begin(traps, sink, tasks)
                    tasks.start_soon(arm)
                    tasks.start_soon(self._stops.watch_stop_log)
                    await self._over.wait()
                    tasks.cancel_scope.cancel()
            finally:
                self._stops.end()
                self._watching.cancel()
                with (
                    anyio.CancelScope(shield=True),
                    suppress(TimeoutError),
                    fail_after_listening(_DETACH),
                ):
                    await self._detach()
                shield.cancel()
        if refused is not None:
            raise BackendError(f"qemu-gdb:{self.where}: {refused}")
        self._check_sites()
        return self._end()

    def _check_sites(self) -> None:
        """Raises `BackendError` for a site that a guest which has ended met, and never as a trap.

        In another program its address may hold something else; so may those of a file of sites,
        which are of several programs, and count together.
        """
        trapped, others = self._inspector.trapped, self._inspector.others
        never = [at for at in others if at not in trapped]
        wrong = [at for at in never if at in self.options.site or not trapped]
        if wrong and not self._stopped:
            found = others[wrong[0]].hex(" ") or "nothing that can be read"
            raise BackendError(
                f"qemu-gdb:{self.where}: site={wrong[0]:#x} held no CPUID, VMCALL or VMMCALL when"
                f" the guest came there, but {found}; name the address of the instruction itself"
            )
        if not trapped and self.sites:
            log.warning("vm %s: the guest came to none of the sites", self.vm)

    def stop(self) -> None:
        """Remove the breakpoints and leave the VM, which runs on."""
        self._stopped = True
        self._over.set()

    async def _watch_monitor(self, watched: anyio.Event) -> None:
        try:
            with self._watching:
                if self.options.qmp:
                    async with (
                        Qmp(await sockets.connect(socket.AF_UNIX, self.options.qmp)) as qmp,
                        qmp.events("RESET") as resets,
                    ):
                        watched.set()
                        async for _ in resets:
                            self.was_reset()
        except (OSError, QmpError) as error:
            log.warning("vm %s: its monitor does not report resets: %s", self.vm, error)
        finally:
            watched.set()

    def was_reset(self) -> None:
        """Called when the VM was reset, as QMP reports it.

        A trap that is pending is no more: its answer only lets the VM go on. The breakpoints
        stay armed, but for software breakpoints under KVM, which the reset overwrites.
        """
        self._stops.was_reset()

    async def _arm(self) -> str | None:
        """Set the breakpoints and let the VM run; why not, where the stub refuses."""
        if (refused := await self._set_breakpoints()) is not None:
            return refused
        try:
            # If a probe has met a VM that ran, they have let it go on since.
            if self._theirs and not self._client.interfered:
                self._stops.leave_paused()
            else:
                await self._client.ask_all([PROBE], probe=True, tail=CONTINUE)
        except ClientLostError:
            self._over.set()
        return None

    async def _set_breakpoints(self) -> str | None:
        packets = [
            commands.set_breakpoint(address, hardware=self._hardware) for address in self._points
        ]
        address = 0
        try:
            replies = await self._client.ask_all(packets, probe=True)
            for address, reply in zip(self._points, replies, strict=True):  # noqa: B007
                commands.check_ok(reply)
        except (StubError, ReplyError) as error:
            return f"no breakpoint at {address:#x}: {error}"
        except ClientLostError:
            self._over.set()
        return None

    async def _detach(self) -> None:
        client = self._client
        if client.why_lost is not None or client.exited:
            return
        self._stopped = self._stopped or not (self._stops.shut_down or self._stops.crashed)
        leave, paused = self.options.leave, self._stops.paused
        away = [
            commands.remove_breakpoint(address, hardware=self._hardware) for address in self._points
        ]
        try:
            # Where the VM runs, the first byte stops it. A vCPU may have met a breakpoint at that
            # moment: QEMU forgets that in its next turn, or it would stop with no client after `D`.
            await client.ask_all([commands.select("p0.0")], head=commands.INTERRUPT)
            if leave == "wait":
                tail = b"" if paused else CONTINUE
                await client.ask_all([PROBE, *self._memory.virtual()], tail=tail)
            else:
                await client.ask_all(away, probe=True)
                if leave == "skip" and not self._prelaunch_still():
                    await skip_sites(self.vm, client, self._memory, self.sites, self._threads)
                last = [*self._memory.virtual(), *([] if paused else [commands.DETACH])]
                if last:
                    await client.ask_all(last, probe=True)
        except ClientLostError:
            return
        client.lose("detached")

    def _prelaunch_still(self) -> bool:
        return self._prelaunch and not self._started

    def _end(self) -> GuestEnd:
        why, event = self._client.why_lost, self._stops.pending
        ends = []
        for vcpu in sorted(self._threads.values()) or [0]:
            pending = event is not None and event.vcpu == vcpu
            if self._stops.crashed:
                ends.append(VcpuEnd(vcpu, "crashed", "QEMU cannot run it: an internal error"))
            elif self._stopped:
                ends.append(VcpuEnd(vcpu, "stopped"))
            elif pending:
                ends.append(VcpuEnd(vcpu, "lost", f"{why}, with a trap that was not answered"))
            elif self._stops.shut_down or self._client.exited or why == CLOSED:
                ends.append(VcpuEnd(vcpu, "halted", "QEMU has ended"))
            else:
                ends.append(VcpuEnd(vcpu, "lost", f"lost the connection to the stub: {why}"))
        return GuestEnd(tuple(ends))

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer; never waits. Raises `BackendError` when the VM is gone."""
        self._stops.resume(event, writes)

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
        if self._stops.pending is not event:
            raise GuestMemoryError(address, GONE)
