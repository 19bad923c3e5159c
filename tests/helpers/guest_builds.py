"""Guests that call handlers by generated headers, and the compilers that build them."""

import shutil
from pathlib import Path

from children import run
from needs import needs

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.guest_header import Language, header_text, models_of

INCLUDE = Path(__file__).parents[2] / "guest/include"
GUESTS = Path(__file__).parents[1] / "integration/guests"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-ffreestanding"]
BARE = [
    *("-mgeneral-regs-only", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-nostdlib", "-static"),
]


def write_header(file: Path, handler: type[BridgeHandler], language: Language) -> Path:
    """The header of a handler."""
    file.write_text(header_text(models_of([handler]), language))
    return file


def done(*command: str | Path) -> None:
    """Run a compiler, which has nothing to say."""
    ended = run([str(each) for each in command])
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr


def flat(linked: Path) -> Path:
    """The image of a linked guest."""
    done(needs("objcopy"), "-O", "binary", linked, linked.with_suffix(".bin"))
    return linked.with_suffix(".bin")


def build_c(folder: Path, source: Path, width: int, how: int, *flags: str, compiler: str) -> Path:
    """A guest in C or C++, for the backend Unicorn."""
    linked = folder / f"{compiler}.elf"
    done(
        needs(compiler), *flags, *STRICT, *BARE, f"-I{INCLUDE}", f"-I{folder}",
        f"-m{width}", f"-DHOW={how}", f"-Wl,-T,{INCLUDE}/flat.ld", "-o", linked, source,
    )  # fmt: skip
    return flat(linked)


def build_asm(folder: Path, source: Path, width: int, how: int) -> Path:
    """A guest for nasm."""
    image = folder / "asm.bin"
    done(
        needs("nasm"), "-Wall", "-Werror", "-f", "bin", f"-I{INCLUDE}/", f"-I{folder}/",
        f"-DWIDTH={width}", f"-DHOW={how}", "-o", image, source,
    )  # fmt: skip
    return image


RUST_TARGETS = {64: "x86_64-unknown-linux-gnu", 32: "i686-unknown-linux-gnu"}
RUST_WIDTHS = [
    width for width, target in RUST_TARGETS.items() if Path(f"/usr/lib/rustlib/{target}").exists()
] or [64]
"""Those that Debian's Rust has the crate `core` for: for 32 bits, it is in libstd-rust-dev:i386."""


def rust_compiler() -> str:
    """Debian's, also where a newer one is before it in PATH."""
    return shutil.which("rustc", path="/usr/bin") or needs("rustc")


def build_rust(folder: Path, source: Path, width: int, how: int, level: str) -> Path:
    """A guest in Rust."""
    main, linked = folder / "main.rs", folder / "rust.elf"
    main.write_text(source.read_text().replace("match HOW", f"match {how}"))
    done(
        rust_compiler(), "--edition", "2021", "-D", "warnings", "--target", RUST_TARGETS[width],
        *("-C", f"opt-level={level}", "-C", "panic=abort", "-C", "relocation-model=static"),
        *("-C", "linker=ld", "-C", "linker-flavor=ld", "-C", "link-arg=-static"),
        *("-C", "link-arg=-m", "-C", f"link-arg={'elf_x86_64' if width == 64 else 'elf_i386'}"),
        *("-C", f"link-arg=-T{INCLUDE}/flat.ld", "--crate-type", "bin", "-o", linked, main),
    )  # fmt: skip
    return flat(linked)


def build_programs(folder: Path) -> dict[str, Path]:
    """Programs of Linux in assembly and Rust, by the language and the width."""
    made = {f"{name}-{width}": folder / f"{name}-{width}" for name, width in PROGRAMS}
    for width in (64, 32):
        code, emulation = folder / "program.o", {64: "elf_x86_64", 32: "elf_i386"}[width]
        done(
            needs("nasm"), "-Werror", "-f", f"elf{width}", f"-I{INCLUDE}/",
            f"-I{folder}/", "-o", code, GUESTS / "called_pages.asm",
        )  # fmt: skip
        done(needs("ld"), "-m", emulation, "-o", made[f"asm-{width}"], code)
    source = folder / "program.rs"
    source.write_text((GUESTS / "called_pages.rs").read_text())
    done(
        rust_compiler(), "--edition", "2021", "-D", "warnings",
        *("-C", "opt-level=2", "-C", "panic=abort", "-C", "relocation-model=static"),
        *("-C", "linker=ld", "-C", "linker-flavor=ld", "-C", "link-arg=-static"),
        *("--crate-type", "bin", "-o", made["rust-64"], source),
    )  # fmt: skip
    return made


PROGRAMS = (("asm", 64), ("asm", 32), ("rust", 64))
