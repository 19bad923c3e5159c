"""Virtual time: it jumps over what nobody works at, and over nothing else."""

import asyncio
import socket
import subprocess
import sys
import threading
import time

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio

from vmibridge.aio.clock import VirtualTime, loop_clock, virtual_loop, virtual_time

LOOPS = ["asyncio", "trio"]
FAR = 3600.0


def run(loop, main, virtual=None):
    backend, options = virtual_loop(loop, virtual or VirtualTime())
    return anyio.run(main, backend=backend, backend_options=options)


@pytest.mark.parametrize("loop", LOOPS)
def test_timers_go_off_in_their_order_and_at_their_time(loop):
    async def main():
        clock, went = loop_clock(), []
        start = clock()

        async def one(after):
            await anyio.sleep(after)
            went.append((after, round(clock() - start, 6)))

        async with anyio.create_task_group() as tasks:
            for after in (FAR, 0.5, 7.0):
                tasks.start_soon(one, after)
        return went

    assert run(loop, main) == [(0.5, 0.5), (7.0, 7.0), (FAR, FAR)]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_deadline_comes_before_a_sleep_of_its_length_also_after_a_jump_that_is_short(loop):
    async def main():
        caught = []

        async def ends():
            with anyio.move_on_after(0.1) as scope:
                await anyio.sleep(0.1)
            caught.append(scope.cancelled_caught)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ends)
            await anyio.sleep(0.05)
            # By less than a nanosecond, as a time that is rounded to them.
            assert virtual_time().jump(virtual_time().next_timer() - 5e-10)
            # What can run does, before time goes on.
            await anyio.lowlevel.checkpoint()
        return caught

    assert run(loop, main) == [True]


def test_on_asyncio_timers_of_equal_delays_go_off_as_they_were_set():
    async def main():
        went = []

        async def one(number):
            await anyio.sleep(0.1)
            went.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(9):
                tasks.start_soon(one, number)
        return went

    # Trio has them in any order.
    assert run("asyncio", main) == list(range(9))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("what", ["thread", "process", "socket"])
def test_nothing_real_is_jumped_over(loop, what):
    async def main():
        with anyio.move_on_after(FAR) as scope:
            if what == "thread":
                await anyio.to_thread.run_sync(time.sleep, 0.05)
            elif what == "process":
                command = [sys.executable, "-c", "pass"]
                nothing = subprocess.DEVNULL
                process = await anyio.open_process(
                    command, stdin=nothing, stdout=nothing, stderr=nothing
                )
                await process.wait()
            else:
                ours, other = socket.socketpair()
                ours.setblocking(False)
                sender = threading.Timer(0.05, other.send, [b"x"])
                sender.start()
                await anyio.wait_readable(ours)
                sender.join()
                ours.close()
                other.close()
        return scope.cancelled_caught

    assert run(loop, main) is False


def test_a_call_in_an_executor_of_asyncio_is_not_jumped_over():
    async def main():
        async with asyncio.timeout(FAR):
            await asyncio.to_thread(time.sleep, 0.05)
        return asyncio.get_running_loop().executing

    assert run("asyncio", main) == 0


def test_the_end_of_an_executor_of_asyncio_is_not_jumped_over(monkeypatch):
    shut_down = asyncio.BaseEventLoop._do_shutdown

    def slowly(loop, future):
        time.sleep(0.05)
        shut_down(loop, future)

    async def main():
        await asyncio.to_thread(int)
        return True

    monkeypatch.setattr(asyncio.BaseEventLoop, "_do_shutdown", slowly)
    # From Python 3.12 on, the loop waits for it for five minutes, and warns where they have passed.
    assert run("asyncio", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_sockets_that_nobody_waits_for_do_not_hold_it(loop):
    virtual = VirtualTime()
    virtual.is_waited = lambda: False

    async def main():
        ours, other = socket.socketpair()
        ours.setblocking(False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.wait_readable, ours)
            await anyio.sleep(FAR)
            tasks.cancel_scope.cancel()
        ours.close()
        other.close()
        return True

    assert run(loop, main, virtual)


@pytest.mark.parametrize("loop", LOOPS)
def test_it_stands_still_while_it_is_held(loop):
    async def main():
        clock = loop_clock()
        before = clock()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, FAR)
            with virtual_time().held():
                await anyio.to_thread.run_sync(time.sleep, 0.02)
            # A look at the clock before may be the last bit of it.
            held = round(clock() - before, 9)
        return held, round(clock() - before)

    assert run(loop, main) == (0.0, FAR)


@pytest.mark.parametrize("loop", LOOPS)
def test_it_jumps_at_once_where_no_timer_is_before(loop):
    async def main():
        virtual = virtual_time()
        assert virtual.jump(virtual.now + 5)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 5)
            await anyio.sleep(0)
            await anyio.sleep(0)
            jumps = virtual.jump(virtual.now + 6), virtual.jump(virtual.now + 4)
            tasks.cancel_scope.cancel()
        return jumps

    assert run(loop, main) == (False, True)


@pytest.mark.parametrize("loop", LOOPS)
def test_with_a_speed_a_wait_takes_its_part(loop):
    async def main():
        before = time.monotonic()
        await anyio.sleep(2.0)
        return time.monotonic() - before

    assert run(loop, main, VirtualTime(100.0)) >= 0.02


def test_uvloop_has_none():
    with pytest.raises(ValueError, match="uvloop has no virtual time"):
        virtual_loop("uvloop", VirtualTime())


@pytest.mark.anyio
async def test_the_clock_of_an_ordinary_loop_is_monotonic():
    assert virtual_time() is None
    assert loop_clock() is time.monotonic


def test_a_server_on_trio_does_not_import_what_virtual_time_takes():
    """It would be the first trap that waits for it, for 80 ms."""
    code = """
import sys, trio
from vmibridge.aio.clock import virtual_time

async def main():
    print(virtual_time(), "trio.testing" in sys.modules)

trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("None False\n", "")


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_due_at_one_time_comes_in_the_order_in_which_it_was_set(loop):
    """Trio takes what is ready in either order, and equal deadlines in that of addresses."""

    async def main():
        woken = []

        async def sleep(number):
            for _ in range(3):
                await anyio.sleep(0.5)
                woken.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(sleep, number)
        return woken

    assert [run(loop, main) for _ in range(6)] == [[*range(8)] * 3] * 6


def test_and_other_loops_of_trio_are_left_alone(monkeypatch):
    """While one is in virtual time, and another one that ends before it; and when it has ended."""
    dice = trio._core._run._r

    async def throw():
        return trio._core._run._r.random()

    async def main():
        other = await anyio.to_thread.run_sync(trio.run, throw)
        another = await anyio.to_thread.run_sync(run, "trio", throw)
        return other, another, await throw()

    monkeypatch.setattr(dice, "random", lambda: 0.7)
    assert run("trio", main) == (0.7, 0.0, 0.0)
    assert trio._core._run._r is dice
