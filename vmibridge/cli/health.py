"""`vmibridge health`: whether a process serves, or a socket is listening; for the health check of a
container.

Where a process has a health socket, its event loop is asked (`vmibridge.health.ask`), which
`__main__` has done before this is imported if the arguments are right.

Else a place is looked at. It connects, and hangs up before a word is said: neither host nor server
takes that for a guest or an agent. NATS speaks first, so there its greeting is waited for.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmibridge.cli.options import HealthSocket, Json, check_seconds
from vmibridge.errors import BackendError, ConfigError
from vmibridge.health.ask import CHECKS, WITHIN, ask_health

_NATS_PORT = 4222
_GREETING = b"INFO "
"""What a NATS server begins with (NATS client protocol, INFO)."""


def health(
    where: Annotated[
        str | None,
        Parameter(
            help="In the place of a health socket, what should be listening: unix:PATH,"
            " tcp:HOST:PORT, tls:HOST:PORT or nats://HOST:PORT; without either, VMIBRIDGE_HEALTH.",
        ),
    ] = None,
    /,
    *,
    live: Annotated[
        bool, Parameter(negative=(), help="Whether the event loop turns: else restart it.")
    ] = False,
    started: Annotated[
        bool, Parameter(negative=(), help="Whether it has begun to serve, wherever others are.")
    ] = False,
    ready: Annotated[
        bool, Parameter(negative=(), help="Whether it would answer a trap now; by default.")
    ] = False,
    health_socket: HealthSocket = None,
    within: Annotated[float, Parameter(help="Seconds until that counts as a failure.")] = WITHIN,
    json: Annotated[Json, Parameter(help="The answer as one JSON object.")] = False,
) -> int:
    """Tell whether a process serves, or a socket listens: the health check of a container.

    A process with --health-socket is asked itself. Without one, a place is looked at.

    Exit status: 0 when it is so, 1 when it is not, 2 for wrong usage.

    Example: vmibridge health --ready --health-socket /run/vmibridge/health.sock
    """
    check_seconds("--within", within)
    checks = [name for name, given in zip(CHECKS, (live, started, ready), strict=True) if given]
    if len(checks) > 1:
        raise ConfigError(f"--{checks[0]} and --{checks[1]}: ask one of them at a time")
    if where is None and health_socket:
        return ask_health(health_socket, *(checks or ["ready"]), within=within, as_json=json)
    if checks or json:
        option = f"--{checks[0]}" if checks else "--json"
        raise ConfigError(f"{option} asks a process: give its --health-socket PATH, and no place")
    where = where or os.environ.get("VMIBRIDGE_HEALTH")
    if where is None:
        raise ConfigError(
            "say whom to ask: --health-socket PATH, or VMIBRIDGE_HEALTH_SOCKET;"
            " or where to look: unix:PATH, or VMIBRIDGE_HEALTH"
        )
    # Options, as of --listen, may be there: they are of no use here.
    place = where.partition("?")[0]
    if "@" in place and not place.startswith("unix:"):
        raise ConfigError("a user and a password are not used here: leave them out")
    connect = _connection(place)
    deadline = time.monotonic() + within
    try:
        with connect(within) as connected:
            if place.startswith("nats:"):
                _await_greeting(place, connected, deadline)
    except TimeoutError:
        raise BackendError(f"{place}: no answer in {within:g} s") from None
    except FileNotFoundError:
        raise BackendError(f"{place}: there is no such file") from None
    except ConnectionRefusedError:
        raise BackendError(f"{place}: {_refused(place)}") from None
    except OSError as error:
        raise BackendError(f"{place}: {error.strerror or error}") from error
    sys.stdout.write(f"{place}: listening\n")
    return 0


def _connection(place: str) -> Callable[[float], socket.socket]:
    scheme, _, rest = place.partition(":")
    if scheme == "unix" and rest:
        return lambda within: _connect_unix(rest, within)
    if scheme in ("tcp", "tls", "nats"):
        # As of --connect; the first of several servers of NATS.
        address = _address(rest.removeprefix("//").partition(",")[0], scheme == "nats")
        if address is not None:
            return lambda within: socket.create_connection(address, within)
    raise ConfigError(
        f"{place}: a place is unix:PATH, tcp:HOST:PORT, tls:HOST:PORT or nats://HOST:PORT"
    )


def _address(text: str, is_nats: bool) -> tuple[str, int] | None:
    """Where to connect to; a server that listens at all addresses is at this machine's own."""
    host, _, port = text.rpartition(":")
    if is_nats and (not host or text.endswith("]")):
        host, port = text, str(_NATS_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        return None
    try:
        if ip_address(host).is_unspecified:
            host = "localhost"
    except ValueError:
        pass
    return host, int(port)


def _connect_unix(path: str, within: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(within)
        made.connect(path)
    except BaseException:
        made.close()
        raise
    return made


def _refused(place: str) -> str:
    path = Path(place.removeprefix("unix:"))
    if place.startswith("unix:") and not path.is_socket():
        return "is not a socket"
    return "nothing listens here"


def _await_greeting(place: str, connected: socket.socket, deadline: float) -> None:
    got = b""
    while len(got) < len(_GREETING):
        connected.settimeout(max(deadline - time.monotonic(), 0.001))
        data = connected.recv(len(_GREETING) - len(got))
        if not data:
            break
        got += data
    if got != _GREETING:
        raise BackendError(f"{place}: listening, but not as a NATS server")
