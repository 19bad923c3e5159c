"""Who we are on NATS: what nats-py is to log in with, and what a refusal means.

- A file of secrets is checked before NATS is asked: nats-py would look for a JWT for ever in
  a file that has none. It is read again for each connection, so it may be renewed.
- Where the URL wants TLS, nothing is said without it. nats-py would go on in the clear when
  a server, or a proxy in between, does not ask for it (`patched`).
- Secrets go to nats-py, and nowhere else: no error says one.
"""

import base64
import re
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vmibridge.errors import NatsRefusedError
from vmibridge.text import printable
from vmibridge.transport.urls.nats import NatsUrl

_MAX_FILE = 1 << 20
"""Bytes of a file of secrets. NATS takes a CONNECT of 4 KiB, unless configured to take more."""
_JWT = re.compile(rb"-BEGIN NATS USER JWT-+\s+([\w.=-]+)")
_SEED = re.compile(rb"-BEGIN USER NKEY SEED-+\s+([A-Z2-7]+)")
_DENIED = "permissions violation for "

_T = TypeVar("_T")


def login_options(url: NatsUrl) -> dict[str, Any]:
    """What nats-py is to connect with. Raises `NatsRefusedError` for a file that does not do."""
    given = (("user", url.user), ("password", url.password), ("token", url.token))
    options: dict[str, Any] = {name: value for name, value in given if value}
    if url.nkey:
        options["nkeys_seed_str"] = _checked("nkey", url.nkey, lambda: _nkey_in(url.nkey))
    if url.credentials:
        file = url.credentials
        _checked("credentials", file, lambda: _signed_by(file, ""))
        options["user_jwt_cb"] = lambda: _again(lambda: _jwt_in(file))
        options["signature_cb"] = lambda nonce: _again(lambda: _signed_by(file, nonce))
    if wants_tls(url):
        options["tls"] = _tls(url)
    return options


def wants_tls(url: NatsUrl) -> bool:
    """Whether nothing is to be said without TLS."""
    return url.tls or bool(url.ca or url.cert)


def _tls(url: NatsUrl) -> ssl.SSLContext:
    context = _checked("ca", url.ca, lambda: ssl.create_default_context(cafile=url.ca or None))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if url.cert:
        # Without a function OpenSSL asks the terminal for a pass phrase.
        no_phrase = str
        load = partial(context.load_cert_chain, url.cert, url.key, no_phrase)
        _checked("cert", f"{url.cert}, {url.key}", load)
    return context


# --- files ----------------------------------------------------------------------------


def _checked(option: str, file: str, made: Callable[[], _T]) -> _T:
    try:
        return made()
    except ssl.SSLError as error:
        why = _words(error, "holds no PEM")
    except OSError as error:
        why = error.strerror or "cannot be read"
    except ValueError as error:
        why = str(error)
    # Not even as a cause: the errors of what reads a secret may hold it.
    raise NatsRefusedError(f"{option}: {file}: {why}") from None


def _again(made: Callable[[], _T]) -> _T:
    """For nats-py, which tries again after an error of its own and stops after any other."""
    from nats.errors import InvalidUserCredentialsError

    try:
        return made()
    except ValueError:
        raise InvalidUserCredentialsError from None


def _read(file: str) -> bytes:
    with Path(file).open("rb") as source:
        return source.read(_MAX_FILE)


def _pair(seed: bytes) -> Any:
    import nkeys  # type: ignore[import-untyped]  # it comes without types

    try:
        return nkeys.from_seed(bytearray(seed))
    except (nkeys.NkeysError, ValueError, TypeError):
        raise ValueError("holds no seed of an nkey") from None


def _nkey_in(file: str) -> str:
    seed = _read(file).strip()
    _pair(seed)
    return seed.decode()


def _jwt_in(file: str) -> bytearray:
    found = _JWT.search(_read(file))
    if found is None:
        raise ValueError("holds no JWT of a user")
    return bytearray(found[1])


def _signed_by(file: str, nonce: str) -> bytes:
    """The signature of the user of a file that has a JWT, too."""
    _jwt_in(file)
    found = _SEED.search(_read(file))
    if found is None:
        raise ValueError("holds no seed of an nkey")
    return base64.b64encode(_pair(found[1]).sign(nonce.encode()))


# --- what NATS says -------------------------------------------------------------------


def is_refusal(error: Exception) -> bool:
    """Whether NATS, or this end, says that we do not do as we are."""
    from nats.errors import (
        AuthorizationError,
        InvalidUserCredentialsError,
        SecureConnRequiredError,
    )

    words = str(error)
    return (
        isinstance(
            error,
            AuthorizationError
            | InvalidUserCredentialsError
            | SecureConnRequiredError
            | ssl.SSLCertVerificationError,
        )
        or "authorization" in words.lower()
        or "authentication" in words.lower()
    )


def denied_by(error: Exception) -> str | None:
    """What NATS does not permit us, in its words; `None`: the error is another one."""
    _, found, what = str(error).partition(_DENIED)
    return f"NATS does not permit {printable(what[:200])}" if found else None


def _words(error: ssl.SSLError, otherwise: str) -> str:
    # One that Python makes by itself has no reason.
    found: str | None = getattr(error, "reason", None)
    return found.lower().replace("_", " ") if found else otherwise


def reason(error: Exception) -> Exception:
    """What to tell of an error. Words of nats-py's own may hold what was sent."""
    from nats.errors import Error, InvalidUserCredentialsError, SecureConnRequiredError

    if isinstance(error, SecureConnRequiredError):
        return NatsRefusedError("NATS does not ask for TLS there, and without it nothing is said")
    if isinstance(error, InvalidUserCredentialsError):
        return NatsRefusedError("the file of credentials does not hold them any more")
    if isinstance(error, ssl.SSLCertVerificationError):
        return NatsRefusedError(f"TLS: the certificate is not accepted: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        return NatsRefusedError(f"TLS: {_words(error, 'no TLS there')}")
    if is_refusal(error):
        expired = " (expired)" if "expired" in str(error).lower() else ""
        return NatsRefusedError(f"NATS refuses us: wrong credentials, or none{expired}")
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return OSError("NATS has closed the connection")
    if isinstance(error, OSError) and error.strerror:
        return OSError(error.errno, error.strerror)
    words = str(error)
    if type(error) is Error and words.startswith("nats: '"):
        # The server's own, as that it has no more room.
        return OSError(f"NATS: {printable(words[6:200])}")
    if type(error) is Error and ("INFO" in words or "json" in words):
        return OSError("what answers there is not a NATS server")
    return OSError(f"NATS: {type(error).__name__}")
