"""Headers in every language: the same each time, whatever names and docstrings have in them."""

import re
from enum import IntEnum
from pathlib import Path
from typing import Annotated, get_args

import pytest
from called_methods import Called
from children import run
from guest_builds import INCLUDE, STRICT, done, rust_compiler
from needs import needs

from vmibridge import U8, U32, BridgeHandler, GuestBytes, StandardHandler, method
from vmibridge.config import find_handlers
from vmibridge.errors import HandlerLoadError
from vmibridge.guest_header import LANGUAGES, Language, header_text, models_of
from vmibridge.guest_header.comments import comment_lines
from vmibridge.guest_header.reserved import HEADER_NAMES, INCLUDE_NAMES

ROOT = Path(__file__).parents[3]
MADE = INCLUDE / "handlers"
every_language = pytest.mark.parametrize("language", LANGUAGES)


def header(*handlers, language="c"):
    return header_text(models_of(handlers), language)


def test_every_language_has_an_emitter():
    assert set(get_args(Language)) == set(LANGUAGES)


@every_language
def test_it_is_the_same_each_time_and_says_nothing_of_where_it_was_made(language):
    text = header(Called, language=language)
    assert text == header(Called, language=language)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "called_methods" not in text
    assert not re.search(r"/(root|home|tmp|work|usr)/", text)
    assert all(line == line.rstrip() for line in text.splitlines())


HOSTILE = (
    "ends */ here",
    "**//",
    "/* again",
    "trigraph ??/",
    "????/",
    "a backslash \\",
    "two \\\\",
    "a line\rof its own\u2028and\x85one",
    "\u202ereversed",
    "\0 and \x1b[2J",
    "*\\\n/ int x;",
    '" \' ` # %include "/etc/passwd"',
    "int main(void) {}",
)


class Hostile(StandardHandler[int]):
    __doc__ = "\n".join(HOSTILE)
    REQUEST = 0x0150
    LOWEST = -(1 << 63)
    LARGEST = (1 << 64) - 1

    class Kind(IntEnum):
        __doc__ = "\n".join(HOSTILE)
        int = 1
        default = -(1 << 31)

    @method(1)
    async def register(self, struct: U8, fn: U8, NULL: Annotated[bytes, GuestBytes(8)]) -> U8:
        return 0

    @method(2)
    async def größe(self, naïve: U32, call: U8, __LINE__: U8, linux: U8) -> Kind:  # noqa: PLC2401
        return self.Kind(1)

    register.__doc__ = "\n".join(HOSTILE)


Hostile.register.__doc__ = "\n".join(HOSTILE)


@pytest.mark.parametrize("line", HOSTILE)
def test_a_docstring_stays_in_its_comment(line):
    for made in comment_lines(line):
        assert made.isprintable()
        assert "*/" not in made
        assert "/*" not in made
        assert "??" not in made
        assert not made.endswith("\\")


@pytest.mark.parametrize("width", [64, 32])
def test_hostile_names_and_docs_compile_in_c(tmp_path, width):
    (tmp_path / "hostile.h").write_text(header(Hostile))
    source = tmp_path / "hostile.c"
    source.write_text('#include "hostile.h"\n#include "hostile.h"\nextern int nothing;\n')
    for dialect in ("-std=c11", "-std=gnu17"):
        done(
            needs("gcc"), dialect, "-O1", f"-m{width}", *STRICT, f"-I{INCLUDE}",
            "-c", "-o", tmp_path / "hostile.o", source,
        )  # fmt: skip


@pytest.mark.parametrize("width", [64, 32])
def test_hostile_names_and_docs_assemble(tmp_path, width):
    (tmp_path / "hostile.inc").write_text(header(Hostile, language="asm"))
    source = tmp_path / "hostile.asm"
    source.write_text(f'bits {width}\n%include "hostile.inc"\n%include "hostile.inc"\n')
    done(
        needs("nasm"), "-Wall", "-Werror", "-f", "bin", f"-I{INCLUDE}/", f"-I{tmp_path}/",
        "-o", tmp_path / "hostile.bin", source,
    )  # fmt: skip


@pytest.mark.slow
def test_hostile_names_and_docs_compile_in_rust(tmp_path):
    (tmp_path / "hostile.rs").write_text(header(Hostile, Called, language="rust"))
    (tmp_path / "lib.rs").write_text("#![no_std]\npub mod hostile;\n")
    for edition in ("2018", "2021"):
        done(
            rust_compiler(), "--edition", edition, "-D", "warnings", "-A", "uncommon_codepoints",
            "--crate-type", "rlib", "-o", tmp_path / "lib.rlib", tmp_path / "lib.rs",
        )  # fmt: skip


SHELLCODE = """
#include "called.h"

uint64_t shellcode(void);
uint64_t shellcode(void)
{
    const struct vmibridge_caller host = vmibridge_by(VMIBRIDGE_VMCALL);
    char room[64];
    uint64_t total;
    uint32_t size;

    if (vmibridge_called_fill(&host, 7, room, sizeof room, &size)) {
        return 0;
    }
    return vmibridge_called_total(&host, 1, room, size, &total) + total;
}
"""


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("level", ["-O0", "-O2", "-Os"])
def test_its_code_runs_wherever_it_is_put(tmp_path, level, width):
    (tmp_path / "called.h").write_text(header(Called))
    (tmp_path / "shellcode.c").write_text(SHELLCODE)
    code = tmp_path / "shellcode.o"
    done(
        needs("gcc"), f"-m{width}", level, *STRICT, "-mgeneral-regs-only", "-fno-stack-protector",
        "-fno-pie", "-fno-asynchronous-unwind-tables", f"-I{INCLUDE}", "-c", "-o", code,
        tmp_path / "shellcode.c",
    )  # fmt: skip
    assert "no relocations" in run([needs("readelf"), "-rW", code]).stdout


def made(name, request, **attributes):
    @method(1)
    async def ask(self) -> None: ...

    members = {"REQUEST": request, "name": name, "ask": ask, **attributes}
    return type("Made", (StandardHandler,), members)


@pytest.mark.parametrize(
    ("handlers", "language", "problem"),
    [
        (
            [made("a b", 1), made("a-b", 2)],
            "c",
            "a-b: the guard and a b: the guard would both be VMIBRIDGE_A_B_H in C; rename one",
        ),
        (
            [made("host", 1, VERSION=2)],
            "c",
            (
                "host: the constant VERSION and a part of vmibridge.h would both be"
                " VMIBRIDGE_HOST_VERSION in C; rename one"
            ),
        ),
        (
            [made("host", 1, VERSION=2)],
            "asm",
            (
                "host: the constant VERSION and a part of the includes would both be"
                " BRIDGE_HOST_VERSION in nasm; rename one"
            ),
        ),
        (
            [made("host", 1, REQUEST_=2), made("Host", 2)],
            "rust",
            "Host and host would both be host in Rust; rename one",
        ),
    ],
)
def test_two_things_with_one_name_are_refused_in_a_line(handlers, language, problem):
    with pytest.raises(HandlerLoadError) as caught:
        header(*handlers, language=language)
    assert str(caught.value) == problem


class OneStamp(BridgeHandler[None]):
    REQUEST = 0x0151
    MAGIC = 0x1234_5678
    VERIFY_VALUE2 = 9

    async def handle(self, vmi, packet):
        return None


def test_another_contract_is_kept():
    text = header(OneStamp)
    assert "#define VMIBRIDGE_ONE_STAMP_MAGIC 0x12345678u" in text
    assert "call.packet.magic = VMIBRIDGE_ONE_STAMP_MAGIC;" in text
    assert "call.stamped = 0x2u;" in text
    assert "call.stamps[1] = 0x9ull;" in text
    assert "stamps: [None, Some(0x9), None, None]" in header(OneStamp, language="rust")
    with pytest.raises(HandlerLoadError, match="one_stamp: in nasm, the stamps of an answer are"):
        header(OneStamp, language="asm")


def test_the_names_of_the_guests_files_are_known():
    text = (INCLUDE / "vmibridge.h").read_text()
    assert set(re.findall(r"\b(?:vmibridge_\w+|VMIBRIDGE_\w+)", text)) == HEADER_NAMES
    includes = [INCLUDE / f"{name}.inc" for name in ("bridge", "gate", "handshake", "methods")]
    found = {name for file in includes for name in re.findall(r"\bBRIDGE_\w*", file.read_text())}
    assert {name for name in found if not name.startswith("BRIDGE_NOTES_")} == INCLUDE_NAMES


def modules():
    files = sorted((ROOT / "handlers").glob("*.py"))
    return [file.stem for file in files if not file.name.startswith("_")]


@pytest.mark.parametrize("module", modules())
@pytest.mark.parametrize(("language", "suffix"), [("c", "h"), ("asm", "inc")])
def test_the_headers_of_the_ready_made_handlers_are_up_to_date(module, language, suffix):
    offered = find_handlers([f"vmibridge.handlers.{module}"])
    text = header(*(each.handler for each in offered), language=language)
    file = MADE / f"{module}.{suffix}"
    assert file.exists(), "run: make guest-headers"
    assert file.read_text() == text, "run: make guest-headers"


def test_so_is_the_file_for_rust_and_there_is_nothing_else():
    offered = find_handlers(["vmibridge.handlers"])
    text = header(*(each.handler for each in offered), language="rust")
    assert (MADE / "handlers.rs").read_text() == text, "run: make guest-headers"
    names = {f"{module}.{suffix}" for module in modules() for suffix in ("h", "inc")}
    assert {file.name for file in MADE.iterdir()} == names | {"handlers.rs"}


def test_the_headers_of_the_ready_made_handlers_go_into_one_guest(tmp_path):
    source = tmp_path / "all.c"
    source.write_text(
        "".join(f'#include "handlers/{module}.h"\n' for module in modules())
        + "extern int nothing;\n"
    )
    done(
        needs("gcc"), "-std=c11", "-O1", *STRICT, f"-I{INCLUDE}", "-c", "-o", tmp_path / "all.o",
        source,
    )  # fmt: skip
    assert run([needs("nm"), tmp_path / "all.o"]).stdout == ""
