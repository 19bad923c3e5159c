"""Headers for guests, made of handlers: constants, enums, and one function a method.

    handlers -> models (model.py) -> text: C (c.py), NASM (asm.py), Rust (rust.py)

A model is in no language and holds nothing of where it was made, so the same handlers give the same
bytes everywhere. What a name or a docstring has in it never ends a comment or makes two things one:
`names.py`, `comments.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

from vmibridge.guest_header.asm import write_asm
from vmibridge.guest_header.c import write_c
from vmibridge.guest_header.model import (
    EnumModel,
    HandlerModel,
    MethodModel,
    ParameterModel,
    model_of,
    models_of,
)
from vmibridge.guest_header.rust import write_rust

__all__ = [
    "LANGUAGES",
    "EnumModel",
    "HandlerModel",
    "Language",
    "MethodModel",
    "ParameterModel",
    "header_text",
    "model_of",
    "models_of",
]

Language: TypeAlias = Literal["c", "asm", "rust"]

LANGUAGES: Mapping[Language, Callable[[Iterable[HandlerModel]], str]] = MappingProxyType(
    {"c": write_c, "asm": write_asm, "rust": write_rust}
)
"""The emitters."""


def header_text(models: Iterable[HandlerModel], language: Language) -> str:
    """The header of these handlers, in a language.

    Raises `HandlerLoadError` if two things of them would get one name.
    """
    return LANGUAGES[language](tuple(models))
