"""`vmibridge recordings`: recordings kept in NATS, in an object store of JetStream."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from cyclopts import Parameter

from vmibridge.cli.event_loop import run_on
from vmibridge.cli.options import Json, OptionalOutput, Recording
from vmibridge.cli.streams import json_line
from vmibridge.errors import BackendSpecError
from vmibridge.text import printable
from vmibridge.transport.nats import store as nats_store
from vmibridge.transport.nats.store import StoredRecording
from vmibridge.transport.urls.nats import NatsUrl, is_nats_url, parse_nats_url

_Store: TypeAlias = Annotated[str, Parameter(help="nats://HOST:PORT, as with put.")]


def put_recording(
    file: Annotated[Recording, Parameter(help="A recording that is finished.")],
    to: Annotated[str, Parameter(help="nats://HOST:PORT, with ?bucket= for another store.")],
    /,
    *,
    name: Annotated[
        str | None, Parameter(help="What to keep it as; the name of the file by default.")
    ] = None,
    json: Annotated[Json, Parameter(help="As one JSON object.")] = False,
) -> int:
    """Keep a recording in NATS.

    Exit status: 1 when it could not be kept, 2 for wrong usage.

    Example: vmibridge recordings put run.mcap nats://127.0.0.1:4222
    """
    stored = run_on("asyncio", partial(nats_store.put_recording, _url(to), file, name))
    _print_list([stored], as_json=json)
    return 0


def get_recording(
    name: Annotated[str, Parameter(help="What it is kept as.")],
    source: _Store,
    /,
    *,
    output: Annotated[
        OptionalOutput, Parameter(help="The file to make; NAME, here, by default.")
    ] = None,
    json: Annotated[Json, Parameter(help="As one JSON object.")] = False,
) -> int:
    """Get a recording back.

    Exit status: 1 when it could not be got, 2 for wrong usage.

    Example: vmibridge recordings get run.mcap nats://127.0.0.1:4222 -o again.mcap
    """
    target = output or Path(Path(name).name)
    _print_list(
        [run_on("asyncio", partial(nats_store.get_recording, _url(source), name, target))],
        as_json=json,
    )
    return 0


def list_recordings(
    source: _Store,
    /,
    *,
    json: Annotated[Json, Parameter(help="One JSON object a recording.")] = False,
) -> int:
    """List the recordings that are kept: bytes, name.

    Example: vmibridge recordings list nats://127.0.0.1:4222
    """
    _print_list(run_on("asyncio", partial(nats_store.list_recordings, _url(source))), as_json=json)
    return 0


def _url(text: str) -> NatsUrl:
    if not is_nats_url(text):
        raise BackendSpecError(f"{text}: recordings are kept at nats://HOST:PORT")
    return parse_nats_url(text)


def _print_list(found: list[StoredRecording], *, as_json: bool) -> None:
    for each in found:
        if as_json:
            sys.stdout.write(json_line(msgspec.json.encode(each)).decode())
        else:
            sys.stdout.write(f"{each.size:>14}  {printable(each.name)}\n")
