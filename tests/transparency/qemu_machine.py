"""Programs in QEMU: one VM for all, whose guest asks for the next program (loader.asm).

A program that does not end, or ends the VM, costs that VM; the next program gets another.
"""

import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import anyio

from transparency import layout
from transparency.host import NOTHING, Sink, compare_memory, compare_result, compare_trap, writes_of
from transparency.program import Linked
from vmibridge import open_backend
from vmibridge.backends.qemu.process import QemuProcess
from vmibridge.vm.backend import Backend
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

LOST = "it does not end, or ends the VM"
CAUGHT = (TimeoutError, anyio.EndOfStream)
_FILTER = TrapFilter(frozenset({layout.MAGIC, layout.LOADER_MAGIC}))
_MACHINE = ("-m", "32", "-nodefaults", "-display", "none", "-no-reboot")
_EXIT = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")


class QemuMachine:
    """Runs programs one after the other. Derived classes start QEMU and its backend."""

    timeout = 60.0
    """Seconds for a program, in a guest that does nothing else."""

    def __init__(self, qemu: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.socket = self.folder / "s"
        image, self._behind = layout.loader()
        self._image = self.folder / "loader"
        self._image.write_bytes(image)
        self.command = [
            qemu, "-accel", "tcg", *_MACHINE, *_EXIT, "-kernel", str(self._image)
        ]  # fmt: skip
        self._vm: AsyncExitStack | None = None
        self._waits: TrapEvent | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()
        self._folder.cleanup()

    async def connect(self, stack: AsyncExitStack, serve: Callable[[Backend], None]) -> None:
        """Start QEMU, open its backend, and give it to `serve`, in the order that it takes."""
        raise NotImplementedError

    async def _start(self) -> None:
        self._sink = Sink()
        async with AsyncExitStack() as stack:
            stack.callback(self._sink.close)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)

            def serve(backend: Backend) -> None:
                self.backend = backend
                tasks.start_soon(self._serve)

            await self.connect(stack, serve)
            with anyio.fail_after(60):
                self._waits = await self._sink.events.receive()
            assert self._is_loader(self._waits), self._waits
            self._vm = stack.pop_all()

    async def _serve(self) -> None:
        await self.backend.run(_FILTER, self._sink)
        self._sink.end()

    async def _end(self) -> None:
        vm, self._vm, self._waits = self._vm, None, None
        if vm is not None:
            # It may be in a trap, or in a loop, and would not end when asked.
            if self.process.process.returncode is None:
                self.process.process.kill()
            await vm.aclose()

    def _is_loader(self, event: TrapEvent) -> bool:
        return event.registers.rcx == layout.LOADER_MAGIC and event.ring == 0

    async def run(self, linked: Linked) -> list[str]:
        """What is different from the reference."""
        if self._vm is None:
            await self._start()
        differences = await self.exchange(linked)
        if differences:
            # What went wrong may have left something behind.
            await self._end()
        return differences

    async def exchange(self, linked: Linked) -> list[str]:
        """Load the program for the guest, and take its traps until it asks for the next."""
        differences: list[str] = []
        try:
            await self._load(linked)
            with anyio.fail_after(self.timeout):
                await self._take_traps(linked, differences)
            await self._compare(linked, differences)
        except CAUGHT:
            differences.append(LOST)
        return differences

    async def _load(self, linked: Linked) -> None:
        event, backend = self._waits, self.backend
        end = layout.LOG
        await backend.write_physical(event, layout.TABLE_A, linked.part(layout.TABLE_A, end))
        await backend.write_physical(
            event, layout.CODE, linked.part(layout.CODE, layout.MEMORY_END)
        )
        self._waits = None
        await backend.resume(event, RegisterWrites(self._behind, rax=1))

    async def _take_traps(self, linked: Linked, differences: list[str]) -> None:
        shown, number = linked.expected.shown, 0
        while True:
            event = await self._sink.events.receive()
            if self._is_loader(event):
                self._waits = event
                break
            must = shown[number] if number < len(shown) else None
            differences.extend(compare_trap(number, event, must))
            plan = linked.answers[number] if number < len(linked.answers) else NOTHING
            number += 1
            for address, data in plan.writes:
                await self.backend.write_physical(event, address, data)
            await self.backend.resume(event, writes_of(event, plan))
        if number < len(shown):
            differences.append(f"trap {number} ({shown[number].reason}) is missing")

    async def _compare(self, linked: Linked, differences: list[str]) -> None:
        read, event = self.backend.read_physical, self._waits
        state = await read(event, layout.STATE, layout.RESULT + layout.RESULT_SIZE - layout.STATE)
        differences.extend(compare_result(linked, bytes(state)))
        if linked.has_patches:
            code = await read(event, layout.CODE, layout.MEMORY_END - layout.CODE)
            differences.extend(compare_memory(linked, layout.CODE, bytes(code)))


class PluginMachine(QemuMachine):
    """With the plugin."""

    def __init__(self, qemu: str, plugin: Path, options: str = "") -> None:
        super().__init__(qemu)
        self.command += ["-plugin", f"file={plugin},socket={self.socket}{options}"]

    async def connect(self, stack: AsyncExitStack, serve: Callable[[Backend], None]) -> None:
        backend = await stack.enter_async_context(open_backend(f"qemu-plugin:unix:{self.socket}"))
        # The plugin connects before QEMU has a monitor.
        serve(backend)
        self.process = await stack.enter_async_context(QemuProcess(self.command))
