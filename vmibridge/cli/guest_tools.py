"""`vmibridge guest tools`: vmib, a program for guests, compiled here.

It is built from its source, which is in the package, as the QEMU plugin is: nothing that a compiler
made is shipped. The same compiler gives the same bytes.
"""

import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias

from cyclopts import Parameter

from vmibridge.cli.options import Output
from vmibridge.errors import VmiBridgeError
from vmibridge.files import reason, replaceable
from vmibridge.guest_files import guest_file
from vmibridge.text import printable

Target: TypeAlias = Literal["linux-x64", "linux-x86", "windows-x64", "windows-x86"]

_FLAGS = (
    *("-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"),
    # No C library, and nothing that needs one; no registers but the general ones.
    *("-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-mgeneral-regs-only", "-ffunction-sections", "-nostdlib", "-s"),
)
_LINUX = ("-fno-pie", "-static", "-Wl,--gc-sections,--build-id=none,-z,noexecstack")
_WINDOWS = ("-Wl,--gc-sections,--no-insert-timestamp,--subsystem,console",)
_SECONDS = 120.0


class _Build(NamedTuple):
    """How a program is compiled."""

    name: str
    """Its file."""
    compilers: tuple[str, ...]
    platform: str
    """What the names of the sources begin with that the other platform has not."""
    flags: tuple[str, ...]
    last: tuple[str, ...] = ()
    """What comes behind the sources."""


_BUILDS: dict[Target, _Build] = {
    "linux-x64": _Build("vmib", ("cc", "gcc", "clang"), "linux", ("-m64", *_LINUX)),
    "linux-x86": _Build("vmib-x86", ("cc", "gcc", "clang"), "linux", ("-m32", *_LINUX)),
    "windows-x64": _Build(
        "vmib.exe",
        ("x86_64-w64-mingw32-gcc",),
        "windows",
        (*_WINDOWS, "-Wl,-e,vmib_begin"),
        ("-lkernel32",),
    ),
    "windows-x86": _Build(
        "vmib-x86.exe",
        ("i686-w64-mingw32-gcc",),
        "windows",
        # The calling conventions of 32-bit code put a line before a name.
        (*_WINDOWS, "-Wl,-e,_vmib_begin"),
        ("-lkernel32",),
    ),
}
_PLATFORMS = tuple({build.platform for build in _BUILDS.values()})


def build_tools(
    *,
    output: Output = Path(),
    target: Annotated[
        list[Target] | None,
        Parameter(help="What to build; all by default, as far as there are compilers."),
    ] = None,
) -> int:
    """Compile vmib, the program by which a guest asks its host.

    vmib and vmib-x86 are for Linux and need a C compiler alone; vmib.exe and vmib-x86.exe are for
    Windows and need mingw-w64. What has no compiler is left out, unless it was asked for.

    Exit status: 0 when something was built and nothing failed, 1 else, 2 for wrong usage.

    Example: vmibridge guest tools -o tools
    """
    made = 0
    for each in target or list(_BUILDS):
        build = _BUILDS[each]
        compiler = next(filter(shutil.which, build.compilers), None)
        if compiler is None:
            if target:
                raise VmiBridgeError(_without_compiler(build))
            sys.stderr.write(f"vmibridge: {_without_compiler(build)}\n")
            continue
        sys.stdout.write(f"{printable(str(_built(build, compiler, output)))}\n")
        made += 1
    return 0 if made else 1


def _without_compiler(build: _Build) -> str:
    what = "mingw-w64" if build.platform == "windows" else "gcc"
    return f"{build.name}: left out, there is no {' or '.join(build.compilers)}: install {what}"


def _built(build: _Build, compiler: str, folder: Path) -> Path:
    """The file appears under its name when it is whole."""
    source = guest_file("tools")
    units = sorted(
        path
        for path in source.glob("*.c")
        if path.name.startswith(build.platform) or not path.name.startswith(_PLATFORMS)
    )
    target = folder / build.name
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = replaceable(target)
        with tempfile.TemporaryDirectory(prefix=".vmibridge-", dir=place.parent) as made_in:
            made = Path(made_in) / build.name
            include = f"-I{guest_file('include')}"
            _compile(
                build.name,
                [compiler, *_FLAGS, *build.flags, include, "-o", str(made)],
                [*map(str, units), *build.last],
            )
            made.replace(place)
    except OSError as error:
        raise VmiBridgeError(f"{target}: cannot be made: {reason(error, target)}") from error
    finally:
        # Those that were made for nothing; the ones that have a file stay.
        with suppress(OSError):
            for each in new:
                each.rmdir()
    return target


def _compile(name: str, command: list[str], units: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - a compiler, and our own source
            [*command, *units],
            capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise VmiBridgeError(f"{name}: {command[0]} did not end within {_SECONDS:g} s") from error
    if done.returncode:
        why = done.stderr.strip() or f"status {done.returncode}"
        raise VmiBridgeError(f"{name}: {command[0]} failed: {printable(why)}")
