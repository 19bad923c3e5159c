"""`vmibridge handlers list`: each handler's contract and methods."""

import sys
from enum import IntEnum
from typing import Annotated, Any, cast

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmibridge.bridge.handler import BridgeHandler, contract_of
from vmibridge.bridge.parameters import GuestInt, GuestText
from vmibridge.bridge.parameters import Parameter as TypedParameter
from vmibridge.cli.event_loop import prints_beside
from vmibridge.cli.options import Json, Sources
from vmibridge.cli.streams import json_line
from vmibridge.config import Offered, find_handlers
from vmibridge.errors import HandlerLoadError

_MAX_MEMBERS = 12
"""Of an enum, that are shown to people."""


class ParameterLine(msgspec.Struct):
    """One parameter of a typed method, or what it gives, for `--json`."""

    name: str
    type: str
    """As the annotation says it: `U32`, `GuestText`, `bool`, or the name of an enum."""
    words: int
    bits: int | None
    signed: bool | None
    limit: int | None
    encoding: str | None
    optional: bool
    members: dict[str, int] | None


class MethodLine(msgspec.Struct):
    """One method, for `--json`."""

    code: int
    name: str
    timeout: float | None
    soft_timeout: float | None
    doc: str
    parameters: list[ParameterLine] | None
    result: ParameterLine | None


class HandlerLine(msgspec.Struct):
    """One handler, for `--json`."""

    name: str
    source: str
    magic: int | None
    request: int
    verify: list[int | None]
    timeout: float | None
    soft_timeout: float | None
    serial: bool
    shared: bool
    methods: list[MethodLine]
    settings: list[str]
    doc: str


def list_handlers(
    sources: Sources,
    /,
    *,
    json: Annotated[Json, Parameter(help="One JSON object a handler.")] = False,
) -> int:
    """Show each handler's contract and methods, without making any.

    Example: vmibridge handlers list handlers/
    """
    with prints_beside(json=json):
        lines = [_line(offered) for offered in find_handlers(sources)]
    if json:
        for line in lines:
            sys.stdout.write(json_line(msgspec.json.encode(line)).decode())
        return 0
    console = Console()
    # rich ends the process itself where the reader has gone.
    with console.capture() as shown:
        for line in lines:
            console.print(_table(line))
    sys.stdout.write(shown.get())
    return 0


def _line(offered: Offered) -> HandlerLine:
    handler = offered.handler
    kind: type[BridgeHandler[Any]] = handler if isinstance(handler, type) else type(handler)
    try:
        contract = contract_of(handler)
    except ValueError as error:
        raise HandlerLoadError(f"{offered.source}: {error}") from error
    methods = [
        MethodLine(
            method.code,
            method.name,
            method.timeout,
            method.soft_timeout,
            method.doc,
            None if method.typed is None else list(map(_parameter, method.typed.parameters)),
            None
            if method.typed is None or method.typed.result is None
            else msgspec.structs.replace(_parameter(method.typed.result), name="result"),
        )
        for _, method in sorted(kind.methods.items())
    ]
    return HandlerLine(
        name=handler.name,
        source=offered.source,
        magic=contract.magic,
        request=contract.request,
        verify=list(contract.verify_values),
        timeout=handler.timeout,
        soft_timeout=handler.soft_timeout,
        serial=handler.serial,
        shared=handler.shared,
        methods=methods,
        settings=[] if kind.Settings is None else list(kind.Settings.__struct_encode_fields__),
        doc=(kind.__doc__ or "").strip().partition("\n")[0],
    )


def _parameter(parameter: TypedParameter) -> ParameterLine:
    spec, members = parameter.spec, parameter.members
    bits, signed, limit = None, None, None
    if isinstance(spec, GuestInt):
        bits, signed, kind = spec.bits, spec.signed, _width(spec.bits, signed=spec.signed)
    else:
        limit, kind = spec.limit, type(spec).__name__
    return ParameterLine(
        name=parameter.name,
        type=kind if members is None else members.__name__,
        words=parameter.words,
        bits=bits,
        signed=signed,
        limit=limit,
        encoding=spec.encoding if isinstance(spec, GuestText) else None,
        optional=parameter.optional,
        members=None
        if members in (None, bool)
        else {each.name: each.value for each in cast("type[IntEnum]", members)},
    )


def _width(bits: int | None, *, signed: bool) -> str:
    return f"{'I' if signed else 'U'}{bits}"


def _signature(method: MethodLine) -> str:
    """As in `put(name: GuestText(64), note: GuestBytes(4096)) -> U32`; a method that takes the
    packet has none."""
    if method.parameters is None:
        return method.name
    words = ", ".join(f"{each.name}: {_type(each)}" for each in method.parameters)
    result = "None" if method.result is None else _type(method.result)
    return f"{method.name}({words}) -> {result}"


def _type(parameter: ParameterLine) -> str:
    text = parameter.type
    if parameter.limit is not None:
        encoding = parameter.encoding
        more = "" if encoding in (None, "utf-8") else f", {encoding}"
        text += f"({parameter.limit}{more})"
    elif parameter.members is not None:
        names = [f"{name}={value}" for name, value in parameter.members.items()]
        more = ", ..." if len(names) > _MAX_MEMBERS else ""
        kind = _width(parameter.bits, signed=bool(parameter.signed))
        text += f"({kind}: {', '.join(names[:_MAX_MEMBERS])}{more})"
    return f"{text} | None" if parameter.optional else text


def _table(line: HandlerLine) -> Table:
    table = Table(
        title=Text(f"{line.name}  ({line.source})"), title_justify="left", show_header=False
    )
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    rows = [("about", line.doc)]
    rows.append(("magic", "any" if line.magic is None else f"{line.magic:#010x}"))
    rows.append(("request", f"{line.request:#06x}"))
    rows += [
        (f"stamp {slot}", f"{value:#018x}")
        for slot, value in enumerate(line.verify, 1)
        if value is not None
    ]
    rows.append(("timeout", _seconds(line.timeout)))
    rows.append(("soft timeout", _seconds(line.soft_timeout)))
    rows += [(name, "yes") for name in ("serial", "shared") if getattr(line, name)]
    rows.append(("settings", ", ".join(line.settings) or "none"))
    if not line.methods:
        rows.append(("methods", "all: handle() takes any"))
    for method in line.methods:
        limits = [
            f"{what}{seconds:g} s"
            for what, seconds in (("soft ", method.soft_timeout), ("", method.timeout))
            if seconds is not None
        ]
        limit = f" ({', '.join(limits)})" if limits else ""
        rows.append((f"{method.code:#06x}", f"{_signature(method)}{limit}: {method.doc}"))
    for what, value in rows:
        table.add_row(Text(what), Text(value))
    return table


def _seconds(timeout: float | None) -> str:
    return "the server's" if timeout is None else f"{timeout:g} s"
