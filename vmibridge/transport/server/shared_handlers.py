"""What the VMs of one server have in common: handlers that say `shared`, places, turns.

Invariants:

- A shared handler is entered when the first VM comes that has it, in a task of its own, and
  the VMs that have it wait for that. It is left after the last of them: when the server stops,
  or when handlers were reloaded and no set that followed has it.
- One that cannot be entered fails the VMs that wait for it, and is tried again with the next
  that comes.
- One that ends by itself, as by a task group that it holds, ends the VMs that have it first.
- One that is serial has one turn for all VMs.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias

import anyio
from anyio.abc import TaskGroup

from vmibridge.bridge.dispatch import one_line
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.handler_lives import Lives
from vmibridge.engine.places import InFlight, Turns
from vmibridge.engine.settings import DEFAULTS
from vmibridge.errors import HandlerLifeError

log: logging.Logger = logging.getLogger(__name__)

End: TypeAlias = Callable[[], None]
"""Makes a VM end, because a handler that it has ends."""


class _Life:
    """One shared handler."""

    def __init__(self, handler: BridgeHandler[Any], stop_timeout: float) -> None:
        self.handler = handler
        self.lived = Lives([handler], stop_timeout)
        self.turn = anyio.Lock(fast_acquire=True)
        self.users: dict[object, End] = {}
        self.entered = anyio.Event()
        """Or failed, which `error` tells."""
        self.error: Exception | None = None
        self.unused = anyio.Event()
        """No VM has it, and none is to get it any more."""
        self.superseded = False
        """Handlers were reloaded since a VM last used it."""
        self.leaving = False
        self.left = anyio.Event()


class SharedHandlers:
    """See the module. For one server; `in_flight` handlers may wait at a time in all its VMs."""

    def __init__(self, in_flight: int, stop_timeout: float = DEFAULTS.stop_timeout) -> None:
        self._stop_timeout = stop_timeout
        self.in_flight: InFlight = InFlight(in_flight)
        self._lives: dict[BridgeHandler[Any], _Life] = {}
        self._closed = False

    def turns(self) -> Turns:
        """Those of one VM: of its own handlers, and of those that are shared."""
        return _Turns(self._lives)

    @asynccontextmanager
    async def use(
        self, handlers: Iterable[BridgeHandler[Any]], tasks: TaskGroup, end: End
    ) -> AsyncIterator[None]:
        """Have those of `handlers` that are shared for the time of the block, entered.

        `tasks` has to outlive the block. Raises `HandlerLifeError` for one that cannot be
        entered.
        """
        async with AsyncExitStack() as stack:
            for handler in dict.fromkeys(each for each in handlers if each.shared):
                await stack.enter_async_context(self._use(handler, tasks, end))
            yield

    @asynccontextmanager
    async def _use(
        self, handler: BridgeHandler[Any], tasks: TaskGroup, end: End
    ) -> AsyncIterator[None]:
        # A handler is not entered again before it was left. When that is done, another VM may have
        # entered it already: so it is looked up again.
        while (life := self._lives.get(handler)) is not None and life.leaving:
            await life.left.wait()
        if life is None:
            life = self._lives[handler] = _Life(handler, self._stop_timeout)
            tasks.start_soon(self._live, life)
        # A user before it is entered: else the last other one to go would have it left meanwhile.
        user = object()
        life.users[user] = end
        life.superseded = False
        try:
            await life.entered.wait()
            if life.error is not None:
                raise life.error
            yield
        finally:
            del life.users[user]
            self._leave_if_unused(life)

    def _leave_if_unused(self, life: _Life) -> None:
        if not life.users and (life.superseded or life.leaving or self._closed):
            life.leaving = True
            life.unused.set()

    async def _live(self, life: _Life) -> None:
        """Enter a handler, and leave it in the same task, after all that have it."""
        handler = life.handler
        try:
            async with life.lived.lived():
                life.entered.set()
                try:
                    await life.unused.wait()
                finally:
                    # Cancelled, by the server's end or by the handler itself, it has users.
                    # From here on `_use` adds none, so that the wait below comes to an end.
                    life.leaving = True
                    for end in list(life.users.values()):
                        end()
                    with anyio.CancelScope(shield=True):
                        while life.users:
                            await life.unused.wait()
        except Exception as error:
            life.error = (
                error
                if isinstance(error, HandlerLifeError)
                else HandlerLifeError(f"handler {handler.name} ended: {one_line(error)}")
            )
            if life.entered.is_set():
                log.exception("%s", life.error)
        finally:
            if not life.entered.is_set() and life.error is None:
                life.error = HandlerLifeError(f"handler {handler.name} did not start")
            # Before the events: those that they wake must not find this one any more.
            del self._lives[handler]
            life.entered.set()
            life.left.set()

    def supersede(self) -> None:
        """Handlers are being reloaded: those of before end with the VMs that have them,
        but for those that the new ones have, too."""
        for life in self._lives.values():
            life.superseded = True

    def leave_unused(self) -> None:
        """All VMs have the reloaded handlers: leave those that no VM has."""
        for life in self._lives.values():
            self._leave_if_unused(life)

    async def close(self) -> None:
        """No VM comes any more: leave all, as their last users go, and wait for that."""
        self._closed = True
        self.leave_unused()
        for life in list(self._lives.values()):
            # No VM waits any more for one that is being entered.
            life.lived.stop(0)
            await life.left.wait()


class _Turns(Turns):
    """Those of one VM."""

    def __init__(self, lives: dict[BridgeHandler[Any], _Life]) -> None:
        super().__init__()
        self._lives = lives

    def of(self, handler: BridgeHandler[Any]) -> anyio.Lock:
        """Held while this handler answers."""
        life = self._lives.get(handler) if handler.shared else None
        return super().of(handler) if life is None else life.turn
