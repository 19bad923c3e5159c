"""`vmibridge qemu build-plugin`: the TCG plugin, compiled here."""

import sys
from pathlib import Path

from vmibridge.backend.qemu_plugin.build import build_plugin
from vmibridge.text import printable


def build(target: Path, compiler: str | None) -> int:
    """Compile it and print its path; returns the exit status. Raises `BackendError`."""
    sys.stdout.write(f"{printable(str(build_plugin(target, compiler)))}\n")
    return 0
