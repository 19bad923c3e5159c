"""Whom the handler exec_gate asks: a service by HTTP, or a person by files in a folder.

An asker answers with `True` (go on), `False` (do not), or `None`: it says neither. It is given as
much time as there is by being cancelled, and leaves nothing behind then.
"""

import logging
import ssl
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, Self
from uuid import uuid4

import anyio
import msgspec

from vmibridge import __version__
from vmibridge.errors import MissingExtraError
from vmibridge.handlers._fetch_urls import parse_url
from vmibridge.text import printable, printable_json

if TYPE_CHECKING:
    import httpcore
else:
    try:
        import httpcore
    except ImportError:
        # An optional dependency: `Webhook` says what is missing.
        httpcore = None

__all__ = ["Asker", "Folder", "Question", "Webhook"]

log: logging.Logger = logging.getLogger("vmibridge.exec_gate")

MAX_REPLY = 64 << 10
"""Bytes of the answer of a service."""
LOOK_AGAIN = 0.25
"""Seconds between two looks into the folder."""
_KEEP_ALIVE = 2.0
"""Seconds for which a connection waits for the next question: shorter than servers wait."""
_CLOSE_TIMEOUT = 5.0
"""Seconds after which a connection that does not close is left to the system."""


class Question(msgspec.Struct, frozen=True):
    """What is asked, as JSON."""

    vm: str
    vcpu: int
    address_space: int
    time: int
    """Nanoseconds since the Unix epoch."""
    command: str
    """As the guest gave it: hostile text."""


class _Verdict(msgspec.Struct):
    verdict: Literal["continue", "abort"]


class Asker(ABC):
    """One that is asked, for as long as it is entered."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close what it has open."""

    @abstractmethod
    async def ask(self, question: Question) -> bool | None:
        """The answer. Cancelled when there is no time left."""


class Webhook(Asker):
    """Asks a service: POST of the question, answered by 200 and `{"verdict": "continue"}` or
    `{"verdict": "abort"}`. Anything else is no answer. Raises `MissingExtraError` without httpcore.
    """

    def __init__(self, url: str, token: str) -> None:
        if httpcore is None:
            raise MissingExtraError("the webhook of exec_gate", "exec_gate")
        self._url = parse_url(url)
        self._headers: dict[bytes | str, bytes | str] = {
            "Host": self._url.authority,
            "Content-Type": "application/json",
            "User-Agent": f"vmibridge/{__version__}",
        }
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool: httpcore.AsyncConnectionPool | None = None

    async def __aenter__(self) -> Self:
        """Make the pool; connections are made when a guest asks."""
        secure = self._url.scheme == "https"
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context() if secure else None,
            max_connections=None,  # how many questions there are is bounded
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=httpcore.AnyIOBackend(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            with anyio.move_on_after(_CLOSE_TIMEOUT, shield=True):
                await pool.aclose()

    async def ask(self, question: Question) -> bool | None:
        assert self._pool is not None
        scheme, host, port, *_ = self._url
        url = httpcore.URL(scheme=scheme, host=host, port=port, target=self._url.target)
        try:
            async with self._pool.stream(
                "POST",
                url,
                headers=self._headers,
                content=msgspec.json.encode(question),
            ) as response:
                body = bytearray()
                # To its end: a generator that is left in the middle is the garbage collector's.
                async for chunk in response.aiter_stream():
                    if len(body) <= MAX_REPLY:
                        body += chunk
            if len(body) > MAX_REPLY:
                raise ValueError(f"a reply of more than {MAX_REPLY} bytes")
            if response.status != 200:
                raise ValueError(f"HTTP status {response.status}")
            verdict = msgspec.json.decode(bytes(body), type=_Verdict).verdict
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
            OSError,
            ValueError,  # msgspec's errors are, too
        ) as error:
            why = printable(str(error)) or type(error).__name__
            log.warning("exec_gate: no answer of the webhook: %s", why)
            return None
        return verdict == "continue"


class Folder(Asker):
    """Asks a person, by a file in a folder: `ID.json` is the question.

    It is answered by making `ID.continue` or `ID.abort` beside it; both files are gone then. The
    folder is made for its owner alone: who may write into it decides.
    """

    def __init__(self, path: str) -> None:
        self._folder = anyio.Path(path)

    async def __aenter__(self) -> Self:
        """Warn where the folder is not there and cannot be made."""
        path, there = printable(str(self._folder)), await self._folder.exists()
        if not await (self._folder if there else self._folder.parent).is_dir():
            what = "is no folder" if there else "the folder around it is not there"
            log.warning("exec_gate: %s: %s", path, what)
        return self

    async def ask(self, question: Question) -> bool | None:
        number = uuid4().hex[:12]
        asked = self._folder / f"{number}.json"
        # In this order: of two answers the one that lets nothing happen counts.
        answers = {False: asked.with_suffix(".abort"), True: asked.with_suffix(".continue")}
        try:
            await self._folder.mkdir(mode=0o700, exist_ok=True)
            try:
                await self._write(asked, question)
                log.warning("exec_gate: %s waits for an answer", printable(str(asked)))
                while True:
                    for answer, path in answers.items():
                        if await path.exists():
                            return answer
                    await anyio.sleep(LOOK_AGAIN)
            finally:
                with anyio.CancelScope(shield=True):
                    for path in (asked, *answers.values()):
                        await path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("exec_gate: no answer: %s", printable(str(error)))
            return None

    async def _write(self, path: anyio.Path, question: Question) -> None:
        # A person reads it at a terminal, and whole: so it is renamed when it is.
        data = msgspec.json.format(printable_json(msgspec.json.encode(question)))
        part = path.with_suffix(".part")
        try:
            await part.touch(mode=0o600, exist_ok=False)
            await part.write_bytes(data + b"\n")
            await part.rename(path)
        finally:
            with anyio.CancelScope(shield=True):
                await part.unlink(missing_ok=True)
