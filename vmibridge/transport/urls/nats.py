"""`nats://` and `tls://` URLs: where NATS is, and how to log in there.

| option | means |
|---|---|
| `user`, `password` | as NATS has them; `password-file` keeps it out of the command line |
| `token`, `token-file` | a token |
| `credentials` | a file of a user's JWT and seed, as `nsc` makes it |
| `nkey` | a file with the seed of an nkey |
| `ca`, `cert`, `key` | TLS: who the server's certificate is of, and one for this end |
| `inbox` | the prefix of reply subjects, `_INBOX` by default |
| `partitions` | of an agent: publish to the pinned subjects |
| `partition`, `subject` | of a server: listen there, not at `vmibridge.*.*.*` |
| `bucket` | of `vmibridge recordings`: the object store |
| `silence` | seconds without a word about a trap until its server counts as gone; 3 |

A URL never shows its secrets: `str` and `repr` are the hosts only.
"""

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec

from vmibridge.errors import BackendSpecError, MissingExtraError
from vmibridge.vm.spec import check_text, port_number, read_options

PORT = 4222
TRAPS: Final = "vmibridge.*.*.*"
"""Where a server listens for traps, by default; what the tokens are is in `nats.subjects`."""

_MAX_NAME, _MAX_LABEL = 253, 63
"""Characters of a host's name, and between two dots of it (RFC 1035, 2.3.4)."""
_NO_HOST = re.compile(r"[^!-~\u00a1-\U0010ffff]|[/\\?#@:\[\]]")
_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
_PATTERN = re.compile(r"([^\s.*>]+|\*)(\.([^\s.*>]+|\*))*(\.>)?")


class NatsUrl(msgspec.Struct, frozen=True):
    """One NATS, which may be a cluster."""

    hosts: tuple[str, ...]
    """HOST:PORT of each server."""
    tls: bool = False
    user: str = ""
    password: str = ""
    token: str = ""
    credentials: str = ""
    nkey: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    inbox: str = "_INBOX"
    partitions: int = 0
    subjects: tuple[str, ...] = (TRAPS,)
    """Where a server listens for traps."""
    bucket: str = "vmibridge-recordings"
    silence: float = 3.0

    def __str__(self) -> str:
        return f"{'tls' if self.tls else 'nats'}://{','.join(self.hosts)}"

    def __repr__(self) -> str:
        return f"NatsUrl({str(self)!r})"

    @property
    def servers(self) -> list[str]:
        """As nats-py takes them."""
        return [f"{'tls' if self.tls else 'nats'}://{host}" for host in self.hosts]


_OPTIONS = (
    *("user", "password", "password-file", "token", "token-file", "credentials", "nkey"),
    *("ca", "cert", "key", "inbox", "partitions", "partition", "subject", "bucket", "silence"),
)


def is_subject(text: str) -> bool:
    """Whether something may be published there."""
    return _SUBJECT.fullmatch(text) is not None


def is_pattern(text: str) -> bool:
    """Whether one may subscribe to it."""
    return _PATTERN.fullmatch(text) is not None


def is_host(text: str) -> bool:
    """Whether it may be the name of a host (RFC 1123, as far as resolvers insist), or an address.

    Resolvers differ in what they raise for a label that is empty or too long, so none is asked.
    """
    try:
        return bool(ip_address(text))
    except ValueError:
        pass
    labels = text.removesuffix(".").split(".")
    return (
        len(text) <= _MAX_NAME
        and _NO_HOST.search(text) is None
        and all(0 < len(label) <= _MAX_LABEL for label in labels)
    )


def is_nats_url(text: str) -> bool:
    """Whether it is one by its scheme."""
    return text.startswith(("nats:", "tls://"))


def parse_nats_url(text: str) -> NatsUrl:
    """Raises `BackendSpecError` for a URL that is wrong, `MissingExtraError` without nats-py.

    Neither says what secrets were in it.
    """
    place, _, query = text.partition("?")
    scheme, slashes, where = place.partition("://")
    shown = f"{scheme}://{where.rpartition('@')[2]}"
    check_text(shown)
    if not slashes or scheme not in ("nats", "tls"):
        raise BackendSpecError(f"{scheme.partition(':')[0]}: a URL of NATS is nats://HOST:PORT")
    if "@" in where:
        raise BackendSpecError(
            f"{shown}: user and password are options, as in {shown}?user=web&password-file=FILE"
        )
    hosts = tuple(_host(shown, each) for each in where.rstrip("/").split(","))
    options = dict(read_options(shown, query, _OPTIONS, secret=True))
    for name in ("password", "token"):
        file = options.pop(f"{name}-file", None)
        if file is not None:
            if name in options:
                raise BackendSpecError(f"{shown}: {name} and {name}-file do not go together")
            options[name] = _secret(shown, file)
    for name in ("credentials", "nkey", "ca", "cert", "key"):
        if name in options and not Path(options[name]).is_file():
            raise BackendSpecError(f"{shown}: {name}: {options[name]}: there is no such file")
    if ("cert" in options) != ("key" in options):
        raise BackendSpecError(f"{shown}: cert and key go together")
    url = NatsUrl(
        hosts,
        scheme == "tls",
        partitions=_number(shown, "partitions", options.pop("partitions", "0")),
        subjects=_subjects(shown, options),
        silence=_seconds(shown, options.pop("silence", "3")),
        **options,
    )
    if not is_subject(url.inbox) or url.inbox.startswith("vmibridge"):
        raise BackendSpecError(f"{shown}: inbox is the beginning of a subject, as in _INBOX_web")
    try:
        import nats  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("nats://", "nats") from error
    return url


def _host(shown: str, text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(PORT)
    known = host.strip("[]")
    if not known or (":" in known) != host.startswith("["):
        raise BackendSpecError(f"{shown}: HOST:PORT is missing, as in nats://nats.example:4222")
    number = port_number(port)
    if number <= 0:
        raise BackendSpecError(f"{shown}: a port is a number up to 65535")
    if not is_host(known):
        raise BackendSpecError(f"{shown}: {known} is neither a host name nor an address")
    return f"{host}:{number}"


def _secret(shown: str, file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise BackendSpecError(f"{shown}: {file}: {why}") from None


def _number(shown: str, name: str, text: str) -> int:
    number = 1 << 16 if text == "65536" else port_number(text)
    if number < 0:
        raise BackendSpecError(f"{shown}: {name} is a number up to 65536, got {text[:40]!r}")
    return number


def _seconds(shown: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise BackendSpecError(f"{shown}: silence is 0.05 to 3600 seconds, got {text!r}")
    return seconds


def _subjects(shown: str, options: dict[str, str]) -> tuple[str, ...]:
    found = [each for each in options.pop("subject", "").split(",") if each]
    for each in found:
        if not is_pattern(each):
            raise BackendSpecError(f"{shown}: {each!r} is not a subject")
    found += [
        f"vmibridge-pinned.{_number(shown, 'partition', each)}.>"
        for each in options.pop("partition", "").split(",")
        if each
    ]
    return tuple(found) or (TRAPS,)
