"""One connection to NATS, by nats-py: who we are there, and messages that go without waiting.

- nats-py is for asyncio: on trio there is one clear error.
- It connects again by itself, for as long as it takes. What was published meanwhile it keeps,
  up to a bound; whoever publishes has to reckon with messages that are lost.
- Secrets come from the URL and go to nats-py, and nowhere else: no error says one.
"""

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import anyio
from sniffio import current_async_library

from vmibridge.errors import BackendError, VmiBridgeError
from vmibridge.transport.nats_message import parts_of
from vmibridge.transport.nats_url import NatsUrl
from vmibridge.transport.stepping import DONE, first_step, go_on

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

log = logging.getLogger(__name__)

_clock = time.monotonic

_CONNECT = 5.0
"""Seconds to try each server of the URL once."""
_PAUSE = 0.2
"""Seconds between two tries to connect again."""
_PENDING = 16 << 20
"""Bytes that are kept while NATS is away."""
_LAST = 2.0
"""Seconds for what was published to be sent, before the connection is closed."""
_MOST_UNSENT = 64 << 20
_LINGER = 0.1
"""Seconds that messages are taken after a subscription was ended."""


class NatsRefusedError(VmiBridgeError):
    """NATS does not take us: trying again as we are is of no use."""


class _GivenUpError(Exception):
    """Each server was tried once; nats-py itself would go on for ever."""


class NatsClient:
    """See the module. Enter it with `async with`.

    Raises `BackendError` on trio; `NatsRefusedError` when NATS refuses us; `OSError` and
    `TimeoutError` when there is none.
    """

    def __init__(self, url: NatsUrl, name: str) -> None:
        self.url = url
        self.closed = anyio.Event()
        """For good: nats-py does not try again."""
        self.on_reconnect: Callable[[], None] = lambda: None
        """Called when NATS is there again."""
        self._name = name
        self._unsent: deque[tuple[str, bytes, str]] = deque()
        self._size = 0
        self._more = anyio.Event()
        self._rest: Awaitable[None] | None = None
        self._up_before = 0.0
        self._up_since: float | None = None
        self._writer: asyncio.Task[None] | None = None
        self._no_more = False

    async def __aenter__(self) -> Self:
        if current_async_library() != "asyncio":
            raise BackendError(
                f"{self.url}: nats-py is for asyncio: run without --async-backend trio"
            )
        self.nats = await self._connect()
        self._up_since = _clock()
        self._writer = asyncio.get_running_loop().create_task(self._write())
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(2 * _LAST), suppress(Exception):
                self._no_more = True
                self._more.set()
                assert self._writer is not None
                await self._writer
                if self.nats.is_connected:
                    await self.nats.flush(int(_LAST))
            assert self._writer is not None
            self._writer.cancel()
            with suppress(asyncio.CancelledError):
                await self._writer
            await _close(self.nats)

    async def _connect(self) -> "Client":
        from nats.aio.client import Client

        client = Client()
        failed: list[Exception] = []
        up = False

        async def on_error(error: Exception) -> None:
            log.debug("%s: %s", self.url, type(error).__name__)
            if up:
                return
            failed.append(error)
            if _is_refusal(error) or len(failed) >= len(self.url.hosts):
                raise _GivenUpError

        async def on_closed() -> None:
            self.closed.set()

        async def on_disconnected() -> None:
            if self._up_since is not None:
                self._up_before += _clock() - self._up_since
                self._up_since = None
            if not self._no_more:
                log.info("%s: the connection is lost", self.url)

        async def on_reconnected() -> None:
            self._up_since = _clock()
            log.info("%s: connected again", self.url)
            self.on_reconnect()

        try:
            with anyio.fail_after(_CONNECT):
                await client.connect(
                    self.url.servers,
                    error_cb=on_error,
                    closed_cb=on_closed,
                    disconnected_cb=on_disconnected,
                    reconnected_cb=on_reconnected,
                    name=self._name,
                    connect_timeout=2,
                    reconnect_time_wait=_PAUSE,  # type: ignore[arg-type]
                    max_reconnect_attempts=-1,
                    ping_interval=5,
                    pending_size=_PENDING,
                    inbox_prefix=self.url.inbox,
                    **self._options(),
                )
                up = True
                return client
        except TimeoutError:
            await self._abandon(client)
            raise TimeoutError("NATS does not answer") from None
        except _GivenUpError:
            await self._abandon(client)
        except BaseException as error:
            await self._abandon(client)
            if not isinstance(error, Exception):
                raise
            failed.append(error)
        # Closing may fail, too: that is not the reason.
        raise _reason(next(filter(_is_refusal, failed), failed[0])) from None

    @staticmethod
    async def _abandon(client: "Client") -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_LAST):
            await _close(client)

    def _options(self) -> dict[str, Any]:
        url = self.url
        given = (
            ("user", url.user),
            ("password", url.password),
            ("token", url.token),
            ("user_credentials", url.credentials),
            ("nkeys_seed", url.nkey),
        )
        options: dict[str, Any] = {name: value for name, value in given if value}
        if url.tls or url.ca or url.cert:
            options["tls"] = _tls(url)
        return options

    def uptime(self) -> float:
        """Seconds that NATS has been there, in all: only then is anybody's silence one."""
        return self._up_before + (0.0 if self._up_since is None else _clock() - self._up_since)

    # --- messages -------------------------------------------------------------------

    def publish(self, subject: str, message: bytes, reply: str = "") -> None:
        """Never waits, raises nothing: a message that cannot be sent is lost."""
        try:
            for part in parts_of(message, self.nats.max_payload):
                self._publish(subject, part, reply)
        except ValueError as error:
            log.warning("%s: %s", self.url, error)

    def _publish(self, subject: str, part: bytes, reply: str) -> None:
        if self._rest is not None or self._unsent:
            self._size += len(part)
            if self._size > _MOST_UNSENT:
                self._size -= len(part)
                return
            self._unsent.append((subject, part, reply))
            return
        try:
            body = self.nats.publish(subject, part, reply)
            wish = first_step(body)
        except Exception as error:
            self._lose(error)
            return
        if wish is not DONE:
            # Its buffer is full.
            self._rest = go_on(body, wish)
            self._more.set()

    async def _write(self) -> None:
        while not self._no_more:
            await self._more.wait()
            self._more = anyio.Event()
            if self._rest is not None:
                await self._try(self._rest)
            while self._unsent:
                subject, part, reply = self._unsent[0]
                await self._try(self.nats.publish(subject, part, reply))
                self._unsent.popleft()
                self._size -= len(part)
            self._rest = None

    async def _try(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        log.debug("%s: a message is lost: %s", self.url, type(error).__name__)

    async def subscribe(
        self, subject: str, take: Callable[["Msg"], Awaitable[None]], queue: str = ""
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """Call `take` with each message; returns what ends it, once all that came is taken."""
        made = await self.nats.subscribe(subject, queue, cb=take)

        async def end() -> None:
            # nats-py breaks its connection when a flush, which this is, is cancelled.
            with anyio.CancelScope(shield=True), suppress(Exception):
                if not self.nats.is_connected:
                    await made.unsubscribe()
                    return
                # NATS may deliver for a moment after it has said that it does not any more,
                # and nats-py would drop that. It has no public way to wait in between.
                await self.nats._send_unsubscribe(made._id)  # noqa: SLF001
                await anyio.sleep(_LINGER)
                await made.drain()  # type: ignore[no-untyped-call]

        return end


def is_nobody(message: "Msg") -> bool:
    """Whether NATS says that nobody listens where a message was published."""
    return not message.data and (message.headers or {}).get("Status") == "503"


def _tls(url: NatsUrl) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=url.ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if url.cert:
        # Without a function OpenSSL asks the terminal for a pass phrase.
        no_phrase = str
        context.load_cert_chain(url.cert, url.key, no_phrase)
    return context


def _is_refusal(error: Exception) -> bool:
    from nats.errors import AuthorizationError

    return isinstance(error, AuthorizationError) or "authorization" in str(error).lower()


def _reason(error: Exception) -> Exception:
    """What to tell of it; nats-py's own words may hold what was sent."""
    if _is_refusal(error):
        return NatsRefusedError("NATS refuses us: wrong credentials, or none")
    if isinstance(error, ssl.SSLCertVerificationError):
        return NatsRefusedError(f"TLS: the certificate does not do: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        return NatsRefusedError(f"TLS: {error.reason or 'no TLS there'}")
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or "nobody answers")
    return OSError(f"NATS: {type(error).__name__}")


async def _close(client: "Client") -> None:
    with suppress(Exception):
        await client.close()
