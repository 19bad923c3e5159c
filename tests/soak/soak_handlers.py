"""The fault soak: the handlers and dispatchers, and the ways in which they go wrong."""

import asyncio
from collections import Counter
from contextlib import contextmanager

import anyio
from soak_kinds import (
    BROKEN,
    DEBT,
    DELAYED,
    HARD,
    HUGE,
    LONG,
    MAGIC,
    REQUESTS,
    SLOW,
    SOFT,
    STAMP,
    STUCK,
    Kind,
)
from soak_ledger import Ledger

from vmibridge import (
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgeResponse,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    method,
)
from vmibridge.vm.memory import MAX_ACCESS

# --- the handlers -----------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say")


def on_trio() -> bool:
    return anyio.get_cancelled_exc_class() is not asyncio.CancelledError


def plus_one(packet) -> BridgeResponse[None]:
    return BridgeResponse(value1=packet.value1 + 1)


async def recurse(depth: int) -> int:
    return await recurse(depth + 1) + 1


async def raise_lookup_error() -> None:
    await anyio.sleep(0)
    raise LookupError("on purpose")


async def fail_on_the_way_out() -> None:
    try:
        await anyio.sleep_forever()
    finally:
        raise LookupError("on the way out")


class Faults(BridgeHandler[None]):
    """Does what the method says; value2 picks one of several ways to."""

    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = STAMP

    def __init__(self, ledger: Ledger, places: int, lanes: int) -> None:
        self._ledger = ledger
        self.running: Counter[tuple[Kind, int]] = Counter()
        """Those that may wait, by kind and request."""
        self._places = places
        self._lanes = lanes
        self.gathered = 0
        self.most_gathered = 0
        self._all_there = anyio.Event()
        self.hanging = 0
        self.all_hang = anyio.Event()

    @method(Kind.ANSWER)
    async def answer(self, vmi, packet):
        return plus_one(packet)

    @method(Kind.HAMMER)
    async def hammer(self, vmi, packet):
        return plus_one(packet)

    @method(Kind.IN_DEBT)
    async def in_debt(self, vmi, packet):
        return plus_one(packet)

    @method(Kind.YIELD)
    async def yield_(self, vmi, packet):
        for _ in range(1 + packet.value2 % 3):
            await anyio.sleep(0)
        return plus_one(packet)

    @method(Kind.SLEEP)
    async def sleep(self, vmi, packet):
        await anyio.sleep(0.0002 * (1 + packet.value2 % 8))
        return plus_one(packet)

    @method(Kind.MEMORY)
    async def memory(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, 8)
        if packet.value2 & 1:
            await anyio.sleep(0)
        await vmi.memory.write(packet.value1 + 8, data[::-1])
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(Kind.SCOPES)
    async def scopes(self, vmi, packet):
        way = packet.value2 % 3
        if way == 0:
            with anyio.move_on_after(0):
                await anyio.sleep_forever()
        elif way == 1:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                tasks.start_soon(anyio.sleep, 0)
                await anyio.sleep(0)
                tasks.cancel_scope.cancel()
        else:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0)
        return plus_one(packet)

    @method(Kind.LOST)
    async def lost(self, vmi, packet):
        if packet.value2 & 1:
            await anyio.sleep(0)
        return plus_one(packet)

    @method(Kind.REJECT)
    async def reject(self, vmi, packet):
        if packet.value2 & 1:
            await anyio.sleep(0)

    @method(Kind.RAISE)
    async def fail(self, vmi, packet):
        way = packet.value2 % 11
        if packet.value2 & 16:
            await anyio.sleep(0)
        if way == 0:
            return 5
        if way == 1:
            return BridgeResponse(value1=1 << 64)
        if way == 2:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(raise_lookup_error)
                tasks.start_soon(anyio.sleep_forever)
        if way == 3:
            await recurse(0)
        if way == 4:
            raise Unspeakable
        if way == 5:
            await vmi.memory.read_physical(BROKEN, 8)
        if way == 6:
            with anyio.fail_after(0.001):
                await anyio.sleep_forever()
        if way == 10 and not on_trio():
            async with asyncio.timeout(0.001):
                await anyio.sleep_forever()
        if way == 7:
            raise MemoryError
        if way == 8:
            raise StopIteration
        raise LookupError("on\npurpose")

    @method(Kind.HANG, timeout=HARD)
    async def hang(self, vmi, packet):
        way = packet.value2 % 9
        if way == 0:
            while True:
                await anyio.sleep(HARD / 4)
        elif way == 7:
            while True:
                await vmi.memory.read_physical(DELAYED, 8)
        elif way == 8:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail_on_the_way_out)
                tasks.start_soon(fail_on_the_way_out)
                await anyio.sleep_forever()
        elif way == 1:
            # Takes its time to end, and is cut off meanwhile.
            with anyio.move_on_after(LONG, shield=True):
                try:
                    while True:
                        await vmi.memory.read(0, 8)
                        await anyio.sleep(HARD / 4)
                except GuestMemoryError:
                    await anyio.sleep(HARD / 4)
        elif way == 2:
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                return plus_one(packet)
        elif way == 3:
            await fail_on_the_way_out()
        elif way == 4:
            await vmi.memory.read_physical(STUCK, 8)
        elif way == 5:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                tasks.start_soon(anyio.sleep, 0)
        else:
            await anyio.sleep_forever()
        return plus_one(packet)

    @method(Kind.CANCEL)
    async def cancel(self, vmi, packet):
        way = packet.value2 % 6
        if way == 0 and not on_trio():
            await anyio.sleep(0)
            raise asyncio.CancelledError
        if way == 1 and not on_trio():
            # Something that it awaits is cancelled by others.
            task = asyncio.ensure_future(asyncio.sleep(3600))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        if way == 3 and not on_trio():
            # Its own task is, by means that anyio does not know of.
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await anyio.sleep(0)
        # The cancellation of a scope of its own gets out of it.
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class() as error:
                kept = error
        if way == 2:
            await anyio.sleep(0)
        try:
            raise kept
        finally:
            del kept

    @method(Kind.BAD_POINTER)
    async def bad_pointer(self, vmi, packet):
        address, way = packet.value1, packet.value2 % 6
        if packet.value2 & 64:
            await anyio.sleep(0)
        if way == 0:
            await vmi.memory.read(address, MAX_ACCESS + 1 + packet.value2)
        elif way == 1:
            await vmi.memory.read((1 << 64) - 4, 8)
        elif way == 2:
            await vmi.memory.write(address, b"eight by")
        elif way == 3:
            await vmi.memory.read_string(address, limit=64)
        elif way == 4:
            await vmi.memory.read_physical(address, 8)
        else:
            await vmi.memory.read(address, 8)
        self._ledger.wrong(f"a bad pointer was followed: way {way}")

    @method(Kind.GREEDY)
    async def greedy(self, vmi, packet):
        await vmi.memory.read_physical(HUGE, DEBT)
        return plus_one(packet)

    @contextmanager
    def _slow(self, kind: Kind, packet, *, asked_at_once: int = 1):
        """One run of a kind that may wait: a retry must not begin another one beside it."""
        key = (kind, packet.value3 or packet.value1)
        self._ledger.starts[kind] += 1
        self.running[key] += 1
        self._ledger.check(
            self.running[key] <= asked_at_once, f"one {kind.name} runs {self.running[key]} times"
        )
        try:
            yield
        finally:
            self.running[key] -= 1
            if not self.running[key]:
                del self.running[key]

    @method(Kind.SLOW, soft_timeout=SOFT)
    async def slow(self, vmi, packet):
        with self._slow(Kind.SLOW, packet):
            await anyio.sleep(SLOW)
        return plus_one(packet)

    @method(Kind.ECHO, soft_timeout=SOFT)
    async def echo(self, vmi, packet):
        # When the result has expired, both start over, and neither got WAIT yet.
        with self._slow(Kind.ECHO, packet, asked_at_once=2):
            await anyio.sleep(SLOW)
        return plus_one(packet)

    @method(Kind.SLOW_FAIL, soft_timeout=SOFT)
    async def slow_fail(self, vmi, packet):
        with self._slow(Kind.SLOW_FAIL, packet):
            await anyio.sleep(SLOW)
            raise LookupError("late")

    @method(Kind.SLOW_READ, soft_timeout=SOFT)
    async def slow_read(self, vmi, packet):
        with self._slow(Kind.SLOW_READ, packet):
            await anyio.sleep(SLOW * (packet.value2 % 2))
            data = await vmi.memory.read_physical(DELAYED + packet.value1, 8)
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(Kind.SLOW_HANG, soft_timeout=SOFT, timeout=HARD)
    async def slow_hang(self, vmi, packet):
        with self._slow(Kind.SLOW_HANG, packet):
            await anyio.sleep_forever()

    @method(Kind.NEVER, soft_timeout=SOFT)
    async def never(self, vmi, packet):
        with self._slow(Kind.NEVER, packet):
            await anyio.sleep(SLOW)
        return plus_one(packet)

    @method(Kind.NEVER_READ, soft_timeout=SOFT, timeout=HARD)
    async def never_read(self, vmi, packet):
        with self._slow(Kind.NEVER_READ, packet):
            await anyio.sleep(SLOW)
            await vmi.memory.read(0, 8)
        return plus_one(packet)

    @method(Kind.NEVER_HANG, soft_timeout=SOFT, timeout=HARD)
    async def never_hang(self, vmi, packet):
        with self._slow(Kind.NEVER_HANG, packet):
            await anyio.sleep_forever()

    @method(Kind.RING)
    async def ring(self, vmi, packet):
        self._ledger.wrong("a denied trap reached its handler, by its ring")

    @method(Kind.OVER)
    async def over(self, vmi, packet):
        self._ledger.wrong("a denied trap reached its handler, over the quota of the VM")

    @method(Kind.GATHER)
    async def gather(self, vmi, packet):
        self.gathered += 1
        self.most_gathered = max(self.most_gathered, self.gathered)
        if self.gathered == self._places:
            self._all_there.set()
        await self._all_there.wait()
        await anyio.sleep(0)
        self.gathered -= 1
        return plus_one(packet)

    @method(Kind.LAST, timeout=3600)
    async def last(self, vmi, packet):
        self.hanging += 1
        if self.hanging == self._lanes:
            self.all_hang.set()
        await anyio.sleep_forever()


class InTurn(BridgeHandler[None]):
    """Answers one at a time."""

    MAGIC = MAGIC
    REQUEST = 2
    VERIFY_VALUE4 = STAMP
    serial = True

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._running = 0

    @contextmanager
    def _alone(self):
        self._running += 1
        self._ledger.check(self._running == 1, "a serial handler runs twice at a time")
        try:
            yield
        finally:
            self._running -= 1

    @method(Kind.TURN)
    async def turn(self, vmi, packet):
        with self._alone():
            await anyio.sleep(0.0005 * (packet.value2 % 2))
        return plus_one(packet)

    @method(Kind.TURN_HANG, timeout=HARD)
    async def turn_hang(self, vmi, packet):
        with self._alone():
            await anyio.sleep_forever()

    @method(Kind.TURN_SLOW, soft_timeout=SOFT)
    async def turn_slow(self, vmi, packet):
        self._ledger.starts[Kind.TURN_SLOW] += 1
        with self._alone():
            await anyio.sleep(SLOW)
        return plus_one(packet)


class PassesOn(BridgeDispatch):
    """Waits, and leaves the request to whoever is behind."""

    def contracts(self):
        return [BridgeContract(REQUESTS[Kind.FORWARDED], MAGIC)]

    async def dispatch(self, vmi, packet):
        await anyio.sleep(0)
        return Outcome(OutcomeKind.UNMATCHED, packet)


class Behind(BridgeHandler[None]):
    MAGIC = MAGIC
    REQUEST = REQUESTS[Kind.FORWARDED]
    VERIFY_VALUE4 = STAMP

    async def handle(self, vmi, packet):
        return plus_one(packet)
