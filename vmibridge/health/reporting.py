"""Has a process tell of its health while it runs: over its socket, and to its service manager."""

import logging
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Self, TypeVar

import anyio

from vmibridge.health.answers import answer_health, health_socket
from vmibridge.health.notices import Notices
from vmibridge.health.state import Event, Health

__all__ = ["run_reporting"]

log: logging.Logger = logging.getLogger(__name__)

R = TypeVar("R")

_MAX_UNSENT = 16
"""Notices that are kept while the service manager takes none."""


async def run_reporting(
    main: Callable[[], Awaitable[R]],
    health: Health,
    *,
    path: str | None,
    notices: Notices | None,
) -> R:
    """Run `main`, and tell of `health` until it has ended. Returns what it returns, and raises what
    it raises.

    `path`: of the health socket. `notices`: what the service manager gets. Without both, nothing
    runs beside it. Raises `ConfigError` where the path cannot be had: `main` is not begun then. If
    cancelled, cancels `main`, and tells of its end, too.
    """
    if path is None and notices is None:
        return await main()
    failed: BaseException | None = None
    returned: list[R] = []
    opened = nullcontext() if path is None else health_socket(path)
    async with opened as listener, anyio.create_task_group() as tasks:
        if listener is not None:
            tasks.start_soon(answer_health, listener, health)
        if notices is not None:
            tasks.start_soon(_notify, notices, health)
        try:
            returned.append(await main())
        except BaseException as error:
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
            # Raised in here, it would come out in a group.
            failed = error
        tasks.cancel_scope.cancel()
    if failed is not None:
        try:
            raise failed
        finally:
            # Else a circle with all that it was raised in.
            del failed
    return returned[0]


async def _notify(notices: Notices, health: Health) -> None:
    """Send what is due, until cancelled."""
    with _Manager(notices.address) as manager:

        def pass_on(event: Event) -> None:
            # At once: the loop may be held up by the very thing that it tells of.
            notice = notices.event(event, time.monotonic())
            if notice is not None:
                manager.send(notice)

        health.observe(pass_on)
        while True:
            for notice in notices.look(health.report("ready"), time.monotonic()):
                manager.send(notice)
            await anyio.sleep(notices.pause)


class _Manager:
    """The socket of a service manager. Sends without waiting, and raises nothing."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._unsent: deque[bytes] = deque(maxlen=_MAX_UNSENT)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, notice: bytes) -> None:
        """Send it, behind those that could not be sent before."""
        self._unsent.append(notice)
        try:
            while self._unsent:
                self._socket.sendto(self._unsent[0], self._address)
                self._unsent.popleft()
        except OSError as error:
            log.debug("the service manager takes no notice: %s", error)
