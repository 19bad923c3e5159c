"""Handlers whose answers depend on the order of all that they do, and guests that ask at random."""

import random
from contextlib import AsyncExitStack
from itertools import count

import anyio

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    method,
)
from vmibridge.aio.clock import VirtualTime, virtual_loop
from vmibridge.engine.access_policy import Policy, Quota, Rate
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.recording.replay.walk import Walk
from vmibridge.testing import FakeGuest

MAGIC = 0x1234_5678
MEMORY = {0x1000: bytes(range(256))}
DENIED = 0x99


def ask(code, *values, request=1):
    return BridgePacket(MAGIC, request, code, *values)


async def call(vm, packet, vcpu=0, pause=0.004):
    """Ask, and ask again as long as it is told to wait, or denied."""
    while (answer := await vm.call(packet, vcpu=vcpu)).rax in (Gate.WAIT, DENIED):
        await anyio.sleep(pause)
    return answer


class Counts(BridgeHandler[object]):
    """Counts what it does; each answer is the count. `value1` is a pause in ms."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.count = count(1)

    def answer(self, *more):
        number = next(self.count)
        return BridgeResponse(value1=0x100 + number).with_output([number, *more])

    @method(1)
    async def at_once(self, vmi, packet):
        return self.answer()

    @method(2)
    async def later(self, vmi, packet):
        await anyio.sleep(packet.value1 / 1e3)
        return self.answer()

    @method(3)
    async def in_steps(self, vmi, packet):
        for _ in range(3):
            await anyio.sleep(packet.value1 / 3e3)
            next(self.count)
        return self.answer()

    @method(4, soft_timeout=0.006)
    async def told_to_wait(self, vmi, packet):
        await anyio.sleep(packet.value1 / 1e3)
        return self.answer()

    @method(5, timeout=0.03)
    async def too_late(self, vmi, packet):
        try:
            await anyio.sleep(60 if packet.value1 & 1 else 0.002)
            return self.answer()
        finally:
            next(self.count)

    @method(6)
    async def reads_memory(self, vmi, packet):
        first = await vmi.memory.read(0x1000 + packet.value1, 4)
        await anyio.sleep(packet.value1 / 1e3)
        return self.answer((await vmi.memory.read(0x1040, 4))[0], first[0])

    @method(7)
    async def given(self, vmi, packet):
        await anyio.sleep(packet.value1 / 1e3)
        return self.answer(vmi.time, vmi.random.random(), vmi.random.getrandbits(64))

    @method(8)
    async def with_tasks(self, vmi, packet):
        got = []

        async def one(pause):
            await anyio.sleep(pause)
            got.append(pause)

        async with anyio.create_task_group() as tasks:
            for pause in (packet.value1 / 1e3 + 0.005, packet.value1 / 1e3):
                tasks.start_soon(one, pause)
        return self.answer(*got)

    @method(9)
    async def no_longer_than(self, vmi, packet):
        with anyio.move_on_after(packet.value1 / 1e3) as scope:
            await anyio.sleep(packet.value1 / 1e3 + (0.005 if packet.value2 & 1 else -0.002))
        return self.answer(scope.cancelled_caught)

    @method(10)
    async def reads_at_once(self, vmi, packet):
        got = []

        async def one(at):
            got.append((await vmi.memory.read(0x1000 + at, 4))[0])

        async with anyio.create_task_group() as tasks:
            for at in (packet.value1, packet.value2 + 0x40, packet.value1):
                tasks.start_soon(one, at)
            await anyio.sleep(packet.value3 / 1e3)
            number = next(self.count)
            await anyio.sleep(0)
        return self.answer(number, *sorted(got))

    @method(11)
    async def due_together(self, vmi, packet):
        got = []

        async def one(number):
            await anyio.sleep(packet.value1 / 1e3)
            got.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(one, number)
        return self.answer(*got)

    @method(12)
    async def ends_together(self, vmi, packet):
        with anyio.move_on_after(packet.value1 / 1e3) as scope:
            await anyio.sleep(packet.value1 / 1e3)
        return self.answer(scope.cancelled_caught)

    @method(13, soft_timeout=0.006)
    async def reads_when_asked_again(self, vmi, packet):
        await anyio.sleep(packet.value1 * 4 / 1e3)
        number = next(self.count)
        return self.answer(number, (await vmi.memory.read(0x1000 + packet.value1, 1))[0])

    @method(14)
    async def first_answer(self, vmi, packet):
        got = []

        async def one(pause):
            await anyio.sleep(pause)
            got.append(pause)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, packet.value1 / 1e3)
            tasks.start_soon(one, 60)
        return self.answer(*got)

    @method(15)
    async def gives_up(self, vmi, packet):
        with anyio.move_on_after(packet.value1 / 1e3) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep, 60)
                tasks.start_soon(anyio.sleep, 60)
        return self.answer(scope.cancelled_caught)

    @method(16)
    async def one_fails(self, vmi, packet):
        async def fail():
            await anyio.sleep(packet.value1 / 1e3)
            raise ValueError("it fails")

        got = []
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail)
                await anyio.sleep(60)
        except* ValueError as errors:
            got = [str(each) for each in errors.exceptions]
        return self.answer(*got)


class Serial(BridgeHandler[object]):
    MAGIC, REQUEST = MAGIC, 2
    serial = True

    def __init__(self):
        self.count = 0

    @method(1, soft_timeout=0.015)
    async def work(self, vmi, packet):
        self.count += 1
        number = self.count
        await anyio.sleep(packet.value1 / 1e3)
        return BridgeResponse(value1=0x100 + number)


class Pool(BridgeHandler[object]):
    """Hands out one of three tokens."""

    MAGIC, REQUEST = MAGIC, 3

    async def __aenter__(self):
        self.give, self.take = anyio.create_memory_object_stream[int](3)
        for token in range(3):
            self.give.send_nowait(token)
        return self

    async def __aexit__(self, *_):
        self.give.close()
        self.take.close()

    @method(1)
    async def work(self, vmi, packet):
        token = await self.take.receive()
        await anyio.sleep(packet.value1 / 1e3)
        await self.give.send(token)
        return BridgeResponse(value1=0x100 + token)


class Shared(Counts):
    """The same for all VMs."""

    REQUEST = 4
    shared = True


def bridges():
    """What serves each VM, by its name."""
    shared = Shared()
    return lambda vm: Bridge(Counts(), Serial(), Pool(), shared)


def assert_same(path, names, make, *, unchecked=(), **how):
    """Replay VMs together, without a difference; returns how many requests were compared.

    `unchecked`: why some may not have been.
    """
    results = replay(path, names, make, **how)
    assert [result.first for result in results] == [None] * len(names)
    assert {why for result in results for why in result.unchecked} <= {*unchecked}
    return sum(result.compared for result in results)


KINDS = [*[(1, code) for code in range(1, 17)], (2, 1), (2, 1), (3, 1), (3, 1), (4, 1), (4, 2)]


def random_guests(seed, codes=None, *, alike=False):
    """One to four guests of one to eight vCPUs: what each asks, and when, by the seed.

    `codes`: of the methods of `Counts` those alone; `alike`: vCPUs ask for the same, so that a
    retry of one may be for the request of another.
    """
    dice = random.Random(seed)
    kinds = [each for each in KINDS if codes is None or each[0] != 1 or each[1] in codes]
    plans = {
        f"vm{number}": [
            [
                (*dice.choice(kinds), dice.randrange(2, 12), dice.choice([0, 0, 1, 2, 5]))
                for _ in range(dice.randrange(1, 6))
            ]
            for _ in range(dice.randrange(1, 9))
        ]
        for number in range(dice.randrange(1, 5))
    }

    return {name: planned_guest(plan, alike=alike) for name, plan in plans.items()}


def planned_guest(plan, *, alike=False):
    """A guest whose vCPUs ask as planned: for each the request, its method, value1, and the
    milliseconds that follow the answer. Unless `alike`, value2 and value3 are of the vCPU."""

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu, calls in enumerate(plan):
                tasks.start_soon(one, vm, vcpu, calls)

    async def one(vm, vcpu, calls):
        for place, (request, code, value, gap) in enumerate(calls):
            own = () if alike else (vcpu, place)
            await call(vm, ask(code, value, *own, request=request), vcpu)
            await anyio.sleep(gap / 1e3)

    return guest


def random_settings(seed):
    """Those of a server: places, and what a guest may use, by the seed."""
    dice = random.Random(-1 - seed)
    settings = {"in_flight": dice.choice([1, 2, 3, 64])}
    if dice.random() < 0.5:
        quota = Quota(Rate(dice.choice([1, 4]), 400.0), Rate(dice.choice([4, 64]), 4000.0))
        settings["policy"] = Policy(vm=quota, denied=BridgeResponse(value1=DENIED))
    return settings


def changed_bridges(vm, asked, change):
    """As `bridges`, but in that VM `change` is called with the answer to what was `asked`."""

    def changed(kind):
        class Changed(kind):
            name = kind().name

            async def handle(self, vmi, packet):
                found = await super().handle(vmi, packet)
                return change(found) if packet == asked and vmi.vm == vm else found

        return Changed()

    shared = changed(Shared)
    return lambda _: Bridge(changed(Counts), changed(Serial), changed(Pool), shared)


def loop_of(name, *, virtual, speed=0.0, in_turn=True):
    """What `anyio.run` makes that loop of. Virtual time begins with a time of its own: that of the
    machine would decide what comes first of what is due together, within rounding. Without
    `in_turn` trio takes what is ready in any order, as it does in real time."""
    if virtual:
        clock = VirtualTime(speed)
        clock.now = 1000.0
        backend, options = virtual_loop("trio" if name == "trio" else "asyncio", clock)
        if not in_turn:
            options.pop("instruments", None)
        return {"backend": backend, "backend_options": options}
    backend = "trio" if name == "trio" else "asyncio"
    return {"backend": backend, "backend_options": {"use_uvloop": True} if name == "uvloop" else {}}


def record(path, guests, make, loop="asyncio", *, virtual=False, **settings):
    """Record guests, by the name of their VM."""

    async def main():
        # Its timer would go off for each tenth of a second of virtual time.
        pace = {"flush_interval": 1e9} if virtual else {}
        async with Recorder(path, **pace) as recorder, AsyncExitStack() as stack:
            vms = [
                await stack.enter_async_context(FakeGuest(guest, memory=MEMORY, vm=name))
                for name, guest in guests.items()
            ]
            async for _ in BridgeServer(vms, make, taps=[recorder], **settings).run():
                pass

    anyio.run(main, **loop_of(loop, virtual=virtual, in_turn=False))


def replay(
    path, names, make, loop="asyncio", *, virtual=True, speed=0.0, order="recorded", prefix=""
):
    """Replay VMs together, called PREFIX and their names; returns the result of each."""

    async def main():
        walk = Walk(path, 0.0 if virtual else speed)
        async with AsyncExitStack() as stack:
            vms = [
                await stack.enter_async_context(
                    ReplayBackend(
                        path, ReplayOptions(vm=name, order=order), prefix + name, walk=walk
                    )
                )
                for name in names
            ]
            settings = replay_settings(vms[0].session.settings)
            server = BridgeServer(
                vms,
                make,
                timeout=settings.timeout,
                in_flight=settings.in_flight,
                policy=settings.policy,
            )
            async for _ in server.run():
                pass
            return [vm.result for vm in vms]

    return anyio.run(main, **loop_of(loop, virtual=virtual, speed=speed))
