"""A coroutine that runs inside another, and tells when it first waits."""

from contextvars import ContextVar
from types import coroutine

import anyio
import pytest
from anyio.lowlevel import checkpoint

from vmibridge.aio.coroutines import DONE, first_step, go_on, run_inline

VAR: ContextVar[str] = ContextVar("VAR", default="unset")


class Waits:
    """Counts how often `run_inline` says that its body waits."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


async def value(result, waits: int = 0):
    for _ in range(waits):
        await checkpoint()
    return result


# --- when it says that it waits -----------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("result", [None, 7, "text", StopIteration, ()])
async def test_a_body_that_does_not_wait_runs_to_its_end_at_once(result):
    on_wait = Waits()
    assert await run_inline(value(result), on_wait) is result
    assert on_wait.count == 0


def test_a_body_that_does_not_wait_needs_no_event_loop():
    on_wait = Waits()
    with pytest.raises(StopIteration) as end:
        run_inline(value(7), on_wait).send(None)
    assert (end.value.value, on_wait.count) == (7, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [1, 2, 25])
async def test_a_body_that_waits_any_number_of_times_says_so_once(waits):
    on_wait = Waits()
    assert await run_inline(value(7, waits), on_wait) == 7
    assert on_wait.count == 1


@pytest.mark.anyio
async def test_it_says_so_right_before_it_is_first_suspended():
    steps = []

    async def body():
        steps.append("body runs")
        await checkpoint()
        steps.append("body goes on")

    async def other():
        steps.append("another task runs")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        await run_inline(body(), lambda: steps.append("on_wait"))
    # Where another task runs in between depends on the loop; that it runs does not.
    assert steps[:2] == ["body runs", "on_wait"]
    assert sorted(steps[2:]) == ["another task runs", "body goes on"]


@pytest.mark.anyio
async def test_a_body_may_wait_for_anything_that_a_task_may():
    results = []

    async def body():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 0)
            done = anyio.Event()
            tasks.start_soon(value, 1, 3)
            done.set()
            await done.wait()
        async with anyio.Lock():
            results.append(await anyio.to_thread.run_sync(lambda: "from a thread"))
        with anyio.move_on_after(0) as scope:
            await anyio.sleep_forever()
        results.append(scope.cancelled_caught)
        send, receive = anyio.create_memory_object_stream(1)
        async with send, receive:
            await send.send("through a stream")
            results.append(await receive.receive())
        return "done"

    assert await run_inline(body(), Waits()) == "done"
    assert results == ["from a thread", True, "through a stream"]


@pytest.mark.anyio
async def test_a_body_may_run_another_inline():
    inner, outer = Waits(), Waits()

    async def body():
        first = await run_inline(value(1), inner)
        assert (inner.count, outer.count) == (0, 0)
        return first + await run_inline(value(2, 3), inner)

    assert await run_inline(body(), outer) == 3
    assert (inner.count, outer.count) == (1, 1)


# --- exceptions ---------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [0, 1, 3])
@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3), KeyboardInterrupt()])
async def test_what_a_body_raises_passes_through(error, waits):
    async def body():
        await value(None, waits)
        raise error

    on_wait = Waits()
    with pytest.raises(type(error)) as caught:
        await run_inline(body(), on_wait)
    assert caught.value is error
    assert on_wait.count == min(waits, 1)


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [0, 1])
async def test_a_body_cannot_end_the_outer_one_by_stop_iteration(waits):
    async def body():
        await value(None, waits)
        raise StopIteration("not the result")

    with pytest.raises(RuntimeError, match="coroutine raised StopIteration"):
        await run_inline(body(), Waits())


# --- cancellation -------------------------------------------------------------------


@pytest.mark.anyio
async def test_cancellation_reaches_the_body():
    steps = []

    async def body():
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            steps.append("cancelled")
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            steps.append("cleaned up")

    with anyio.CancelScope() as scope:
        await run_inline(body(), scope.cancel)
    assert scope.cancelled_caught
    assert steps == ["cancelled", "cleaned up"]


@pytest.mark.anyio
async def test_a_body_may_catch_the_cancellation_of_a_scope_of_its_own():
    async def body():
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        return scope.cancelled_caught

    on_wait = Waits()
    assert await run_inline(body(), on_wait) is True


@pytest.mark.anyio
async def test_a_body_that_does_not_wait_is_not_cancelled():
    # A handler that has its answer gives it, whatever was asked in between.
    with anyio.CancelScope() as scope:
        scope.cancel()
        result = await run_inline(value("answer"), Waits())
    assert result == "answer"


# --- what a loop sends and throws, step by step -------------------------------------


class Wish:
    """Something to wait for, as a loop sees it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __await__(self):
        return (yield self)


def test_what_the_body_waits_for_and_what_the_loop_sends_pass_unchanged():
    first, second = Wish("first"), Wish("second")

    async def body():
        return [await first, await second]

    on_wait = Waits()
    running = run_inline(body(), on_wait)
    assert running.send(None) is first
    assert running.send("one") is second
    with pytest.raises(StopIteration) as end:
        running.send("two")
    assert end.value.value == ["one", "two"]
    assert on_wait.count == 1


def test_what_the_loop_throws_goes_to_the_body_which_may_go_on():
    first, second = Wish("first"), Wish("second")

    async def body():
        try:
            await first
        except LookupError as error:
            return [error, await second]

    running = run_inline(body(), Waits())
    assert running.send(None) is first
    thrown = LookupError("thrown")
    assert running.throw(thrown) is second
    with pytest.raises(StopIteration) as end:
        running.send("two")
    assert end.value.value == [thrown, "two"]


def test_generator_exit_goes_to_the_body_which_cleans_up():
    steps = []

    async def body():
        try:
            await Wish("never granted")
        except GeneratorExit:
            steps.append("closed")
            raise
        finally:
            steps.append("cleaned up")

    running = run_inline(body(), Waits())
    running.send(None)
    running.close()
    assert steps == ["closed", "cleaned up"]


def test_a_body_that_waits_on_at_generator_exit_is_an_error():
    async def body():
        try:
            await Wish("first")
        finally:
            await Wish("second")

    running = run_inline(body(), Waits())
    running.send(None)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        running.close()


# --- context variables --------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [0, 2])
async def test_what_one_body_sets_does_not_reach_the_next(waits):
    seen = []

    async def body(name):
        seen.append(VAR.get())
        VAR.set(name)
        await value(None, waits)
        seen.append(VAR.get())

    token = VAR.set("the worker's")
    try:
        await run_inline(body("first's"), Waits())
        assert VAR.get() == "the worker's"
        await run_inline(body("second's"), Waits())
        assert VAR.get() == "the worker's"
    finally:
        VAR.reset(token)
    assert seen == ["the worker's", "first's", "the worker's", "second's"]


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [0, 2])
async def test_nor_does_it_when_the_body_fails(waits):
    async def body():
        VAR.set("left behind")
        await value(None, waits)
        raise LookupError

    with pytest.raises(LookupError):
        await run_inline(body(), Waits())
    assert VAR.get() == "unset"


@pytest.mark.anyio
async def test_nor_when_the_body_is_cancelled():
    seen = []

    async def body():
        VAR.set("the body's")
        try:
            await anyio.sleep_forever()
        finally:
            seen.append(VAR.get())

    with anyio.CancelScope() as scope:
        await run_inline(body(), scope.cancel)
    assert seen == ["the body's"]
    assert VAR.get() == "unset"


@pytest.mark.anyio
async def test_bodies_that_run_at_the_same_time_have_variables_of_their_own():
    seen = {}

    async def body(name):
        for n in range(5):
            VAR.set(f"{name} {n}")
            await checkpoint()
            seen.setdefault(name, []).append(VAR.get())

    async def worker(name):
        await run_inline(body(name), Waits())
        seen[name].append(VAR.get())

    async with anyio.create_task_group() as tasks:
        for name in ("a", "b", "c"):
            tasks.start_soon(worker, name)
    assert seen == {name: [*(f"{name} {n}" for n in range(5)), "unset"] for name in ("a", "b", "c")}


@pytest.mark.anyio
async def test_what_the_worker_says_at_the_wait_stays_with_the_worker():
    async def body():
        await checkpoint()
        return VAR.get()

    token = VAR.set("before")
    try:
        # `on_wait` runs in the worker's own context, not in the body's copy of it.
        assert await run_inline(body(), lambda: VAR.set("at the wait")) == "before"
        assert VAR.get() == "at the wait"
    finally:
        VAR.reset(token)


# --- the rest of a coroutine, in the caller's context ---------------------------------------


@pytest.mark.anyio
async def test_a_first_step_that_does_not_wait_is_all():
    ran = []

    async def body():
        ran.append("all")

    assert first_step(body()) is DONE
    assert ran == ["all"]


def test_the_rest_gets_what_the_loop_sends_and_throws():
    seen = []

    async def body():
        seen.append(await Wish("one"))
        try:
            await Wish("two")
        except KeyError as error:
            seen.append(error.args[0])
        seen.append(await Wish("three"))

    running = body()
    wish = first_step(running)
    rest = go_on(running, wish)
    assert rest.send(None).name == "one"
    assert rest.send("first").name == "two"
    assert rest.throw(KeyError("thrown")).name == "three"
    with pytest.raises(StopIteration):
        rest.send("last")
    assert seen == ["first", "thrown", "last"]


@pytest.mark.anyio
async def test_the_rest_may_wait_and_raises_what_the_body_raises():
    async def body():
        await anyio.sleep(0.001)  # any wait will do
        raise LookupError("of the body")

    running = body()
    wish = first_step(running)
    assert wish is not DONE
    with pytest.raises(LookupError, match="of the body"):
        await go_on(running, wish)


@pytest.mark.anyio
async def test_the_rest_runs_in_the_context_of_the_caller():
    """Other than a handler, which `run_inline` gives a copy."""

    async def body():
        await anyio.sleep(0)
        VAR.set("set by the rest")

    VAR.set("before")
    running = body()
    await go_on(running, first_step(running))
    assert VAR.get() == "set by the rest"


@pytest.mark.anyio
async def test_a_body_that_waits_for_one_turn_of_the_loop_waits_for_each():
    steps = []

    @coroutine
    def turn():
        steps.append("waits")
        yield None
        steps.append("goes on")

    async def body():
        await turn()
        await turn()
        return 7

    running = run_inline(body(), Waits())
    assert running.send(None) is None
    assert steps == ["waits"]
    assert running.send(None) is None
    assert steps == ["waits", "goes on", "waits"]
    with pytest.raises(StopIteration):
        running.send(None)
