"""Handlers that get things from outside, and guests that ask them at random."""

import random
from itertools import count

import anyio
from determinism_parts import MAGIC, ask, call

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.errors import OutsideError

LAST = 9
"""The last method of `Outer`."""


class Outer(BridgeHandler[object]):
    """Each answer counts; `value1` is a pause in ms."""

    MAGIC, REQUEST = MAGIC, 1
    name = "outer"

    def __init_subclass__(cls, **more):
        cls.name = "outer"
        super().__init_subclass__(**more)

    def __init__(self):
        self.numbers = count(1)
        self.fetched = 0

    async def fetch(self, value, pause=0.0):
        """What is outside."""
        self.fetched += 1
        if pause:
            await anyio.sleep(pause)
        return value

    def answer(self, *more):
        number = next(self.numbers)
        return BridgeResponse(value1=0x100 + number).with_output([number, *more])

    @method(1)
    async def waits(self, vmi, packet):
        pause = packet.value1 / 1e3
        return self.answer(await vmi.outside("one", lambda: self.fetch(packet.value1, pause)))

    @method(2)
    async def at_once(self, vmi, packet):
        return self.answer(await vmi.outside("one", lambda: self.fetch(packet.value1)))

    @method(3)
    async def two_at_once(self, vmi, packet):
        got = []

        async def one(pause):
            got.append(await vmi.outside("same", lambda: self.fetch(pause, pause)))

        async with anyio.create_task_group() as tasks:
            for pause in (packet.value1 / 1e3 + 0.005, packet.value1 / 1e3):
                tasks.start_soon(one, pause)
        return self.answer(*got)

    @method(4, soft_timeout=0.006)
    async def told_to_wait(self, vmi, packet):
        pause = packet.value1 / 1e3
        return self.answer(await vmi.outside("slow", lambda: self.fetch([1], pause)))

    @method(5, timeout=0.03)
    async def too_late(self, vmi, packet):
        try:
            pause = 60 if packet.value1 & 1 else 0.002
            return self.answer(await vmi.outside("late", lambda: self.fetch({"a": b"b"}, pause)))
        finally:
            next(self.numbers)

    @method(6)
    async def fails(self, vmi, packet):
        async def lose():
            await self.fetch(None, packet.value1 / 1e3)
            raise ConnectionResetError("gone")

        try:
            await vmi.outside("fails", lose)
        except OutsideError as error:
            return self.answer(str(error), error.types, error.is_a("OSError"))

    @method(7)
    async def no_longer_than(self, vmi, packet):
        with anyio.move_on_after(packet.value1 / 1e3) as scope:
            pause = packet.value1 / 1e3 + (0.005 if packet.value2 & 1 else -0.002)
            await vmi.outside("timed", lambda: self.fetch(1, pause))
        return self.answer(scope.cancelled_caught)

    @method(8)
    async def among_steps(self, vmi, packet):
        pause = packet.value1 / 2e3
        await anyio.sleep(pause)
        one = await vmi.outside("step", lambda: self.fetch(1, pause))
        await vmi.memory.read(0x1000, 4)
        two = await vmi.outside("step", lambda: self.fetch(2))
        await anyio.sleep(pause)
        return self.answer(one, two, await vmi.outside("step", lambda: self.fetch(3)))

    @method(LAST)
    async def does_not_catch(self, vmi, packet):
        next(self.numbers)

        async def lose():
            await self.fetch(None, packet.value1 / 1e3)
            raise ConnectionResetError("gone")

        await vmi.outside("uncaught", lose)


class CutOff(Outer):
    """The same without an outside."""

    async def fetch(self, value, pause=0.0):
        raise AssertionError("a replay must not call it")


def random_guest(seed):
    """One to six vCPUs that ask at random."""
    dice = random.Random(seed)
    plan = [
        [
            (dice.randint(1, LAST), dice.randrange(2, 12), dice.choice([0, 0, 1, 2]))
            for _ in range(dice.randrange(1, 6))
        ]
        for _ in range(dice.randrange(1, 7))
    ]

    async def guest(vm):
        async def one(vcpu, calls):
            for place, (code, pause, gap) in enumerate(calls):
                await call(vm, ask(code, pause, vcpu, place), vcpu)
                await anyio.sleep(gap / 1e3)

        async with anyio.create_task_group() as tasks:
            for vcpu, calls in enumerate(plan):
                tasks.start_soon(one, vcpu, calls)

    return guest


def guest_of(*packets):
    """One vCPU that asks these, and asks again where it is told to wait."""

    async def guest(vm):
        for packet in packets:
            await call(vm, packet)

    return guest


class OtherKeys(BridgeHandler[object]):
    """A handler that asks for the same by other keys."""

    MAGIC, REQUEST, name = Outer.MAGIC, Outer.REQUEST, "outer"

    def __init__(self, handler):
        self.handler = handler

    async def handle(self, vmi, packet):
        return await self.handler.handle(WithOtherKeys(vmi), packet)


class WithOtherKeys:
    """A context, but for `outside`."""

    def __init__(self, vmi):
        self.vmi = vmi
        self.memory = vmi.memory

    async def outside(self, key, function):
        return await self.vmi.outside(f"new {key}", function)
