"""An initramfs: the files that a Linux kernel has from its start.

The format is "newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. The
same files give the same bytes: times, numbers and owners are not taken over. Every file can be
executed, and there are /dev/console and /dev/null.

    python -m vmibridge.backends.qemu.initramfs OUT PATH-IN-GUEST=FILE...

packs files as they are, and needs nothing but Python.
"""

import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path

from vmibridge.backends.qemu.guest_programs import guest_program
from vmibridge.errors import ConfigError

_DEVICES = {"dev/console": (5, 1), "dev/null": (1, 3)}
"""Character devices, by major and minor number."""
_FOLDERS = ("dev", "proc", "sys", "tmp")
_LIST = "etc/programs"
"""Where guest/init/init.asm looks for what it runs."""
_MAX_LIST = 65536
"""Bytes of it, at the most."""


def packed(files: Mapping[str, Path | bytes]) -> Iterator[bytes]:
    """The members of the archive: folders before what is in them, and the trailer.

    `files`: contents, or files that have them, by their paths in the guest without the first slash.
    """
    folders = {str(folder) for name in files for folder in Path(name).parents} - {"."}
    numbers = count(1)
    for name in sorted({*folders, *_FOLDERS}):
        yield _member(name, next(numbers), stat.S_IFDIR | 0o755)
    for name, device in _DEVICES.items():
        yield _member(name, next(numbers), stat.S_IFCHR | 0o600, device=device)
    for name, content in sorted(files.items()):
        data = content if isinstance(content, bytes) else content.read_bytes()
        yield _member(name, next(numbers), stat.S_IFREG | 0o755, data)
    yield _member("TRAILER!!!", 0, 0)


def files_to_run(programs: Iterable[Path], init: Path) -> dict[str, Path | bytes]:
    """The files of a guest that runs `programs`, by their order, and powers off.

    A program is at /bin with its own name; libraries of a dynamic one, as this machine has them,
    are in /lib. `init` is guest/init/init. Raises `ConfigError` for what is not a program for Linux
    on x86, whose libraries are not all there, or that goes by the name of another one.
    """
    files: dict[str, Path] = {"init": init}
    run = b""
    for path in programs:
        program = guest_program(path)
        name = f"bin/{path.name}"
        for place, file in ({name: path} | program.libraries).items():
            known = files.setdefault(place, file)
            if not _is_same(known, file):
                raise ConfigError(f"{file}: {known} is /{place} already")
        run += b"/" + name.encode(errors="surrogateescape") + b"\0"
    if len(run) > _MAX_LIST:
        raise ConfigError(f"the paths of all programs have {len(run)} bytes, {_MAX_LIST} are room")
    return {**files, _LIST: run}


def _is_same(first: Path, second: Path) -> bool:
    return first == second or first.samefile(second)


def _member(
    name: str, number: int, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    """A header in hex, the name with a NUL, and the data."""
    path = name.encode(errors="surrogateescape") + b"\0"
    links = 1
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(head + path) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _main() -> None:
    target, *pairs = sys.argv[1:]
    files: dict[str, Path | bytes] = {
        name: Path(file) for name, _, file in (pair.partition("=") for pair in pairs)
    }
    Path(target).write_bytes(b"".join(packed(files)))


if __name__ == "__main__":
    _main()
