"""What a handler does to itself ends with its trap."""

import asyncio
import logging

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from misbehaving import Misbehaves, on_asyncio, run_guest

from vmibridge import BridgeResponse, OutcomeKind, method

pytestmark = pytest.mark.anyio


class Own(BaseException):
    pass


class Speechless(BaseException):
    def __str__(self):
        raise self

    __repr__ = __str__


ERRORS = [
    LookupError("x"),
    Own(),
    Speechless(),
    SystemExit(3),
    GeneratorExit(),
    StopIteration(),
    StopAsyncIteration(),
    BaseExceptionGroup("several", [Own(), ValueError()]),
    BaseExceptionGroup("several", [Speechless()]),
]


async def all_kinds(caller, calls=3):
    return [(await caller.call()).kind for _ in range(calls)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
async def test_whatever_a_handler_raises_fails_its_trap(error, waits, caplog):
    class Raises(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            if waits:
                await anyio.lowlevel.checkpoint()
            raise error

        @method(2)
        async def other(self, vmi, packet):
            return BridgeResponse(value1=1)

    async def scenario(caller):
        return await all_kinds(caller), (await caller.call(2, vcpu=1)).kind

    kinds, other = await run_guest(Raises(), scenario)
    assert kinds == [OutcomeKind.FAILED] * 3
    assert other is OutcomeKind.HANDLED
    line = Raises.go.__code__.co_firstlineno + 4
    assert f"at {__file__}:{line}: " in caplog.text


async def test_the_cancellation_of_another_loop_fails_its_trap(anyio_backend):
    class Raises(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            raise asyncio.CancelledError

    kinds = await run_guest(Raises(), all_kinds)
    ours = anyio_backend[0] == "asyncio"
    assert kinds == [OutcomeKind.CANCELLED if ours else OutcomeKind.FAILED] * 3


async def test_an_error_deep_in_a_library_is_told_by_the_line_of_the_handler(caplog):
    class Raises(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            return await anyio.to_thread.run_sync(int, "no number")

    await run_guest(Raises(), all_kinds)
    assert f"at {__file__}:{Raises.go.__code__.co_firstlineno + 2}: " in caplog.text


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize("what", ["scope", "timer", "task group", "two scopes"])
async def test_a_handler_that_leaves_something_open_fails_its_trap_alone(what, waits, caplog):
    class Leaves(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            if waits:
                await anyio.lowlevel.checkpoint()
            match what:
                case "scope":
                    anyio.CancelScope().__enter__()
                case "timer":
                    anyio.move_on_after(0.01).__enter__()
                case "task group":
                    group = await anyio.create_task_group().__aenter__()
                    group.start_soon(anyio.sleep_forever)
                case "two scopes":
                    anyio.CancelScope().__enter__()
                    anyio.move_on_after(0).__enter__()
            return BridgeResponse(value1=1)

        @method(2)
        async def other(self, vmi, packet):
            await anyio.sleep(0.02)
            return BridgeResponse(value1=1)

    async def scenario(caller):
        kinds = await all_kinds(caller)
        return kinds, [(await caller.call(2, vcpu=vcpu)).kind for vcpu in range(3)]

    kinds, others = await run_guest(Leaves(), scenario)
    assert kinds == [OutcomeKind.FAILED] * 3
    assert others == [OutcomeKind.HANDLED] * 3
    assert "left a cancel scope or a task group open" in caplog.text


class Cleans(Misbehaves):
    """Cleans up by an await, on its way out."""

    def __init__(self, *, shielded):
        self.shielded = shielded
        self.free = asyncio.Queue()
        self.free.put_nowait("connection")

    @method(1, timeout=0.02)
    async def too_late(self, vmi, packet):
        connection = await self.free.get()
        try:
            with anyio.CancelScope(shield=self.shielded):
                await anyio.sleep(0.05)
            await anyio.sleep_forever()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.free.put_nowait(connection)

    @method(2)
    async def needs_the_same(self, vmi, packet):
        self.free.put_nowait(await self.free.get())
        return BridgeResponse(value1=1)


# On trio a library shields its clean-up: each await in a cancelled scope raises.
@on_asyncio
@pytest.mark.parametrize("shielded", [False, True])
async def test_clean_up_that_awaits_goes_to_its_end_after_a_deadline(shielded):
    async def scenario(caller):
        return [(await caller.call(code)).kind for code in (1, 2)]

    kinds = await run_guest(Cleans(shielded=shielded), scenario)
    assert kinds == [OutcomeKind.TIMEOUT, OutcomeKind.HANDLED]


async def test_a_shielded_handler_is_cancelled_when_its_shield_ends(anyio_backend):
    cancelled = []

    class Shields(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            with anyio.CancelScope(shield=True):
                await self.go_on.wait()
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                if anyio_backend[0] == "asyncio":
                    await asyncio.sleep(0)  # not cancelled again
                cancelled.append(True)
                raise

    handler = Shields()
    handler.go_on = anyio.Event()

    async def scenario(caller):
        outcome = await caller.call()
        handler.go_on.set()
        while not cancelled:
            await anyio.sleep(0)
        return outcome.kind

    assert await run_guest(handler, scenario, timeout=0.02) is OutcomeKind.TIMEOUT


async def test_clean_up_without_an_end_is_cancelled_again():
    unwound = []

    class Lingers(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            try:
                await anyio.sleep_forever()
            finally:
                try:
                    await anyio.sleep_forever()
                finally:
                    unwound.append(True)

    async def scenario(caller):
        return (await caller.call()).kind

    kind = await run_guest(Lingers(), scenario, timeout=0.02, stop_timeout=0.1)
    assert kind is OutcomeKind.TIMEOUT
    assert unwound == [True]


async def test_a_keyboard_interrupt_stops_the_server_once(caplog):
    class Interrupted(Misbehaves):
        @method(1)
        async def go(self, vmi, packet):
            await anyio.lowlevel.checkpoint()
            raise KeyboardInterrupt

    async def scenario(caller):
        await caller.call()

    with caplog.at_level(logging.ERROR), pytest.raises(KeyboardInterrupt):
        await run_guest(Interrupted(), scenario)
    assert caplog.text.count("KeyboardInterrupt") >= 1
