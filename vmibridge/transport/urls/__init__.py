"""Where an agent connects to, and where a server listens.

| URL | options | who may connect |
|---|---|---|
| `unix:PATH` | `mode=0o600`, `uid=0,1000` | these users; by default the server's own, and root |
| `tcp:HOST:PORT` | `anywhere=true` | anyone, so HOST is this machine unless `anywhere` says so |
| `tls:HOST:PORT` | `cert`, `key`, `ca`, `names=A,B`, `name` | who has a certificate of `ca` |
| `nats://HOST:PORT,...` | those of `urls.nats` | as NATS says |

TLS is mutual: both ends have a certificate, and there is no way around it. `names` are the DNS
names of the clients that a server takes (all of its authority, when there are none), among the
subject alternative names of their certificates, of which each needs one; `name` is the server
that an agent expects, by default HOST.
"""

from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias

import msgspec

from vmibridge.errors import BackendSpecError
from vmibridge.transport.urls.nats import NatsUrl, is_host, is_nats_url, parse_nats_url
from vmibridge.vm.spec import check_text, parse_options, port_number


class UnixUrl(msgspec.Struct, frozen=True):
    """A unix socket."""

    path: Path
    mode: int = 0o600
    """Of the file."""
    uids: tuple[int, ...] = ()
    """Users that may connect; none: the server's own, and root."""

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpUrl(msgspec.Struct, frozen=True):
    """TCP in the clear."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{_bracketed(self.host)}:{self.port}"


class TlsUrl(msgspec.Struct, frozen=True):
    """TLS 1.3 over TCP."""

    host: str
    port: int
    cert: Path
    """This end's certificate, with those between it and the authority; PEM."""
    key: Path
    """Its private key; PEM, without a pass phrase."""
    ca: Path
    """The authorities that the other end's certificate may be of; PEM."""
    names: tuple[str, ...] = ()
    """DNS names of the clients that may connect; none: all that `ca` has certified."""
    name: str = ""
    """The server that is expected; by default the host."""

    def __str__(self) -> str:
        return f"tls:{_bracketed(self.host)}:{self.port}"


SocketUrl: TypeAlias = UnixUrl | TcpUrl | TlsUrl
Url: TypeAlias = SocketUrl | NatsUrl


class _UnixOptions(msgspec.Struct, forbid_unknown_fields=True):
    mode: int = 0o600
    uid: str = ""


class _TcpOptions(msgspec.Struct, forbid_unknown_fields=True):
    anywhere: bool = False


class _TlsOptions(msgspec.Struct, forbid_unknown_fields=True):
    cert: str
    key: str
    ca: str
    names: str = ""
    name: str = ""


def parse_url(text: str) -> Url:
    """Raises `BackendSpecError` for a URL that is wrong, or opens a door to anyone;
    `MissingExtraError` for one of NATS without nats-py."""
    check_text(text)
    if is_nats_url(text):
        return parse_nats_url(text)
    scheme, _, rest = text.partition(":")
    where, _, query = rest.partition("?")
    if scheme == "unix":
        if not where:
            raise BackendSpecError(f"{text}: the path of a socket is missing")
        unix = parse_options(text, query, _UnixOptions, numbers={})
        try:
            uids = tuple(int(uid) for uid in unix.uid.split(",") if uid)
        except ValueError:
            uids = (-1,)
        if any(uid < 0 for uid in uids):
            raise BackendSpecError(f"{text}: uid={unix.uid} is not numbers, as in 0,1000")
        return UnixUrl(Path(where), unix.mode, uids)
    if scheme == "tcp":
        host, port = _host_and_port(text, where)
        tcp = parse_options(text, query, _TcpOptions, numbers={})
        if not tcp.anywhere and not _is_loopback(host):
            raise BackendSpecError(
                f"{text}: anyone there could connect: use tls:, or say anywhere=true"
            )
        return TcpUrl(host, port)
    if scheme == "tls":
        host, port = _host_and_port(text, where)
        tls = parse_options(text, query, _TlsOptions, numbers={})
        names = tuple(name for name in tls.names.split(",") if name)
        return TlsUrl(
            host, port, Path(tls.cert), Path(tls.key), Path(tls.ca), names, tls.name or host
        )
    raise BackendSpecError(
        f"{text}: a URL is unix:PATH, tcp:HOST:PORT, tls:HOST:PORT?cert=&key=&ca= or"
        " nats://HOST:PORT"
    )


def _host_and_port(text: str, where: str) -> tuple[str, int]:
    host, colon, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BackendSpecError(f"{text}: an IPv6 address is in brackets, as in tcp:[::1]:7000")
    number = port_number(port)
    if host and port.isdecimal() and number < 0:
        raise BackendSpecError(f"{text}: a port is a number up to 65535")
    if not colon or not host or number < 0:
        raise BackendSpecError(f"{text}: HOST:PORT is missing, as in tcp:127.0.0.1:7000")
    if not is_host(host):
        raise BackendSpecError(f"{text}: {host} is neither a host name nor an address")
    return host, number


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
