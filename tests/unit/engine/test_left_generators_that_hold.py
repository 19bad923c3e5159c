"""A handler leaves an async generator, and then waits for what the generator holds.

A cursor that streams holds the lock of its connection, and the connection is committed on the way
out of the handler. So it is with `psycopg`, which `make test-libraries` tries.
"""

import asyncio

import anyio
import anyio.lowlevel
import pytest
from misbehaving import Misbehaves, run_guest

from vmibridge import BridgeResponse, OutcomeKind, method

pytestmark = pytest.mark.anyio

# Locks of trio and of anyio belong to the task that took them.
on_loops_where_locks_belong_to_nobody = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)


class Connection:
    """Streams and commits, one at a time."""

    def __init__(self):
        self.lock = asyncio.Lock()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        async with self.lock:
            await anyio.lowlevel.checkpoint()

    async def stream(self):
        async with self.lock:
            yield 1
            yield 2


class Streams(Misbehaves):
    @method(1)
    async def go(self, vmi, packet):
        async with Connection() as connection:
            async for row in connection.stream():
                return BridgeResponse(value1=row)
        return None

    @method(2)
    async def under_a_scope(self, vmi, packet):
        with anyio.fail_after(60):
            return await self.go(vmi, packet)


@on_loops_where_locks_belong_to_nobody
@pytest.mark.parametrize("method", [1, 2])
async def test_the_generator_is_closed_while_the_handler_waits(method):
    async def scenario(caller):
        # The first has the task of a worker, the others one of their own.
        return [(await caller.call(method)).kind for _ in range(3)]

    assert await run_guest(Streams(), scenario, timeout=5.0) == [OutcomeKind.HANDLED] * 3


async def test_one_that_holds_a_scope_is_closed_in_the_task_of_the_handler():
    seen = []

    async def rows():
        begun_in = anyio.get_current_task().id
        with anyio.move_on_after(60):
            try:
                yield 1
                yield 2
            finally:
                seen.append(anyio.get_current_task().id == begun_in)

    class Waits(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            async for _ in rows():
                break
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            return BridgeResponse(value1=1)

    async def scenario(caller):
        return [(await caller.call()).kind for _ in range(3)]

    assert await run_guest(Waits(), scenario) == [OutcomeKind.HANDLED] * 3
    assert seen == [True] * 3


async def test_several_that_are_left_are_closed_before_the_answer_each_in_the_task_of_the_handler():
    """Closing the one waits, and the loop turns meanwhile: it is handed none of the others."""
    seen = []

    async def rows():
        begun_in = anyio.get_current_task().id
        try:
            yield 1
        finally:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            seen.append(anyio.get_current_task().id == begun_in)

    class Several(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            for _ in range(3):
                async for _ in rows():
                    break
            return BridgeResponse(value1=1)

    async def scenario(caller):
        outcome = await caller.call()
        return outcome.kind, list(seen)

    assert await run_guest(Several(), scenario) == (OutcomeKind.HANDLED, [True] * 3)
