"""A Linux guest in which vmib is: a script runs it, and the test reads what came of each run."""

import sys
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import NamedTuple

import anyio
from children import run, run_beside
from device_guests import CARRIERS, SLOTS
from linux_guest import LIMIT, Boot, LinuxGuest, booted, built_guest

from vmibridge import Bridge, BridgeServer, Outcome, open_backend
from vmibridge.handlers.files import Files

WIDTHS = {"x64": "vmib", "x86": "vmib-x86"}
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /tmp/work
cd /tmp/work
# told LABEL COMMAND...: runs it, and tells its status and what it printed, in one line. A process
# is a hundredth of a second here, so none is started for that.
told() {
    label=$1
    shift
    "$@" >/tmp/told 2>&1
    text="vmibridge: $label $? "
    while IFS= read -r line || [ -n "$line" ]; do text="$text$line;"; done </tmp/told
    echo "$text"
}
hash() { sha256sum <"$1"; }
"""
LAST = """
echo "vmibridge: done 0"
stty sane
poweroff -f
"""


class Told(NamedTuple):
    """What came of one run."""

    status: int
    text: str


def built_tools(folder: Path, *options: str) -> Path:
    """The folder with what `vmibridge guest tools` makes."""
    command = [sys.executable, "-m", "vmibridge", "guest", "tools", "-o", folder, *options]
    run(command, check=True, seconds=300)
    return folder


def noise(size: int) -> bytes:
    return Random(size).randbytes(size)


def files_in(folder, **settings):
    return Files(Files.Settings(folder=str(folder), sync=False, **settings))


def contents(folder):
    """All files that are there, by name: also what begins with a dot."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class VmibGuest:
    """Boots guests with vmib for x64 and for x86."""

    def __init__(self, qemu: str, plugin: Path | None, tools: Path, place: Path) -> None:
        self.base = built_guest()
        self.tools = tools
        self.folder = place / "linux"
        self.folder.mkdir()
        (self.folder / "vmlinuz").symlink_to(self.base / "vmlinuz")
        self.linux = LinuxGuest(qemu, plugin, self.folder, place)
        self.outcomes: list[Outcome] = []
        """Of the last boot with a host."""

    def pack(self, script: str) -> None:
        """Make the initramfs whose first process is this script."""
        (self.folder / "init").write_text(f"{INIT}{script}{LAST}")
        files = {"init": self.folder / "init", "bin/busybox": self.base / "busybox"}
        files |= {f"bin/{name}": self.tools / name for name in WIDTHS.values()}
        pairs = [f"{name}={path}" for name, path in files.items()]
        packer = "vmibridge.backends.qemu.initramfs"
        run([sys.executable, "-m", packer, self.folder / "initrd", *pairs], check=True)

    async def boot(self, script: str, bridge: Bridge, **options: int | str) -> dict[str, Told]:
        """Run a script with this host; what came of each `told`, by its label."""
        self.pack(script)
        with anyio.fail_after(LIMIT):
            boot = await self.linux.boot("", bridge, **options)
        self.outcomes = boot.outcomes
        return told_by(boot)

    async def boot_by_device(
        self, script: str, bridge: Bridge, carrier: str, **options: int | str
    ) -> dict[str, Told]:
        """The same without the plugin: with the device, and its driver as /vmibridge.ko."""
        self.pack(script)
        # Linux unpacks one archive after the other. The driver is in that of the whole guest.
        own = self.folder / "initrd"
        own.write_bytes((self.base / "initrd").read_bytes() + own.read_bytes())
        socket, self.outcomes = self.linux.place / "s", []
        command = self.linux.command("", "-M", "q35", *CARRIERS[carrier](socket, SLOTS), **options)
        async with open_backend(f"{carrier}:unix:{socket}?slots={SLOTS}") as backend:
            server = BridgeServer(backend, bridge, timeout=30)

            async def consume() -> None:
                async for outcome in server.run():
                    self.outcomes.append(outcome)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                with anyio.fail_after(LIMIT):
                    done = await run_beside(command)
                server.stop()
        return told_by(booted(done.returncode, done.stdout))

    async def boot_alone(self, script: str) -> dict[str, Told]:
        """The same without the plugin."""
        self.pack(script)
        with anyio.fail_after(LIMIT):
            boot = await self.linux.boot_alone("")
        return told_by(boot)


def hashed(data: bytes) -> Told:
    """What `told LABEL hash FILE` tells."""
    return Told(0, f"{sha256(data).hexdigest()}  -")


def told_by(boot: Boot) -> dict[str, Told]:
    found = {}
    for line in boot.lines:
        label, status, *text = line.split(" ", 2)
        assert label not in found, f"told twice: {line}"
        found[label] = Told(int(status), "".join(text).rstrip(";"))
    assert found.pop("done", None), f"the script did not end: {boot.lines}"
    return found
