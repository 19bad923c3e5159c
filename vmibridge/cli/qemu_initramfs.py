"""`vmibridge qemu initramfs`: programs into what a Linux kernel starts from."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmibridge.cli.options import Output
from vmibridge.errors import ConfigError, VmiBridgeError
from vmibridge.files import reason, replaceable, write_whole
from vmibridge.guest_files import guest_file
from vmibridge.text import printable


def make_initramfs(
    programs: Annotated[list[Path], Parameter(help="Programs for Linux on x86, to run in order.")],
    /,
    *,
    output: Output,
) -> int:
    """Pack programs into an initramfs, which runs them in order and powers off.

    Give it to a Linux kernel with -initrd. What the programs print is on the console. A dynamic
    program has its libraries beside it. The last line is "vmibridge: all right", or "vmibridge:
    WRONG" when a program ended with another status than 0.

    Exit status: 0 when it was made, 1 when it cannot be written, 2 for wrong usage.

    Example: vmibridge qemu initramfs ./hello -o initrd
    """
    from vmibridge.backends.qemu.initramfs import files_to_run, packed

    files = files_to_run(programs, guest_file("init/init"))
    if output.exists() and any(output.samefile(program) for program in programs):
        raise ConfigError(f"{output}: is one of the programs; name another file with -o")
    try:
        write_whole(replaceable(output), b"".join(packed(files)))
    except OSError as error:
        why = reason(error, output)
        raise VmiBridgeError(f"{output}: cannot be written: {why}") from error
    sys.stdout.write(f"{printable(str(output))}\n")
    return 0
