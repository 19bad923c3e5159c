"""Guests in C that call by the device, and the QEMUs that they run in."""

from pathlib import Path

import anyio
from children import run_beside
from guest_builds import BARE, GUESTS, INCLUDE, STRICT, done, flat
from needs import needs
from served_machine import ServedMachine

from vmibridge import BridgeHandler, open_backend

LINUX = INCLUDE.parent / "linux"
RIGHT, WRONG = 33, 35
"""The statuses of QEMU: the guest ends it by isa-debug-exit."""
SLOTS = 8


def build_device_guest(
    folder: Path, name: str, *flags: str, width: int = 64, compiler: str = "gcc", **defines: object
) -> Path:
    """The image of a guest, for QEMU's `-kernel`."""
    linked = folder / f"{name}-{width}-{len(list(folder.iterdir()))}.elf"
    done(
        needs(compiler), "-std=c11", "-O2", *STRICT, *BARE, "-fno-pie", "-no-pie",
        *flags, f"-I{INCLUDE}", f"-I{LINUX}", f"-I{folder}", f"-m{width}",
        *(f"-D{define}={value}" for define, value in defines.items()),
        f"-Wl,-T,{INCLUDE}/flat.ld", "-o", linked, GUESTS / f"{name}.c",
    )  # fmt: skip
    return flat(linked)


def ivshmem(socket: Path) -> list[str]:
    """QEMU's options for the device."""
    return [
        *("-chardev", f"socket,path={socket},id=slots"),
        *("-device", f"ivshmem-doorbell,chardev=slots,vectors={SLOTS}"),
    ]


class DeviceMachine(ServedMachine):
    """A QEMU with the device, and its host."""

    def __init__(self, qemu: str, folder: Path, options: str = "") -> None:
        super().__init__()
        self.qemu, self.socket = qemu, folder / "s"
        self.spec = f"ivshmem:unix:{self.socket}?slots={SLOTS}{options}"

    def command(
        self, image: Path, *extra: str, machine: str = "q35", device: bool = True
    ) -> list[str]:
        return [
            *(self.qemu, "-accel", "tcg", "-M", machine, "-m", "64", "-nodefaults"),
            *("-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(image)),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4", *extra),
            *(ivshmem(self.socket) if device else ()),
        ]

    async def run(
        self,
        handler: BridgeHandler,
        image: Path,
        *extra: str,
        machine: str = "q35",
        stop: anyio.Event | None = None,
    ) -> tuple[int, str]:
        """Run the guest to its end: its status, and what it said. The host stops after `stop`."""
        async with (
            open_backend(self.spec) as backend,
            self.served(backend, handler) as server,
            anyio.create_task_group() as tasks,
        ):

            async def stop_then() -> None:
                assert stop is not None
                await stop.wait()
                server.stop()

            if stop is not None:
                tasks.start_soon(stop_then)
            ended = await run_beside(self.command(image, *extra, machine=machine))
            if not self.events:
                server.stop()  # nobody may have connected
            tasks.cancel_scope.cancel()
        return ended.returncode, ended.stdout.decode().strip()
