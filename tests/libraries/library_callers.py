"""The two ways in which the rounds call a library: handlers of a server, and plain tasks.

Both run the same methods of a `Library` with the same deadlines. In both the caller has its answer
at the deadline, whatever the library still does: the request is cancelled, and unwinds by itself.
On asyncio a plain task is cancelled once, by `Task.cancel`; on trio, and where the library relies
on the shields of anyio, by a cancel scope.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
from library_handlers import DEADLINES, METHODS, Library

from vmibridge import BridgePacket, BridgeResponse, BridgeServer, OutcomeKind
from vmibridge.testing import FakeGuest

PLAIN_TASK = "plain task"
HANDLER_TASK = "vmibridge handler"
"""How the tasks of requests are named."""
_PATIENCE = 5.0
"""Seconds after which a plain task that still runs is cancelled once more: its library has lost the
first cancellation (psycopg/psycopg#1345, with `asyncio.wait_for` before Python 3.12), and a request
that takes an hour would hold its connection for an hour. A handler is cancelled again, too."""
_NO_ANSWER = 0xFFFF_FFFF_FFFF_FFFF
_SETTLED = (OutcomeKind.HANDLED, OutcomeKind.TIMEOUT, OutcomeKind.FAILED)

Call = Callable[[int, BridgePacket], Awaitable[int | None]]
"""Has a packet answered for a vCPU; returns value1, or `None` without an answer."""


class Caller(ABC):
    """One run of a library."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.outcomes: Counter[OutcomeKind] = Counter()
        self.deaf = 0
        """Plain tasks that ran on when they were cancelled: see `_PATIENCE`."""

    @abstractmethod
    async def run(self, guest: Callable[[Call], Awaitable[None]]) -> None:
        """Run what calls, to its end, while the library is entered."""


class InHandlers(Caller):
    """A server with the library as its handler."""

    async def run(self, guest):
        async def vm(fake: _ForgetfulGuest) -> None:
            await guest(fake.ask)

        async with _ForgetfulGuest(vm) as backend:
            fallback = BridgeResponse(value1=_NO_ANSWER)
            server = BridgeServer(backend, self.library, fallback=fallback)
            async for outcome in server.run():
                self.outcomes[outcome.kind] += 1
        assert set(self.outcomes) <= set(_SETTLED)


class _ForgetfulGuest(FakeGuest):
    """Keeps no answer: 50,000 of them would be taken for memory that the libraries lose."""

    async def ask(self, vcpu: int, packet: BridgePacket) -> int | None:
        writes = await self.call(packet, vcpu=vcpu)
        if len(self.events) > 64:
            self.events = [event for event in self.events if event.seq in self._open]
            self.writes = {seq: self.writes[seq] for seq in list(self.writes)[-64:]}
        assert writes is not None
        return None if writes.rax == _NO_ANSWER else writes.rax


class InTasks(Caller):
    """What any program does: a task for each request, without vmibridge."""

    async def run(self, guest):
        async with self.library, anyio.create_task_group() as self._tasks:
            await guest(self._call)

    async def _call(self, _vcpu: int, packet: BridgePacket) -> int | None:
        request, deadline = self._request(packet), DEADLINES[packet.method]
        by_scope = self.library.shields or on_trio()
        kind, value = await (self._by_scope if by_scope else self._by_task)(request, deadline)
        self.outcomes[kind] += 1
        return value

    async def _request(self, packet: BridgePacket) -> int:
        # The methods need nothing of the context of a trap.
        return (await METHODS[packet.method](self.library, None, packet)).value1

    async def _by_task(self, request, deadline):
        task = asyncio.create_task(request, name=PLAIN_TASK)
        done, _ = await asyncio.wait([task], timeout=deadline)
        if done:
            return _outcome(task)
        task.cancel()
        # Else what it raises on its way out is logged.
        task.add_done_callback(_outcome)
        asyncio.get_running_loop().call_later(_PATIENCE, self._cancel_again, task)
        return OutcomeKind.TIMEOUT, None

    def _cancel_again(self, task) -> None:
        if not task.done():
            self.deaf += 1
            task.cancel()

    async def _by_scope(self, request, deadline):
        settled, scope = anyio.Event(), anyio.CancelScope()
        outcome = OutcomeKind.FAILED, None

        async def run() -> None:
            nonlocal outcome
            # What it raises is a failure, which is counted as one.
            with scope, suppress(Exception):
                outcome = OutcomeKind.HANDLED, await request
            settled.set()

        self._tasks.start_soon(run, name=PLAIN_TASK)
        with anyio.move_on_after(deadline):
            await settled.wait()
            return outcome
        scope.cancel()
        return OutcomeKind.TIMEOUT, None


def _outcome(task):
    if task.cancelled() or task.exception() is not None:
        return OutcomeKind.FAILED, None
    return OutcomeKind.HANDLED, task.result()


def on_trio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False
