"""The bounded queue of the outcomes to the consumer that iterates over them."""

from typing import Self

import anyio
import pytest
from anyio.lowlevel import checkpoint

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.outcome_queue import OutcomeQueue


def outcome(number: int) -> Outcome:
    return Outcome(OutcomeKind.HANDLED, BridgePacket(1, 1, number))


def numbers(outcomes: list[Outcome]) -> list[int]:
    return [item.packet.method for item in outcomes]


class Queue(OutcomeQueue):
    """With one producer, under the same name."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        producer = self.add_producer()
        self.put, self.put_nowait = producer.put, producer.put_nowait
        self.unbind = producer.unbind


def filled(capacity: int, count: int) -> Queue:
    queue = Queue(capacity)
    for number in range(count):
        assert queue.put_nowait(outcome(number))
    return queue


async def settle() -> None:
    """Let every task run for as long as it can: nothing here waits for time."""
    for _ in range(20):
        await checkpoint()


async def take(queue: OutcomeQueue, count: int) -> list[int]:
    return numbers([await queue.get() for _ in range(count)])


class Waiting:
    """A task that waits, cancelled at the end of the block."""

    def __init__(self, function, *args) -> None:
        self.group = anyio.create_task_group()
        self.function, self.args = function, args
        self.results: list = []

    async def run(self) -> None:
        try:
            self.results.append(await self.function(*self.args))
        except (StopAsyncIteration, LookupError) as error:
            self.results.append(error)

    async def __aenter__(self) -> Self:
        await self.group.__aenter__()
        self.group.start_soon(self.run)
        await settle()
        return self

    async def __aexit__(self, *error):
        self.group.cancel_scope.cancel()
        return await self.group.__aexit__(*error)


# --- order and bound ----------------------------------------------------------------


@pytest.mark.anyio
async def test_outcomes_come_in_the_order_in_which_they_were_put():
    assert await take(filled(8, 5), 5) == [0, 1, 2, 3, 4]


@pytest.mark.anyio
async def test_a_consumer_waits_for_the_next_outcome():
    queue = Queue(8)
    async with Waiting(queue.get) as consumer:
        assert consumer.results == []
        queue.put_nowait(outcome(7))
        await settle()
        assert numbers(consumer.results) == [7]


def test_a_full_queue_says_so_and_holds_what_it_has():
    queue = filled(3, 3)
    assert not queue.put_nowait(outcome(3))
    assert not queue.put_nowait(outcome(3))


@pytest.mark.anyio
async def test_a_producer_waits_for_room_which_comes_in_batches():
    queue = filled(4, 4)
    async with Waiting(queue.put, outcome(4)) as producer:
        assert await take(queue, 1) == [0]
        await settle()
        assert producer.results == []
        # With half of it free there is room again.
        assert await take(queue, 1) == [1]
        await settle()
        assert producer.results == [None]
        assert await take(queue, 3) == [2, 3, 4]


@pytest.mark.anyio
@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 16])
async def test_nothing_is_lost_between_many_producers_and_a_consumer(capacity):
    queue = Queue(capacity)
    taken: list[int] = []

    async def produce(first: int) -> None:
        for number in range(first, first + 10):
            await queue.put(outcome(number))

    async def consume() -> None:
        for _ in range(50):
            taken.extend(await take(queue, 1))
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        for first in range(0, 50, 10):
            tasks.start_soon(produce, first)
        tasks.start_soon(consume)
    assert sorted(taken) == list(range(50))
    for first in range(0, 50, 10):
        of_one = [number for number in taken if first <= number < first + 10]
        assert of_one == sorted(of_one)


@pytest.mark.anyio
async def test_a_queue_of_one_has_room_again_when_it_is_empty():
    queue = filled(1, 1)
    async with Waiting(queue.put, outcome(1)) as producer:
        assert await take(queue, 1) == [0]
        async with Waiting(queue.get) as consumer:
            assert producer.results == [None]
            assert numbers(consumer.results) == [1]


@pytest.mark.anyio
async def test_a_producer_that_is_cancelled_has_put_nothing():
    queue = filled(2, 2)
    async with Waiting(queue.put, outcome(9)):
        pass
    queue.end()
    assert await take(queue, 2) == [0, 1]
    with pytest.raises(StopAsyncIteration):
        await queue.get()


@pytest.mark.anyio
async def test_a_consumer_that_is_cancelled_has_taken_nothing():
    queue = Queue(2)
    async with Waiting(queue.get):
        pass
    queue.put_nowait(outcome(1))
    assert await take(queue, 1) == [1]


# --- unbind -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_unbound_queue_holds_any_number():
    queue = filled(2, 2)
    queue.unbind()
    for number in range(2, 100):
        assert queue.put_nowait(outcome(number))
        await queue.put(outcome(number))
    assert (await take(queue, 4)) == [0, 1, 2, 2]


@pytest.mark.anyio
async def test_to_unbind_lets_in_who_waits_for_room():
    queue = filled(2, 2)
    async with Waiting(queue.put, outcome(2)) as producer:
        queue.unbind()
        await settle()
        assert producer.results == [None]
    assert await take(queue, 3) == [0, 1, 2]


# --- the end ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_end_comes_after_the_last_outcome_and_stays():
    queue = filled(8, 2)
    queue.end()
    assert await take(queue, 2) == [0, 1]
    for _ in range(3):
        with pytest.raises(StopAsyncIteration):
            await queue.get()


@pytest.mark.anyio
async def test_an_error_comes_once_after_the_last_outcome():
    queue = filled(8, 2)
    error = LookupError("the VM is gone")
    queue.end(error)
    assert await take(queue, 2) == [0, 1]
    with pytest.raises(LookupError) as caught:
        await queue.get()
    assert caught.value is error
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await queue.get()


@pytest.mark.anyio
@pytest.mark.parametrize("error", [None, LookupError("the VM is gone")])
async def test_the_end_wakes_a_consumer_that_waits(error):
    queue = Queue(8)
    async with Waiting(queue.get) as consumer:
        queue.end(error)
        await settle()
        (result,) = consumer.results
        assert isinstance(result, StopAsyncIteration) if error is None else result is error


# --- several ways in ----------------------------------------------------------------


@pytest.mark.anyio
async def test_the_bound_is_for_all_producers_together():
    queue = OutcomeQueue(2)
    one, other = queue.add_producer(), queue.add_producer()
    assert one.put_nowait(outcome(1))
    assert other.put_nowait(outcome(2))
    assert not one.put_nowait(outcome(3))
    async with Waiting(one.put, outcome(3)) as first, Waiting(other.put, outcome(4)) as second:
        assert await take(queue, 2) == [1, 2]
        await settle()
        assert (first.results, second.results) == ([None], [None])
    assert sorted(await take(queue, 2)) == [3, 4]


@pytest.mark.anyio
async def test_one_that_is_unbound_lets_the_others_wait():
    queue = OutcomeQueue(1)
    one, other = queue.add_producer(), queue.add_producer()
    assert one.put_nowait(outcome(1))
    async with Waiting(other.put, outcome(9)) as waiting:
        one.unbind()
        assert one.put_nowait(outcome(2))
        await settle()
        assert waiting.results == []
