"""Whatever a handler is called and takes, its header compiles, or is refused in a line."""

import inspect
import keyword
import tempfile
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Annotated

from guest_builds import INCLUDE, STRICT, done, rust_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LONG, examples
from needs import needs

from vmibridge import (
    I8,
    I64,
    U8,
    U16,
    U32,
    U64,
    GuestBytes,
    GuestRoom,
    GuestText,
    Room,
    StandardHandler,
    method,
)
from vmibridge.errors import HandlerLoadError
from vmibridge.guest_header import header_text, models_of


class Mode(IntEnum):
    """A mode."""

    int = 1
    NULL = -1


class Wide(IntEnum):
    LOW = -(1 << 63)
    low = 1


class Large(IntEnum):
    A = (1 << 32) - 1


class Flags(IntFlag):
    register = 1
    ALL = (1 << 64) - 1


ONE_WORD = [
    U8, U16, U32, U64, I8, I64, int, bool, Mode, Wide, Large, Flags,
    Annotated[str, GuestText(1)],
    Annotated[str, GuestText(1 << 24)] | None,
    Annotated[str, GuestText(2, "utf-16-le")],
]  # fmt: skip
TWO_WORDS = [
    Annotated[bytes, GuestBytes(1)],
    Annotated[bytes, GuestBytes(1 << 24)] | None,
    Annotated[Room, GuestRoom(4096)],
    Annotated[Room, GuestRoom(1)] | None,
]
RESULTS = [None, *ONE_WORD[:12]]

RESERVED = """
    call caller result status words method code values given size name name_size name_capacity
    struct auto register template fn impl crate self_ super move box linux NULL EOF errno IN
    rax eax section global equ dq how missing uint8_t usize u8 _ _x __x x x_ X größe ñ 名
"""
reserved = st.sampled_from(RESERVED.split())
invented = st.from_regex(r"[a-zA-Z_][a-z0-9_]{0,6}", fullmatch=True)
names = (reserved | invented).filter(lambda name: not keyword.iskeyword(name) and name != "self")
docs = st.none() | st.text(max_size=40) | st.sampled_from(["*/", "\\", "/* \\\n", "??/\n*/"])


@st.composite
def methods(draw):
    """Name, code, parameters with their types, the type of the result, and the docstring."""
    words, taken = draw(st.integers(0, 4)), {}
    while words:
        wide = words > 1 and draw(st.booleans())
        name = draw(names.filter(lambda name: name not in taken))
        taken[name] = draw(st.sampled_from(TWO_WORDS if wide else ONE_WORD))
        words -= 1 + wide
    return draw(names), taken, draw(st.sampled_from(RESULTS)), draw(docs)


def made(name, members, request):
    """A class that is made of them."""
    space = {"REQUEST": request, "name": name, "__module__": __name__}
    for code, (called, parameters, result, doc) in enumerate(members, 1):

        async def body(self, *arguments): ...

        body.__name__ = body.__qualname__ = called
        body.__doc__ = doc
        body.__annotations__ = {**parameters, "return": result}
        body.__signature__ = inspect.Signature(
            [
                inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for each, kind in {"self": inspect.Parameter.empty, **parameters}.items()
            ],
            return_annotation=result,
        )
        space.setdefault(called, method(code)(body))
    return type("Made", (StandardHandler,), space)


handlers = st.builds(
    made,
    st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=8).filter(
        str.isprintable
    ),
    st.lists(methods(), min_size=1, max_size=5),
    st.integers(0, 0xFFFF),
)


def text_or_refusal(given, language):
    try:
        return header_text(models_of(given), language), ""
    except HandlerLoadError as refused:
        return None, str(refused)


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(handlers, min_size=1, max_size=2))
def test_every_header_compiles_or_is_refused(given):
    for language in ("c", "asm", "rust"):
        text, refusal = text_or_refusal(given, language)
        assert refusal.isprintable()
        if text is not None:
            with tempfile.TemporaryDirectory() as place:
                compiled(Path(place), language, text)


def compiled(folder, language, text):
    (folder / "made.h").write_text(text)
    (folder / "made.c").write_text('#include "made.h"\nextern int nothing;\n')
    (folder / "made.asm").write_text('%include "made.h"\n')
    if language == "c":
        for width in (64, 32):
            done(
                needs("gcc"), "-std=c11", "-O0", f"-m{width}", *STRICT, f"-I{INCLUDE}",
                "-fsyntax-only", folder / "made.c",
            )  # fmt: skip
    elif language == "asm":
        done(
            needs("nasm"), "-Wall", "-Werror", "-f", "bin", f"-I{INCLUDE}/", f"-I{folder}/",
            "-o", folder / "made.bin", folder / "made.asm",
        )  # fmt: skip
    elif LONG:
        (folder / "made.rs").write_text(text)
        (folder / "lib.rs").write_text("#![no_std]\npub mod made;\n")
        done(
            rust_compiler(), "--edition", "2021", "-D", "warnings", "-A", "uncommon_codepoints",
            "--crate-type", "rlib", "-o", folder / "lib.rlib", folder / "lib.rs",
        )  # fmt: skip
