"""Handlers as a file for nasm: constants, and one macro a method, in 64-bit and 32-bit code.

What is the same for every method is in `methods.inc`, `gate.inc` and `bridge.inc` of the guest.
"""

from collections.abc import Iterable, Iterator

from vmibridge.bridge.contract import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
)
from vmibridge.errors import HandlerLoadError
from vmibridge.guest_header.comments import comment_lines
from vmibridge.guest_header.model import EnumModel, HandlerModel, MethodModel, ParameterModel
from vmibridge.guest_header.names import Names, ascii_name, snake_name
from vmibridge.guest_header.reserved import INCLUDE_NAMES
from vmibridge.guest_header.words import described
from vmibridge.text import printable

__all__ = ["write_asm"]

_OPENING = """\
; Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
;
; What the macros take, give and change stands in methods.inc.
%include "bridge.inc"
%include "gate.inc"
%include "methods.inc"
"""
_STAMPS = {STANDARD_VERIFY_VALUE3: "BRIDGE_STAMP3", STANDARD_VERIFY_VALUE4: "BRIDGE_STAMP4"}


def write_asm(models: Iterable[HandlerModel]) -> str:
    """The text of the file.

    Raises `HandlerLoadError` for two things with one name, and for stamps that cannot be checked.
    """
    names = Names("nasm", dict.fromkeys(INCLUDE_NAMES, "a part of the includes"))
    handlers = ["\n".join(_Handler(names, model).lines()) for model in models]
    return "\n".join([_OPENING, *(f"{handler}\n" for handler in handlers)])


class _Handler:
    def __init__(self, names: Names, model: HandlerModel) -> None:
        self._names = names
        self._model = model
        self._upper = f"BRIDGE_{ascii_name(model.name).upper()}"
        self._contract = self._contract_operands()

    def _contract_operands(self) -> str:
        """Magic, whether there are stamps, and the two."""
        model = self._model
        magic = "BRIDGE_MAGIC" if model.magic == STANDARD_MAGIC else f"{model.magic:#010x}"
        stamps = [stamp for stamp in model.stamps[2:] if stamp is not None]
        if any(stamp is not None for stamp in model.stamps[:2]) or len(stamps) == 1:
            raise HandlerLoadError(
                f"{printable(model.name)}: in nasm, the stamps of an answer are VERIFY_VALUE3 and"
                " VERIFY_VALUE4, both or none"
            )
        shown = [_STAMPS.get(stamp, f"{stamp:#018x}") for stamp in stamps] or ["0", "0"]
        return f"{magic}, {int(bool(stamps))}, {shown[0]}, {shown[1]}"

    def lines(self) -> Iterator[str]:
        """One handler, within a guard of its own: another file may have it, too."""
        model = self._model
        guard = self._name(f"{self._upper}_INC", "the guard")
        yield f"%ifndef {guard}"
        yield f"%define {guard}"
        yield ""
        yield from _comment([f"{model.name}: request {model.request:#06x}.", "", model.doc])
        yield self._equ("REQUEST", f"{model.request:#06x}", "the request")
        for method in model.methods:
            if method.code is not None:
                name = f"METHOD_{ascii_name(method.name).upper()}"
                yield self._equ(name, f"{method.code:#06x}", f"the code of {method.name}")
        for name, value in model.constants.items():
            yield self._equ(ascii_name(name), str(value), f"the constant {name}")
        for method in model.methods:
            for each in method.parameters:
                if each.limit is not None:
                    what = f"the limit of {method.name}({each.name})"
                    yield self._equ(self._limit(method, each), str(each.limit), what)
        for one in model.enums:
            yield ""
            yield from self._enum(one)
        for method in model.methods:
            yield ""
            name = ascii_name(method.name).upper()
            macro = self._upper if method.code is None else f"{self._upper}_{name}"
            self._name(macro, f"the method {method.name or 'handle'}")
            yield from self._typed(macro, method) if method.typed else self._plain(macro, method)
        yield ""
        yield "%endif"

    def _name(self, name: str, what: str) -> str:
        return self._names.add(name, f"{self._model.name}: {what}")

    def _equ(self, name: str, value: str, what: str) -> str:
        return f"{self._name(f'{self._upper}_{name}', what)} equ {value}"

    def _limit(self, method: MethodModel, parameter: ParameterModel) -> str:
        return f"{ascii_name(method.name)}_{ascii_name(parameter.name)}_LIMIT".upper()

    def _enum(self, one: EnumModel) -> Iterator[str]:
        prefix = snake_name(one.name).upper()
        yield from _comment([one.doc or f"{one.name}, of {self._model.name}."])
        for name, value in one.members.items():
            yield self._equ(f"{prefix}_{ascii_name(name)}", str(value), f"{one.name}.{name}")

    def _typed(self, macro: str, method: MethodModel) -> Iterator[str]:
        result = method.result
        gives = "gives nothing." if result is None else f"gives {described(result)}"
        about = [
            f"{each.name}: {described(each, _size(each))}"
            if each.words == 2
            else f"{each.name}: {described(each)}"
            for each in method.parameters
        ]
        yield from _comment([method.doc, "", *about, gives])
        narrow = self._operands(method, is_split=False)
        split = self._operands(method, is_split=True)
        yield from self._macro(macro, method, narrow, is_split=False)
        if split != narrow:
            yield from self._macro(macro, method, split, is_split=True)

    def _operands(self, method: MethodModel, *, is_split: bool) -> list[str]:
        operands = ["how"]
        for each in method.parameters:
            if is_split and _is_wide(each):
                operands += [f"{each.name}_low", f"{each.name}_high"]
            elif each.words == 2:
                operands += [each.name, _size(each)]
            else:
                operands.append(each.name)
        return [ascii_name(operand) for operand in operands]

    def _macro(
        self, macro: str, method: MethodModel, operands: list[str], *, is_split: bool
    ) -> Iterator[str]:
        where = " in 32-bit code" if is_split else ""
        yield f"; {macro} {', '.join(operands)}{where}"
        yield f"%macro {macro} {len(operands)}"
        pushes: list[str] = []
        kinds: list[str] = []
        limits: list[str] = []
        at = 2
        for each in method.parameters:
            signed = int(each.signed)
            if is_split and _is_wide(each):
                pushes.append(f"BRIDGE_PUSH_WORD %{at}, {signed}, %{at + 1}")
                at += 2
            else:
                pushes += [f"BRIDGE_PUSH_WORD %{at + word}, {signed}" for word in range(each.words)]
                at += each.words
            if each.limit is not None:
                kind = "TEXT16" if each.encoding == "utf-16-le" else each.kind.upper()
                kinds.append(f"BRIDGE_WORD_{kind} << {4 * len(limits)}")
            limits.append(
                "0" if each.limit is None else f"{self._upper}_{self._limit(method, each)}"
            )
            limits += ["0"] * (each.words - 1)
        yield from (f"    {push}" for push in reversed(pushes))
        limits += ["0"] * (4 - len(limits))
        signed = int(method.result is not None and method.result.signed)
        name = f"METHOD_{ascii_name(method.name).upper()}"
        yield (
            f"    BRIDGE_ASK_METHOD %1, {self._upper}_REQUEST, {self._upper}_{name},"
            f" {method.words}, {int(method.is_wide)}, {signed}, \\"
        )
        yield f"        {' | '.join(kinds) or '0'}, \\"
        yield f"        {', '.join(limits)}, \\"
        yield f"        {self._contract}"
        yield "%endmacro"

    def _plain(self, macro: str, method: MethodModel) -> Iterator[str]:
        yield from _comment([method.doc, "", "It takes and gives four values, in their registers."])
        name = f"METHOD_{ascii_name(method.name).upper()}"
        operands = ["how", *(["method"] if method.code is None else []), "missing"]
        code = "%2" if method.code is None else f"{self._upper}_{name}"
        yield f"; {macro} {', '.join(operands)}"
        yield f"%macro {macro} {len(operands)}"
        wait = "0, 0" if method.wait is None else f"1, {method.wait & 0xFFFF_FFFF:#x}"
        yield (f"    BRIDGE_ASK_PLAIN %1, {self._upper}_REQUEST, {code}, %{len(operands)}, \\")
        yield f"        {self._contract}, {wait}"
        yield "%endmacro"


def _size(parameter: ParameterModel) -> str:
    return f"{parameter.name}_{'capacity' if parameter.kind == 'room' else 'size'}"


def _is_wide(parameter: ParameterModel) -> bool:
    return parameter.kind in ("number", "enum") and parameter.bits == 64


def _comment(paragraphs: Iterable[str]) -> Iterator[str]:
    for line in comment_lines("\n".join(paragraphs)):
        yield f"; {line}".rstrip()
