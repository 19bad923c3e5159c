"""One connection to NATS, by nats-py: who we are there, and messages that go without waiting.

- nats-py is for asyncio: on trio there is one clear error.
- It connects again by itself, for as long as it takes. What was published meanwhile it keeps,
  up to a bound; a publisher has to reckon with messages that are lost.
- What NATS says while we are connected has no caller to go to: it is logged, once.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import anyio
from sniffio import current_async_library

from vmibridge.aio.coroutines import DONE, first_step, go_on
from vmibridge.errors import BackendError
from vmibridge.transport.nats.login import (
    denied_by,
    is_refusal,
    login_options,
    reason,
    wants_tls,
)
from vmibridge.transport.nats.message import parts_of
from vmibridge.transport.urls.nats import NatsUrl

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

log: logging.Logger = logging.getLogger(__name__)

_clock = time.monotonic

_CONNECT = 5.0
"""Seconds to try each server of the URL once."""
_PAUSE = 0.2
"""Seconds between two tries to connect again."""
_PENDING = 16 << 20
"""Bytes that are kept while NATS is away."""
_LAST = 2.0
"""Seconds for what was published to be sent, before the connection is closed."""
_ANSWER = 2
"""Seconds for NATS to say that it has taken what was said."""
_HANG_UP = 0.2
"""Seconds for one that never was a connection to be closed."""
_MAX_UNSENT = 64 << 20
_LINGER = 0.1
"""Seconds that messages are taken after a subscription was ended."""
_MAX_PART = 128 << 10
"""Bytes of each part of a message that NATS does not take whole: parts that come show that their
sender lives."""
_TURN = 64
"""Messages, and parts of one, between two turns of the loop: nats-py waits for nothing until its
buffer of `_PENDING` bytes is full, and where NATS takes little at once a large frame has thousands
of parts."""
_BACKLOG = 64 << 10
"""Bytes that nats-py has and the connection has not; what goes out with the next turn is less."""
_MAX_LOGGED = 64
"""Warnings between two connections."""


class _GivenUpError(Exception):
    """Each server was tried once; nats-py itself would go on for ever."""


class NatsClient:
    """See the module. Enter it with `async with`.

    Raises `BackendError` on trio; `NatsRefusedError` when NATS refuses us; `OSError` and
    `TimeoutError` when there is none.
    """

    def __init__(self, url: NatsUrl, name: str) -> None:
        self.url = url
        self.closed: anyio.Event = anyio.Event()
        """For good: nats-py does not try again."""
        self.denied: list[str] = []
        """What NATS has said that it does not permit us."""
        self.at_work = False
        """Set by the owner, when what is denied from here on is to be logged."""
        self.on_trouble: Callable[[], None] = lambda: None
        """Called when `closed` or `denied` is another."""
        self.on_reconnect: Callable[[], None] = lambda: None
        """Called when NATS is there again."""
        self.nats: Client
        self._name = name
        self._logged: set[str] = set()
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
        from vmibridge.transport.nats.patched import NatsPyClient

        options = login_options(self.url)
        client = NatsPyClient(tls=wants_tls(self.url))
        failed: list[Exception] = []
        up = False

        async def on_error(error: Exception) -> None:
            if up:
                self._take_error(error)
                return
            log.debug("%s: %s", self.url, type(error).__name__)
            failed.append(error)
            if is_refusal(error) or len(failed) >= len(self.url.hosts):
                raise _GivenUpError

        try:
            with anyio.fail_after(_CONNECT):
                await client.connect(
                    self.url.servers,
                    error_cb=on_error,
                    closed_cb=self._on_closed,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    name=self._name,
                    connect_timeout=2,
                    reconnect_time_wait=_PAUSE,  # type: ignore[arg-type]
                    max_reconnect_attempts=-1,
                    ping_interval=5,
                    pending_size=_PENDING,
                    inbox_prefix=self.url.inbox,
                    **options,
                )
                if not client.is_connected:
                    # nats-py takes it for a login when the server hangs up in its midst.
                    raise ConnectionResetError
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
        raise reason(next(filter(is_refusal, failed), failed[0])) from None

    @staticmethod
    async def _abandon(client: "Client") -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_HANG_UP):
            await _close(client)

    # --- what nats-py tells -----------------------------------------------------------

    async def _on_closed(self) -> None:
        self.closed.set()
        self.on_trouble()

    async def _on_disconnected(self) -> None:
        if self._up_since is not None:
            self._up_before += _clock() - self._up_since
            self._up_since = None
            if not self._no_more:
                log.info("%s: the connection is lost", self.url)

    async def _on_reconnected(self) -> None:
        self._up_since = _clock()
        self._logged.clear()
        log.info("%s: connected again", self.url)
        self.on_reconnect()

    def _take_error(self, error: Exception) -> None:
        from nats.errors import Error, SlowConsumerError

        denied = denied_by(error)
        if denied is not None:
            if self.at_work:
                self._log_once(denied)
            if denied not in self.denied and len(self.denied) < _MAX_LOGGED:
                self.denied.append(denied)
            self.on_trouble()
        elif isinstance(error, SlowConsumerError):
            self._log_once("messages come faster than they are taken: some are lost")
        elif is_refusal(error):
            self._log_once(f"{reason(error)}; trying again")
        elif isinstance(error, Error | OSError | TimeoutError):
            log.debug("%s: %s", self.url, type(error).__name__)
        else:
            log.error("%s: a message could not be taken", self.url, exc_info=error)

    def _log_once(self, text: str) -> None:
        if text not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(text)
            log.warning("%s: %s", self.url, text)

    def uptime(self) -> float:
        """Seconds that NATS has been there, in all: only then is anybody's silence one."""
        return self._up_before + (0.0 if self._up_since is None else _clock() - self._up_since)

    @property
    def is_up(self) -> bool:
        """Whether NATS is there: it has answered a ping within the last seconds."""
        return self._up_since is not None and not self.closed.is_set()

    @property
    def has_backlog(self) -> bool:
        """Whether much that was published waits here for the connection. What a peer is asked
        stands behind it, so a peer that says nothing then is not silent."""
        return bool(self._unsent) or self.nats.pending_data_size > _BACKLOG

    # --- messages -------------------------------------------------------------------

    def publish(self, subject: str, message: bytes, reply: str = "") -> None:
        """Never waits, raises nothing: a message that cannot be sent is lost.

        Of one in many parts only the first go at once, so that the loop goes on to turn.
        """
        try:
            most = self.nats.max_payload
            # A message that fits stays whole: the parts of a trap could come to several servers.
            if len(message) > most:
                most = min(most, _MAX_PART)
            for number, part in enumerate(parts_of(message, most)):
                if number < _TURN:
                    self._publish(subject, part, reply)
                else:
                    self._keep(subject, part, reply)
        except ValueError as error:
            log.warning("%s: %s", self.url, error)

    def _keep(self, subject: str, part: bytes, reply: str) -> None:
        """For the writer, up to a bound."""
        if self._size + len(part) > _MAX_UNSENT:
            return
        self._size += len(part)
        self._unsent.append((subject, part, reply))
        self._more.set()

    def _publish(self, subject: str, part: bytes, reply: str) -> None:
        # Behind what waits already, also when there is room again: the order of messages holds.
        if self._rest is not None or self._unsent:
            self._keep(subject, part, reply)
            return
        try:
            # A coroutine that waits only when nats-py's buffer is full: mostly one step is all of
            # it, and costs no task.
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
            for number in itertools.count(1):
                if not self._unsent:
                    break
                if not number % _TURN:
                    await asyncio.sleep(0)
                subject, part, reply = self._unsent[0]
                await self._try(self.nats.publish(subject, part, reply))
                # Not before it was sent: an empty queue lets `_publish` send past it.
                self._unsent.popleft()
                self._size -= len(part)
            # As late as that for the same reason.
            self._rest = None

    async def _try(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        log.debug("%s: a message is lost: %s", self.url, type(error).__name__)

    async def settle(self) -> None:
        """Wait until NATS has taken what was said, and has said what it does not permit.

        Raises `OSError` when the connection is lost meanwhile, and what nats-py raises.
        """
        failed: Exception | None = None
        async with anyio.create_task_group() as tasks:

            async def look() -> None:
                await self.closed.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(look)
            # The ping of a flush overtakes what nats-py has not written yet: so twice.
            try:
                for _ in range(2):
                    await self.nats.flush(_ANSWER)
            except Exception as error:
                failed = error
            tasks.cancel_scope.cancel()
        if self.closed.is_set():
            failed = ConnectionResetError()
        if failed is not None:
            raise failed

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


def is_no_responders(message: "Msg") -> bool:
    """Whether this is NATS' "no responders": no subscription where a message was published.

    It has no body, and the status 503 (NATS client protocol, HMSG).
    """
    return not message.data and (message.headers or {}).get("Status") == "503"


async def _close(client: "Client") -> None:
    with suppress(Exception):
        await client.close()
