"""URLs as the fetch handler reads them: once, and in one way.

What is compared with the list is what is sent. A text that two parsers might read in two ways is
refused, so that no server behind the list understands another URL than the one that was checked.
"""

import re
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple
from urllib.parse import unquote

__all__ = ["MAX_URL", "Url", "parse_prefix", "parse_url"]

MAX_URL = 2048
"""Bytes of a URL, without its NUL."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Url(NamedTuple):
    """A URL in its parts, as they are compared and sent: there is no second parser."""

    scheme: str
    host: str
    """In lower case; an IPv6 address in its shortest form, without brackets."""
    port: int
    path: str
    """From its first slash; as the guest wrote it, escapes included."""
    query: str
    """With its question mark, or empty."""

    @property
    def authority(self) -> str:
        """Host and port, as in the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """Path and query, as in the request line."""
        return self.path + self.query

    def is_under(self, prefix: "Url") -> bool:
        """Whether scheme, host and port are the prefix's, and the path is at or below it."""
        if self[:3] != prefix[:3]:
            return False
        # A prefix with a slash at its end does not cover the path without it.
        below = prefix.path if prefix.path.endswith("/") else prefix.path + "/"
        return self.path == prefix.path or self.path.startswith(below)


_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?"
    r"(?P<query>\?[^#]*)?"
    r"(?:#.*)?",
    re.IGNORECASE | re.ASCII,
)


def parse_url(text: str) -> Url:
    """Take a URL apart; its fragment is dropped.

    Raises `ValueError` for anything that two parsers might read in two ways: user
    names, backslashes, control and non-ASCII characters, dot segments (escaped ones
    too), hosts that are numbers in disguise.
    """
    if not all("!" <= char <= "~" and char != "\\" for char in text):
        raise ValueError("a URL is printable ASCII without spaces and backslashes")
    found = _URL.fullmatch(text)
    if found is None:
        raise ValueError("not of the form http[s]://HOST[:PORT][/PATH][?QUERY]")
    scheme = found["scheme"].lower()
    port = int(found["port"] or _DEFAULT_PORTS[scheme])
    if not 1 <= port <= 65535:
        raise ValueError(f"a port is 1 to 65535, got {port}")
    path = found["path"] or "/"
    _check_path(path)
    return Url(scheme, _parse_host(found["host"].lower()), port, path, found["query"] or "")


def _parse_host(host: str) -> str:
    if host.startswith("["):
        return str(IPv6Address(host[1:-1]))
    labels = host.split(".")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        # To a resolver 127.1 and 0x7f000001 are addresses: only the plain form is read.
        return str(IPv4Address(host))
    if len(host) > 253 or not all(1 <= len(label) <= 63 for label in labels):
        raise ValueError("a host has labels of 1 to 63 characters, 253 in all")
    return host


def _check_path(path: str) -> None:
    """Raise `ValueError` for a path that a server could read as another one."""
    # Servers decode once; what stands behind them may do so again.
    for _ in range(4):
        for segment in re.split(r"[/\\]", path):
            # Some servers cut off parameters (`..;x`), or blanks and dots at the end.
            name = segment.partition(";")[0]
            if name and not name.strip(". "):
                raise ValueError("a path has no dot segments")
        if any(char < " " or char == "\x7f" for char in path):
            raise ValueError("a path has no control characters")
        decoded = unquote(path, "latin-1")
        if decoded == path:
            return
        path = decoded
    raise ValueError("a path that is escaped over and over")


def parse_prefix(text: str) -> Url:
    url = parse_url(text)
    if url.query or "#" in text:
        raise ValueError("a prefix has neither query nor fragment")
    return url
