"""Boots the Linux guest, with a host or without, for the tests that need a whole system."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import pytest
from children import opened, run, run_beside
from needs import may_skip

from vmibridge import Bridge, BridgeHandler, BridgeServer, Outcome, open_backend
from vmibridge.config import load_handlers
from vmibridge.engine.summary import Summary

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "guest/linux"
FOLDER = ROOT / ".linux"
LIMIT = 900
"""Seconds within which a guest has come up and gone down, on a machine that is busy with other
work: on a quiet one it takes ten."""


def built_guest() -> Path:
    """The folder with kernel and initramfs. Where they may be missing, the test is skipped."""
    if not (FOLDER / "release").exists():
        if may_skip():
            pytest.skip("no Linux guest: run `make linux`")
        run([SOURCES / "fetch-linux"], check=True, seconds=600)
    run([SOURCES / "build-guest"], check=True, seconds=300)
    return FOLDER


def exchange() -> BridgeHandler:
    """The handler that the guest's programs call."""
    (handler,) = load_handlers([str(SOURCES / "exchange.py")])
    return handler


@dataclass
class Boot:
    """What a guest said, and what the host saw of it."""

    status: int
    lines: list[str]
    """Those of the guest's own programs, without what they begin with."""
    outcomes: list[Outcome] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)

    @property
    def ends(self) -> list[tuple[int, str]]:
        return [(end.vcpu, end.reason) for end in self.summary.guest.vcpus]


@dataclass
class LinuxGuest:
    """A guest that comes up, does `what`, and goes down."""

    qemu: str
    plugin: Path
    folder: Path
    place: Path
    """Where its socket may be."""

    def command(
        self,
        what: str,
        *extra: str,
        cpus: int = 1,
        count: int = 100,
        model: str = "qemu64",
        kernel: str = "",
    ) -> list[str]:
        options = (
            f"-accel tcg -M pc -m 256 -cpu {model} -smp {cpus} -nodefaults -display none -no-reboot"
        )
        kernel = (
            f"console=ttyS0 quiet panic=-1 no_timer_check vmibridge={what} count={count} {kernel}"
        )
        return [
            *(self.qemu, *options.split(), "-serial", "stdio", *extra),
            *("-kernel", str(self.folder / "vmlinuz"), "-initrd", str(self.folder / "initrd")),
            *("-append", kernel),
        ]

    async def boot_alone(self, what: str, **options: int | str) -> Boot:
        """Without the plugin."""
        done = await run_beside(self.command(what, **options))
        return booted(done.returncode, done.stdout)

    async def boot(
        self, what: str, handler: BridgeHandler, settings: dict | None = None, **options: int | str
    ) -> Boot:
        """With the plugin, and a host that has this handler."""
        socket = self.place / "s"
        arms = ("-plugin", f"file={self.plugin},socket={socket}")
        outcomes = []
        async with open_backend(f"qemu-plugin:unix:{socket}") as backend:
            server = BridgeServer(backend, Bridge(handler), timeout=30, **settings or {})

            async def consume():
                async for outcome in server.run():
                    outcomes.append(outcome)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                command = self.command(what, *arms, **options)
                done = await run_beside(command)
                if done.returncode:
                    server.stop()  # there may have been no vCPU, for which it would wait
        return booted(done.returncode, done.stdout, outcomes, server.summary)

    async def boot_with_breakpoints(
        self, what: str, handler: BridgeHandler, sites: Iterable[int], **options: int | str
    ) -> Boot:
        """With a host at QEMU's gdbstub: CPUID at these addresses, and all hypercalls, which
        come by the kernel's handler of undefined instructions. It is where it always is."""
        guest = replace(self, folder=built_guest())
        symbols = (await guest.boot_alone("symbols", kernel="nokaslr")).lines
        (address,) = [line.split()[0] for line in symbols if "asm_exc_invalid_op" in line]
        where = "&".join([f"ud-handler=0x{address}", *(f"site={site:#x}" for site in sites)])
        stub = self.place / "gdb"
        arms = ("-S", "-gdb", f"unix:{stub},server=on,wait=off")
        outcomes, said = [], b""
        async with opened(self.command(what, *arms, **options, kernel="nokaslr")) as process:
            while not stub.exists():  # QEMU does not say when it listens
                await anyio.sleep(0.01)
            async with open_backend(f"qemu-gdb:unix:{stub}?{where}") as backend:
                server = BridgeServer(backend, Bridge(handler), timeout=30)
                async for outcome in server.run():
                    outcomes.append(outcome)
            async for part in process.stdout:
                said += part
            await process.wait()
        return booted(process.returncode, said, outcomes, server.summary)


def booted(status: int, output: bytes, *seen: list[Outcome] | Summary) -> Boot:
    """What came of a boot. A guest that ended well without a word panicked: that is shown."""
    lines = told(output)
    assert status or lines, f"the guest's programs said nothing:\n{output.decode(errors='replace')}"
    return Boot(status, lines, *seen)


def told(output: bytes) -> list[str]:
    """The lines of the guest's own programs on its serial line."""
    lines = output.decode(errors="replace").splitlines()
    return [line.partition("vmibridge: ")[2] for line in lines if line.startswith("vmibridge: ")]
