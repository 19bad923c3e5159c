"""Handlers as a header of C11: constants, enums, and one inline function a method.

It includes `vmibridge.h`, which has all that is the same for every method. It is C++, too.
"""

from collections.abc import Iterable, Iterator

from vmibridge.bridge.contract import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
)
from vmibridge.guest_header.comments import comment_lines
from vmibridge.guest_header.model import EnumModel, HandlerModel, MethodModel, ParameterModel
from vmibridge.guest_header.names import Names, ascii_name, free_name, snake_name
from vmibridge.guest_header.reserved import C_LOCALS, C_WORDS, HEADER_NAMES
from vmibridge.guest_header.words import described

__all__ = ["write_c"]

_STANDARD = (None, None, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)
_OPENING = """\
/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"
"""


def write_c(models: Iterable[HandlerModel]) -> str:
    """The text of the header. Raises `HandlerLoadError` for two things with one name."""
    names = Names("C", dict.fromkeys(HEADER_NAMES, "a part of vmibridge.h"))
    handlers = ["\n".join(_Handler(names, model).lines()) for model in models]
    return "\n".join([_OPENING, *(f"{handler}\n" for handler in handlers)])


class _Handler:
    def __init__(self, names: Names, model: HandlerModel) -> None:
        self._names = names
        self._model = model
        self._lower = f"vmibridge_{ascii_name(model.name).lower()}"
        self._upper = self._lower.upper()
        self._enums = {each.name: each for each in model.enums}

    def lines(self) -> Iterator[str]:
        """One handler, within a guard of its own: another header may have it, too."""
        model, upper = self._model, self._upper
        guard = self._name(f"{upper}_H", "the guard")
        yield f"#ifndef {guard}"
        yield f"#define {guard}"
        yield ""
        yield from _comment([f"{model.name}: request {model.request:#06x}.", "", model.doc])
        yield self._define("REQUEST", f"{model.request:#06x}u", "the request")
        if model.magic != STANDARD_MAGIC:
            yield self._define("MAGIC", f"{model.magic:#010x}u", "the magic")
        for method in model.methods:
            if method.code is not None:
                what = f"the code of {method.name}"
                code = f"{method.code:#06x}u"
                yield self._define(f"METHOD_{ascii_name(method.name).upper()}", code, what)
        for name, value in model.constants.items():
            yield self._define(ascii_name(name), _literal(value), f"the constant {name}")
        for method in model.methods:
            for each in method.parameters:
                if each.limit is not None:
                    yield self._define(
                        self._limit(method, each),
                        f"{each.limit}u",
                        f"the limit of {method.name}({each.name})",
                    )
        for one in model.enums:
            yield ""
            yield from self._enum(one)
        for method in model.methods:
            yield ""
            yield from self._method(method)
        yield ""
        yield "#endif"

    def _name(self, name: str, what: str) -> str:
        return self._names.add(name, f"{self._model.name}: {what}")

    def _define(self, name: str, value: str, what: str) -> str:
        return f"#define {self._name(f'{self._upper}_{name}', what)} {value}"

    def _limit(self, method: MethodModel, parameter: ParameterModel) -> str:
        return f"{ascii_name(method.name)}_{ascii_name(parameter.name)}_LIMIT".upper()

    # --- enums ---

    def _enum(self, one: EnumModel) -> Iterator[str]:
        prefix = f"{self._upper}_{snake_name(one.name).upper()}"
        tag = self._name(self._enum_tag(one), f"the enum {one.name}")
        members = [
            (self._name(f"{prefix}_{ascii_name(name)}", f"{one.name}.{name}"), value)
            for name, value in one.members.items()
        ]
        yield from _comment([one.doc or f"{one.name}, of {self._model.name}."])
        if not _is_c_enum(one):
            yield f"typedef {_integer(one.bits, one.signed)} {tag};"
            yield from (f"#define {name} {_literal(value)}" for name, value in members)
            return
        yield f"enum {tag} VMIBRIDGE_ENUM(int32_t) {{"
        for at, (name, value) in enumerate(members, 1):
            number = "-2147483647 - 1" if value == -(1 << 31) else str(value)
            yield f"    {name} = {number}{',' if at < len(members) else ''}"
        yield "};"

    def _enum_tag(self, one: EnumModel) -> str:
        return f"{self._lower}_{snake_name(one.name)}"

    def _type(self, parameter: ParameterModel) -> str:
        if parameter.kind == "bool":
            return "bool"
        if parameter.enum is not None:
            one = self._enums[parameter.enum]
            return f"{'enum ' if _is_c_enum(one) else ''}{self._enum_tag(one)}"
        return _integer(parameter.bits, parameter.signed)

    # --- methods ---

    def _method(self, method: MethodModel) -> Iterator[str]:
        name = self._lower if method.code is None else f"{self._lower}_{ascii_name(method.name)}"
        self._name(name, f"the method {method.name or 'handle'}")
        if method.typed:
            yield from self._typed(name, method)
        else:
            yield from self._plain(name, method)

    def _typed(self, name: str, method: MethodModel) -> Iterator[str]:
        arguments = ["const struct vmibridge_caller *caller"]
        about: list[str] = []
        fills: list[str] = []
        kinds: list[str] = []
        word = 1
        named = _local_names(method.parameters)
        for each in method.parameters:
            local, size = named[each.name], named.get(f"{each.name}:size", "")
            about.append(f"{local}: {described(each, size)}")
            arguments += self._arguments(each, local, size)
            if each.limit is None:
                fills.append(f"call.block[{word}] = {self._word(each, local)};")
            else:
                limit = f"{self._upper}_{self._limit(method, each)}"
                fills.append(f"call.block[{word}] = VMIBRIDGE_ADDRESS({local});")
                fills += [f"call.block[{word + 1}] = {size};"] if size else []
                fills.append(f"call.limits[{word - 1}] = {limit};")
                kind = "TEXT16" if each.encoding == "utf-16-le" else each.kind.upper()
                kinds.append(f"VMIBRIDGE_WORD_{kind}{f' << {4 * (word - 1)}' if word > 1 else ''}")
            word += each.words
        if method.result is not None:
            arguments.append(f"{self._type(method.result)} *result")
            about.append(f"result: {described(method.result)}")
        yield from _comment([method.doc, "", *about])
        yield from _signature(name, arguments)
        yield "{"
        yield "    struct vmibridge_method_call call;"
        yield from [] if method.result is None else ["    vmibridge_status status;"]
        yield ""
        yield from self._begin(method, f"{method.words}, true")
        yield from [f"    call.kinds = {' | '.join(kinds)};"] if kinds else []
        yield from ["    call.is_wide = true;"] if method.is_wide else []
        yield from (f"    {line}" for line in fills)
        yield from self._end(method)

    def _arguments(self, parameter: ParameterModel, local: str, size: str) -> list[str]:
        match parameter.kind:
            case "text":
                unit = "char" if parameter.encoding == "utf-8" else "vmibridge_char16"
                return [f"const {unit} *{local}"]
            case "bytes":
                return [f"const void *{local}", f"size_t {size}"]
            case "room":
                return [f"void *{local}", f"size_t {size}"]
            case _:
                return [f"{self._type(parameter)} {local}"]

    def _end(self, method: MethodModel) -> Iterator[str]:
        if method.result is None:
            yield "    return vmibridge_call_method(caller, &call);"
        else:
            yield "    status = vmibridge_call_method(caller, &call);"
            yield "    if (result) {"
            yield f"        *result = {self._given(method.result)};"
            yield "    }"
            yield "    return status;"
        yield "}"

    def _plain(self, name: str, method: MethodModel) -> Iterator[str]:
        values = [f"value{number}" for number in (1, 2, 3, 4)]
        arguments = ["const struct vmibridge_caller *caller"]
        if method.code is None:
            arguments.append("uint16_t method")
        arguments += [f"vmibridge_word {value}" for value in values]
        arguments.append("struct vmibridge_response *response")
        yield from _comment(
            [method.doc, "", "It takes and gives four values. 0: it has answered by `response`."]
        )
        yield from _signature(name, arguments)
        yield "{"
        yield "    struct vmibridge_method_call call;"
        yield "    vmibridge_status status;"
        yield ""
        yield from self._begin(method, "4, false")
        if method.wait is not None:
            yield "    call.wait = 0xffffffffu;"
            yield f"    call.waiting = {method.wait & 0xFFFF_FFFF:#x}u;"
        for at, value in enumerate(values, 1):
            yield f"    call.block[{at}] = {value};"
        yield "    status = vmibridge_call_method(caller, &call);"
        yield "    *response = call.response;"
        yield "    return status;"
        yield "}"

    def _begin(self, method: MethodModel, rest: str) -> Iterator[str]:
        code = (
            "method"
            if method.code is None
            else f"{self._upper}_METHOD_{ascii_name(method.name).upper()}"
        )
        yield f"    vmibridge_begin_call(&call, {self._upper}_REQUEST, {code}, {rest});"
        model = self._model
        if model.magic != STANDARD_MAGIC:
            yield f"    call.packet.magic = {self._upper}_MAGIC;"
        if model.stamps != _STANDARD:
            bits = sum(1 << at for at, stamp in enumerate(model.stamps) if stamp is not None)
            yield f"    call.stamped = {bits:#x}u;"
            for at, stamp in enumerate(model.stamps):
                if stamp is not None:
                    yield f"    call.stamps[{at}] = {stamp:#x}ull;"

    def _word(self, parameter: ParameterModel, local: str) -> str:
        """The word of 64 bits of a number."""
        if parameter.kind == "bool":
            return f"{local} ? 1 : 0"
        if self._is_signed(parameter):
            return f"(uint64_t)(int64_t){local}"
        return local

    def _given(self, result: ParameterModel) -> str:
        if result.kind == "bool":
            return "(call.block[0] & 1) != 0"
        kind = self._type(result)
        if result.enum is not None and _is_c_enum(self._enums[result.enum]):
            return f"({kind})(int32_t)call.block[0]"
        return f"({kind})call.block[0]" if kind != "uint64_t" else "call.block[0]"

    def _is_signed(self, parameter: ParameterModel) -> bool:
        if parameter.enum is not None:
            one = self._enums[parameter.enum]
            return one.signed or _is_c_enum(one)
        return parameter.signed


def _local_names(parameters: Iterable[ParameterModel]) -> dict[str, str]:
    """The identifiers of parameters and, under `NAME:size`, of their sizes."""
    taken = set(C_WORDS | C_LOCALS)
    found: dict[str, str] = {}
    for each in parameters:
        local = ascii_name(each.name)
        # Names in capitals are for macros, and those with an underscore for compilers.
        local = local.lower() if local.isupper() else local
        local = f"p{local}" if local.startswith("_") else local
        found[each.name] = free_name(local, taken)
        taken.add(found[each.name])
    for each in parameters:
        if each.words == 2:
            size = "capacity" if each.kind == "room" else "size"
            found[f"{each.name}:size"] = free_name(f"{found[each.name].rstrip('_')}_{size}", taken)
            taken.add(found[f"{each.name}:size"])
    return found


def _is_c_enum(one: EnumModel) -> bool:
    """Whether an enum of C holds it: in C11 its members are of type int."""
    return not one.flags and one.bits == 32 and all(v < 1 << 31 for v in one.members.values())


def _integer(bits: int, signed: bool) -> str:
    return f"{'' if signed else 'u'}int{bits}_t"


def _literal(value: int) -> str:
    if value == -(1 << 63):
        return "(-9223372036854775807ll - 1)"
    if value < 0:
        return f"({value}{'' if value > -(1 << 31) else 'll'})"
    return f"{value:#x}{'u' if value < 1 << 32 else 'ull'}"


def _signature(name: str, arguments: list[str]) -> Iterator[str]:
    opening = f"static inline vmibridge_status {name}("
    line = f"{opening}{', '.join(arguments)})"
    if len(line) <= 100:
        yield line
        return
    yield opening
    line = "   "
    for argument in [*(f"{each}," for each in arguments[:-1]), f"{arguments[-1]})"]:
        if len(line) + 1 + len(argument) > 100:
            yield line
            line = "   "
        line += f" {argument}"
    yield line


def _comment(paragraphs: Iterable[str]) -> Iterator[str]:
    lines = comment_lines("\n".join(paragraphs))
    yield "/*"
    yield from (f" * {line}".rstrip() for line in lines)
    yield " */"
