"""Packs files into an initramfs: initramfs.py OUT PATH-IN-GUEST=FILE...

The format is "newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. The
same files give the same bytes: times, numbers and owners are not taken over. Every file can be
executed, and there are /proc, /dev/console and /dev/null.
"""

import stat
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

DEVICES = {"dev/console": (5, 1), "dev/null": (1, 3)}
"""Character devices, by major and minor number."""


def entry(
    name: str, number: int, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    """One member of the archive: a header in hex, its name with a NUL, and its data."""
    path = name.encode() + b"\0"
    links = 1
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(head + path) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def members(files: dict[str, Path]) -> Iterator[bytes]:
    """All members: folders before what is in them, and the trailer."""
    folders = {str(folder) for name in files for folder in Path(name).parents} - {"."}
    numbers = count(1)
    for name in sorted({*folders, "dev", "proc"}):
        yield entry(name, next(numbers), stat.S_IFDIR | 0o755)
    for name, device in DEVICES.items():
        yield entry(name, next(numbers), stat.S_IFCHR | 0o600, device=device)
    for name, file in sorted(files.items()):
        yield entry(name, next(numbers), stat.S_IFREG | 0o755, file.read_bytes())
    yield entry("TRAILER!!!", 0, 0)


def main() -> None:
    target, *pairs = sys.argv[1:]
    files = {name: Path(file) for name, _, file in (pair.partition("=") for pair in pairs)}
    Path(target).write_bytes(b"".join(members(files)))


if __name__ == "__main__":
    main()
