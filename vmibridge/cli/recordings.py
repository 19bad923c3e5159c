"""`vmibridge recordings`: recordings kept in NATS, in an object store of JetStream."""

import sys
from functools import partial
from pathlib import Path

import msgspec

from vmibridge.cli.event_loop import run_on
from vmibridge.errors import BackendSpecError
from vmibridge.text import printable
from vmibridge.transport.nats_store import (
    StoredRecording,
    get_recording,
    list_recordings,
    put_recording,
)
from vmibridge.transport.nats_url import NatsUrl, is_nats_url, parse_nats_url


def put(file: Path, to: str, name: str | None, *, as_json: bool) -> int:
    """Keep a file; returns the exit status. Raises `VmiBridgeError`."""
    _tell([run_on("asyncio", partial(put_recording, _url(to), file, name))], as_json=as_json)
    return 0


def get(name: str, source: str, output: Path | None, *, as_json: bool) -> int:
    """Get one back. Raises as `put`."""
    target = output or Path(Path(name).name)
    _tell([run_on("asyncio", partial(get_recording, _url(source), name, target))], as_json=as_json)
    return 0


def show(source: str, *, as_json: bool) -> int:
    """List what is kept. Raises as `put`."""
    _tell(run_on("asyncio", partial(list_recordings, _url(source))), as_json=as_json)
    return 0


def _url(text: str) -> NatsUrl:
    if not is_nats_url(text):
        raise BackendSpecError(f"{text}: recordings are kept at nats://HOST:PORT")
    return parse_nats_url(text)


def _tell(found: list[StoredRecording], *, as_json: bool) -> None:
    for each in found:
        if as_json:
            sys.stdout.write(msgspec.json.encode(each).decode() + "\n")
        else:
            sys.stdout.write(f"{each.size:>14}  {printable(each.name)}\n")
