"""`vmibridge guest-header`: what a guest includes to call handlers."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from vmibridge.cli.event_loop import prints_beside
from vmibridge.cli.options import Json, OptionalOutput, Sources
from vmibridge.cli.output import standard_output
from vmibridge.cli.pipes import STDOUT, say
from vmibridge.cli.streams import json_line
from vmibridge.config import find_handlers
from vmibridge.config.source_files import source_files
from vmibridge.errors import ConfigError, VmiBridgeError
from vmibridge.files import reason, replaceable, write_whole
from vmibridge.guest_header import Language, header_text, models_of


def guest_header(
    sources: Sources,
    /,
    *,
    lang: Annotated[Language, Parameter(help="The language.")] = "c",
    output: Annotated[
        OptionalOutput,
        Parameter(help="The file to make; - or none is standard output."),
    ] = None,
    check: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Make nothing: compare with the file, and exit with 1 if it is another.",
        ),
    ] = False,
    json: Annotated[
        Json, Parameter(help="Print what a header is made of, one JSON object a handler.")
    ] = False,
) -> int:
    """Make the header by which a guest calls handlers: one function a method.

    Example: vmibridge guest-header handlers/notes.py --lang c -o notes.h
    """
    if json and (check or output is not None):
        raise ConfigError("--json prints what a header is made of: give it without -o and --check")
    # What modules print as they are imported is no part of a header.
    with prints_beside(json=True):
        models = models_of(offered.handler for offered in find_handlers(sources))
    if json:
        for model in models:
            sys.stdout.write(json_line(msgspec.json.encode(model)).decode())
        return 0
    text = header_text(models, lang)
    to_stdout = output is None or output == STDOUT
    if check:
        if output is None or to_stdout:
            raise ConfigError("--check: name the file to compare with by -o")
        return _compare(output, text, [*sources, "--lang", lang, "-o", str(output)])
    if output is None or to_stdout:
        with standard_output() as out:
            out.write(text.encode())
        return 0
    if any(output.resolve() == each.resolve() for each in source_files(sources)):
        raise ConfigError(f"-o {output}: is one of the handlers that the header is made of")
    _write(output, text)
    return 0


def _write(target: Path, text: str) -> None:
    data = text.encode()
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)  # a pipe or a device, such as /dev/stdout
        else:
            write_whole(replaceable(target), data)
    except OSError as error:
        raise VmiBridgeError(f"{target}: {reason(error, target)}") from error


def _compare(target: Path, text: str, arguments: list[str]) -> int:
    command = shlex.join(["vmibridge", "guest-header", *arguments])
    try:
        found = target.read_bytes()
    except FileNotFoundError:
        say(f"vmibridge: {target}: is not there; run: {command}")
        return 1
    except OSError as error:
        raise VmiBridgeError(f"{target}: {reason(error, target)}") from error
    if found != text.encode():
        say(f"vmibridge: {target}: is not what the handlers say; run: {command}")
        return 1
    return 0
