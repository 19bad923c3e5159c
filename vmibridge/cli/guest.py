"""`vmibridge guest include-path`: where the headers of guests are."""

import sys

from vmibridge.guest_files import guest_file
from vmibridge.text import printable


def include_path() -> int:
    """Print the folder of the headers: bridge.inc for nasm, vmibridge.h for C.

    Example: nasm -f bin -I "$(vmibridge guest include-path)/" guest.asm -o guest.bin
    """
    sys.stdout.write(f"{printable(str(guest_file('include')))}\n")
    return 0
