"""`vmibridge qemu build-plugin`: the TCG plugin, compiled here."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmibridge.cli.options import Output
from vmibridge.text import printable


def build_qemu_plugin(
    *,
    output: Output = Path("vmibridge-plugin.so"),
    cc: Annotated[
        str | None, Parameter(help="The C compiler; cc, gcc or clang by default.")
    ] = None,
) -> int:
    """Compile the TCG plugin for QEMU 11.1 and later; needs a C compiler alone.

    Exit status: 0 when it was built, 1 when there is no compiler or it failed.

    Example: vmibridge qemu build-plugin -o vmibridge-plugin.so
    """
    from vmibridge.backends.qemu.plugin.build import build_plugin

    sys.stdout.write(f"{printable(str(build_plugin(output, cc)))}\n")
    return 0
