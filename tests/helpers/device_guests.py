"""Guests in C that call by the device, and the QEMUs that they run in."""

import json
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


def ivshmem(socket: Path, slots: int = SLOTS) -> list[str]:
    """QEMU's options for the device."""
    return [
        *("-chardev", f"socket,path={socket},id=slots"),
        *("-device", f"ivshmem-doorbell,chardev=slots,vectors={slots}"),
    ]


def vfio_user(socket: Path, _slots: int = SLOTS) -> list[str]:
    """The same for vfio-user, which says itself how many slots there are."""
    where = {"path": str(socket), "type": "unix"}
    return ["-device", json.dumps({"driver": "vfio-user-pci", "rombar": 0, "socket": where})]


CARRIERS = {"ivshmem": ivshmem, "vfio-user": vfio_user}


def shared_memory(file: Path, megabytes: int, machine: str) -> list[str]:
    """QEMU's options for memory that the host reaches."""
    backend = f"memory-backend-file,id=ram,size={megabytes}M,mem-path={file},share=on"
    if not file.name:
        backend = f"memory-backend-memfd,id=ram,size={megabytes}M,share=on"
    return ["-object", backend, "-M", f"{machine},memory-backend=ram"]


class CallingMachine(ServedMachine):
    """A QEMU with the device, and its host. Its memory is shared if slots are the kernel's."""

    def __init__(
        self,
        qemu: str,
        folder: Path,
        carrier: str = "ivshmem",
        kernel: int = 0,
        accel: str = "tcg",
    ) -> None:
        super().__init__()
        self.qemu, self.carrier, self.kernel, self.accel = qemu, carrier, kernel, accel
        self.socket, self.file = folder / "s", folder / "ram"
        self.spec = f"{carrier}:unix:{self.socket}?slots={SLOTS}&kernel={kernel}"
        if carrier == "ivshmem" and kernel:
            self.spec += f"&memory={self.file}"

    def command(
        self, image: Path, *extra: str, machine: str = "q35", device: bool = True
    ) -> list[str]:
        memory = ["-M", machine]
        if self.kernel:
            file = self.file if self.carrier == "ivshmem" else Path()
            memory = shared_memory(file, 64, machine)
        return [
            *(self.qemu, "-accel", self.accel, *memory, "-m", "64", "-nodefaults"),
            *("-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(image)),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4", *extra),
            *(CARRIERS[self.carrier](self.socket) if device else ()),
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
