"""TLS of agents and servers: its files, its names, and its code between bytes and bytes.

Both ends show a certificate (mutual TLS 1.3), and each checks that of the other. The code runs in
memory, over whatever socket there is: what would be sent without waiting in the clear is sent
without waiting in TLS, too.
"""

import ssl
from contextlib import suppress
from pathlib import Path

from vmibridge.errors import BackendSpecError, ConnectionLostError
from vmibridge.transport.urls import TlsUrl

__all__ = ["TlsCode", "certified_names", "ssl_reason", "tls_context"]

_CHUNK = 256 << 10
"""Bytes that are decrypted at a time."""


def tls_context(url: TlsUrl, *, server_side: bool) -> ssl.SSLContext:
    """Mutual TLS 1.3. Raises `BackendSpecError` for files that are none of what they should be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        # An agent that comes again shakes hands again.
        context.num_tickets = 0
    # Without a function OpenSSL asks the terminal for a pass phrase.
    no_phrase = str
    for file in (url.cert, url.key, url.ca):
        try:
            is_there = Path(file).is_file()
            if is_there:
                # OpenSSL does not say which of them may not be read.
                Path(file).open("rb").close()
        except OSError as error:  # in a folder that may not be entered, for one
            raise BackendSpecError(f"{url}: {file}: {error.strerror}") from error
        if not is_there:
            raise BackendSpecError(f"{url}: {file}: there is no such file")
    try:
        context.load_cert_chain(url.cert, url.key, no_phrase)
    except (OSError, ValueError) as error:
        raise BackendSpecError(f"{url}: {url.cert}, {url.key}: {_reason(error)}") from error
    try:
        context.load_verify_locations(url.ca)
    except (OSError, ValueError) as error:
        raise BackendSpecError(f"{url}: {url.ca}: {_reason(error)}") from error
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


def certified_names(made: ssl.SSLObject) -> list[tuple[str, str]]:
    """What the peer's certificate is for, kind (`DNS`, `IP Address`, `email`, `URI`) and name: the
    subject alternative names, in the certificate's order (RFC 5280, 4.2.1.6)."""
    certificate = made.getpeercert() or {}
    found = certificate.get("subjectAltName", ())
    return [(str(each[0]), str(each[1])) for each in found]


class TlsCode:
    """TLS over bytes in memory (ssl, "Memory BIO Support")."""

    def __init__(self, context: ssl.SSLContext, name: str | None) -> None:
        self._incoming = ssl.MemoryBIO()
        self._made = ssl.MemoryBIO()
        self.outgoing: bytearray = bytearray()
        self.ssl = context.wrap_bio(
            self._incoming, self._made, server_side=name is None, server_hostname=name
        )

    def feed(self, data: bytes) -> None:
        self._incoming.write(data)

    def shake_hands(self) -> bool:
        """Whether it is done. Raises `ssl.SSLError` when it cannot be."""
        try:
            self.ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self.outgoing += self._made.read()
        return True

    def encrypt(self, plain: bytearray) -> None:
        self.ssl.write(plain)
        plain.clear()
        self.outgoing += self._made.read()

    def decrypt(self, data: bytes) -> bytes:
        """What is whole of it. Raises `ssl.SSLError`; `ConnectionLostError` at the end."""
        self._incoming.write(data)
        parts = []
        part: bytes | None = None
        try:
            while part := self.ssl.read(_CHUNK):
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            part = b""
        # What came before the end counts; the socket tells of the end, too.
        if part == b"" and not parts:
            raise ConnectionLostError("closed by the peer")
        self.outgoing += self._made.read()
        return b"".join(parts)

    def end(self) -> None:
        """Say that nothing follows."""
        with suppress(ssl.SSLWantReadError):
            self.ssl.unwrap()
        self.outgoing += self._made.read()


def ssl_reason(error: ssl.SSLError) -> str:
    """Why TLS failed, in words for a log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
