"""Programs in QEMU by its gdbstub: a host of its own for each, which knows where its traps are.

Between hosts the loader polls: its VMCALL is #UD, and it asks again.
"""

from contextlib import AsyncExitStack

import anyio

from transparency.host import Sink
from transparency.program import Linked
from transparency.qemu_machine import CAUGHT, LOST, QemuMachine
from vmibridge import open_backend
from vmibridge.backends.qemu.process import QemuProcess
from vmibridge.errors import BackendError


class GdbMachine(QemuMachine):
    """With a breakpoint at each trap that the reference has seen."""

    def __init__(self, qemu: str) -> None:
        super().__init__(qemu)
        self.command += ["-S", "-gdb", f"unix:{self.socket},server=on,wait=off"]

    async def start(self) -> None:
        """QEMU; its hosts come later."""
        async with AsyncExitStack() as stack:
            self.socket.unlink(missing_ok=True)
            self.process = await stack.enter_async_context(QemuProcess(self.command))
            self._vm = stack.pop_all()

    async def run(self, linked: Linked) -> list[str]:
        if self._vm is None:
            await self.start()
        start, loader = linked.start, self._behind - 3
        base = 0 if start.width == 64 else start.base
        traps = {base + shown.ip & 0xFFFF_FFFF for shown in linked.expected.shown}
        sites = "&".join(f"site={address:#x}" for address in (loader, *sorted(traps)))
        differences: list[str] = []
        try:
            async with open_backend(f"qemu-gdb:unix:{self.socket}?{sites}") as self.backend:
                self._sink = Sink()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._serve)
                    try:
                        with anyio.fail_after(self.timeout):
                            self._waits = await self._sink.events.receive()
                        differences = await self.exchange(linked)
                        if self._waits is not None:
                            await self.backend.resume(self._waits, None)
                        self.backend.stop()
                    finally:
                        tasks.cancel_scope.cancel()
                self._sink.close()
        except* (*CAUGHT, BackendError) as errors:
            differences.append(f"{LOST}: {errors.exceptions[0]!r}")
        if differences:
            await self._end()
        return differences
