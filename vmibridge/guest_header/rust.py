"""Handlers as a file of Rust for `no_std`: constants, types, and one function a method.

It stands alone: `prelude.rs` of this package comes first, then a module for each handler. An enum
is a struct with constants, because a newer host may give a member that the guest does not know.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from vmibridge.bridge.contract import STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.guest_header.comments import comment_lines
from vmibridge.guest_header.model import EnumModel, HandlerModel, MethodModel, ParameterModel
from vmibridge.guest_header.names import Names, ascii_name, camel_name, free_name
from vmibridge.guest_header.reserved import RUST_LOCALS, RUST_TYPES, RUST_WORDS
from vmibridge.guest_header.words import described

__all__ = ["write_rust"]

_STAMPS = {STANDARD_VERIFY_VALUE3: "STAMP3", STANDARD_VERIFY_VALUE4: "STAMP4"}


def write_rust(models: Iterable[HandlerModel]) -> str:
    """The text of the file. Raises `HandlerLoadError` for two things with one name."""
    prelude = (Path(__file__).parent / "prelude.rs").read_text("utf-8")
    names = Names("Rust")
    handlers = ["\n".join(_Handler(names, model).lines()) for model in models]
    return "\n".join([prelude, *(f"{handler}\n" for handler in handlers)])


class _Handler:
    def __init__(self, names: Names, model: HandlerModel) -> None:
        self._module = free_name(_free(ascii_name(model.name).lower()), RUST_TYPES)
        names.add(self._module, model.name)
        # What is in the module, in one space of names for all kinds.
        self._names = Names("Rust")
        self._model = model
        self._enums = {each.name: each for each in model.enums}

    def lines(self) -> Iterator[str]:
        """One module."""
        model = self._model
        yield from _docs([f"{model.name}: request {model.request:#06x}.", "", model.doc])
        yield f"pub mod {self._module} {{"
        yield from (f"    {line}".rstrip() for line in self._inside())
        yield "}"

    def _inside(self) -> Iterator[str]:
        model = self._model
        yield "use super::{Caller, Error, Method, Named, Response, Word};"
        yield ""
        yield self._constant("REQUEST", "u16", f"{model.request:#06x}", "the request")
        yield self._constant("MAGIC", "u32", f"{model.magic:#010x}", "the magic")
        for name, value in model.constants.items():
            kind = "i64" if value < 0 else "u64"
            yield self._constant(ascii_name(name), kind, str(value), f"the constant {name}")
        for method in model.methods:
            if method.code is not None:
                name = f"METHOD_{ascii_name(method.name).upper()}"
                yield self._constant(
                    name, "u16", f"{method.code:#06x}", f"the code of {method.name}"
                )
            for each in method.parameters:
                if each.limit is not None:
                    name = f"{ascii_name(method.name)}_{ascii_name(each.name)}_LIMIT".upper()
                    what = f"the limit of {method.name}({each.name})"
                    yield self._constant(name, "usize", str(each.limit), what)
        for one in model.enums:
            yield ""
            yield from self._enum(one)
        for method in model.methods:
            yield ""
            yield from self._method(method)

    def _name(self, name: str, what: str) -> str:
        return self._names.add(name, f"{self._model.name}: {what}")

    def _constant(self, name: str, kind: str, value: str, what: str) -> str:
        return f"pub const {self._name(name, what)}: {kind} = {value};"

    def _enum(self, one: EnumModel) -> Iterator[str]:
        kind = self._name(_type_name(one), f"the enum {one.name}")
        yield from _docs([one.doc or f"{one.name}, of {self._model.name}."])
        yield "#[derive(Clone, Copy, Debug, PartialEq, Eq)]"
        yield f"pub struct {kind}(pub {_integer(one.bits, one.signed)});"
        yield ""
        yield f"impl {kind} {{"
        members = Names("Rust")
        for member, value in one.members.items():
            name = members.add(_free(ascii_name(member)), f"{one.name}.{member}")
            yield f"    pub const {name}: {kind} = {kind}({value});"
        yield "}"
        if one.flags:
            yield ""
            yield f"impl core::ops::BitOr for {kind} {{"
            yield f"    type Output = {kind};"
            yield f"    fn bitor(self, other: {kind}) -> {kind} {{"
            yield f"        {kind}(self.0 | other.0)"
            yield "    }"
            yield "}"

    def _method(self, method: MethodModel) -> Iterator[str]:
        name = "call_method" if method.code is None else _free(ascii_name(method.name))
        self._name(name, f"the method {method.name or 'handle'}")
        yield from self._typed(name, method) if method.typed else self._plain(name, method)

    def _typed(self, name: str, method: MethodModel) -> Iterator[str]:
        arguments = ["caller: &C"]
        about: list[str] = []
        words: list[str] = []
        named: list[str] = []
        locals_ = _local_names(method.parameters)
        for each in method.parameters:
            local = locals_[each.name]
            about.append(f"* `{local}`: {described(each, 'its length in')}")
            arguments.append(f"{local}: {self._argument(each)}")
            words += self._words(each, local)
            named += _named(each, local)
        result = method.result
        gives = "()" if result is None else self._type(result)
        if result is not None:
            about.append(f"* gives {described(result)}")
        yield from _docs([method.doc, "", *about])
        yield f"pub fn {name}<C: Caller + ?Sized>("
        yield from (f"    {argument}," for argument in arguments)
        yield f") -> Result<{gives}, Error> {{"
        yield from (f"    {line}" for line in self._method_value(method))
        for each in method.parameters:
            if each.kind == "text":
                local = locals_[each.name]
                if each.optional:
                    yield f"    let {local}_size = {local}.map_or(Ok(0), super::text_size)?;"
                else:
                    yield f"    let {local}_size = super::text_size({local})?;"
            elif each.kind == "room" and each.optional:
                local = locals_[each.name]
                yield f"    let mut {local} = {local};"
        yield f"    let words = [{', '.join([*words, *['0'] * (4 - len(words))])}];"
        yield f"    let named = [{', '.join([*named, *['Named::Nothing'] * (4 - len(named))])}];"
        yield "    // What the words name is borrowed here."
        if result is None:
            yield "    unsafe { super::call(caller, &method, words, named) }.map(|_| ())"
        else:
            yield "    let given = unsafe { super::call(caller, &method, words, named) }?;"
            yield f"    Ok({self._given(result)})"
        yield "}"

    def _plain(self, name: str, method: MethodModel) -> Iterator[str]:
        yield from _docs(
            [
                method.doc,
                "",
                "It takes and gives four values.",
                "",
                "# Safety",
                "",
                "The host may read and write memory that the values name.",
            ]
        )
        yield f"pub unsafe fn {name}<C: Caller + ?Sized>("
        yield "    caller: &C,"
        if method.code is None:
            yield "    code: u16,"
        yield "    values: [Word; 4],"
        yield ") -> Result<Response, Error> {"
        yield from (f"    {line}" for line in self._method_value(method))
        wait = "None" if method.wait is None else f"Some({method.wait & 0xFFFF_FFFF:#x})"
        yield f"    unsafe {{ super::call_plain(caller, &method, values, {wait}) }}"
        yield "}"

    def _method_value(self, method: MethodModel) -> Iterator[str]:
        code = "code" if method.code is None else f"METHOD_{ascii_name(method.name).upper()}"
        stamps = [
            "None"
            if stamp is None
            else f"Some({f'super::{_STAMPS[stamp]}' if stamp in _STAMPS else f'{stamp:#x}'})"
            for stamp in self._model.stamps
        ]
        yield "let method = Method {"
        yield "    magic: MAGIC,"
        yield "    request: REQUEST,"
        yield f"    method: {code},"
        yield f"    stamps: [{', '.join(stamps)}],"
        yield f"    words: {method.words},"
        yield f"    is_wide: {str(method.is_wide).lower()},"
        yield "};"

    def _type(self, parameter: ParameterModel) -> str:
        if parameter.kind == "bool":
            return "bool"
        if parameter.enum is not None:
            return _type_name(self._enums[parameter.enum])
        return _integer(parameter.bits, parameter.signed)

    def _argument(self, parameter: ParameterModel) -> str:
        match parameter.kind:
            case "text":
                kind = "&[u8]" if parameter.encoding == "utf-8" else "&[u16]"
            case "bytes":
                kind = "&[u8]"
            case "room":
                kind = "&mut [u8]"
            case _:
                return self._type(parameter)
        return f"Option<{kind}>" if parameter.optional else kind

    def _words(self, parameter: ParameterModel, local: str) -> list[str]:
        if parameter.limit is None:
            value = f"{local}.0" if parameter.enum is not None else local
            return [f"{value} as i64 as u64" if self._is_signed(parameter) else f"{value} as u64"]
        kind = "u16" if parameter.encoding == "utf-16-le" else "u8"
        if not parameter.optional:
            pointer = f"{local}.as_{'mut_' if parameter.kind == 'room' else ''}ptr()"
            size = f"{local}.len() as u64"
        elif parameter.kind == "room":
            pointer = (
                f"{local}.as_mut().map_or(core::ptr::null_mut::<u8>(), |room| room.as_mut_ptr())"
            )
            size = f"{local}.as_ref().map_or(0, |room| room.len()) as u64"
        else:
            pointer = f"{local}.map_or(core::ptr::null::<{kind}>(), |data| data.as_ptr())"
            size = f"{local}.map_or(0, |data| data.len()) as u64"
        address = f"{pointer} as usize as u64"
        return [address, size] if parameter.words == 2 else [address]

    def _given(self, result: ParameterModel) -> str:
        if result.kind == "bool":
            return "given & 1 != 0"
        if result.enum is not None:
            one = self._enums[result.enum]
            return f"{_type_name(one)}(given as {_integer(one.bits, one.signed)})"
        return f"given as {_integer(result.bits, result.signed)}"

    def _is_signed(self, parameter: ParameterModel) -> bool:
        if parameter.enum is not None:
            return self._enums[parameter.enum].signed
        return parameter.signed


def _named(parameter: ParameterModel, local: str) -> list[str]:
    if parameter.limit is None:
        return ["Named::Nothing"]
    if parameter.kind == "text":
        return [f"Named::Read({local}_size)"]
    how = "Fill" if parameter.kind == "room" else "Read"
    if not parameter.optional:
        size = f"{local}.len()"
    elif parameter.kind == "room":
        size = f"{local}.as_ref().map_or(0, |room| room.len())"
    else:
        size = f"{local}.map_or(0, |data| data.len())"
    return [f"Named::{how}({size})", "Named::Nothing"]


def _local_names(parameters: Iterable[ParameterModel]) -> dict[str, str]:
    taken = set(RUST_WORDS | RUST_LOCALS)
    found: dict[str, str] = {}
    for each in parameters:
        local = ascii_name(each.name)
        local = f"p{local}" if local.startswith("_") else local
        found[each.name] = free_name(local, taken)
        taken |= {found[each.name], f"{found[each.name]}_size"}
    return found


def _free(name: str) -> str:
    return free_name(f"n{name}" if name[:1].isdigit() else name, RUST_WORDS)


def _type_name(one: EnumModel) -> str:
    return free_name(camel_name(one.name), RUST_LOCALS)


def _integer(bits: int, signed: bool) -> str:
    return f"{'i' if signed else 'u'}{bits}"


def _docs(paragraphs: Iterable[str]) -> Iterator[str]:
    for line in comment_lines("\n".join(paragraphs)):
        yield f"/// {line}".rstrip()
