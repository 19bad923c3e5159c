"""Handlers that are programs made at random of what handlers await in practice: task groups of
which the first answer counts, conditions, events that may not come, queues, shields, batches."""

import random
from functools import partial

import anyio
from changed_parts import CODES, Case, Programs, changed_program, random_step

from vmibridge import Bridge

WITHOUT_DEADLINES = (
    "race", "group", "fails", "semaphore", "notify", "set", "put", "shield", "clean_up", "batch",
)  # fmt: skip
IDIOMS = (*WITHOUT_DEADLINES, "notified", "event", "queue", "patience")
"""What ends by a deadline of its own ends at a time that nothing else does."""


def random_idiom(dice, idioms=IDIOMS):
    if dice.random() < 0.4:
        return random_step(dice)
    return dice.choice(idioms), dice.choice([1, 2, 3, 5, 8])


class Idioms(Programs):
    """Runs the program of a method; its answer is what it has counted, read and got."""

    name = "programs"

    async def __aenter__(self):
        await super().__aenter__()
        self.semaphore, self.condition = anyio.Semaphore(2), anyio.Condition()
        self.event, self.batch = anyio.Event(), None
        self.into, self.out_of = anyio.create_memory_object_stream[int](2)
        return self

    async def __aexit__(self, *error):
        self.into.close()
        self.out_of.close()
        await super().__aexit__(*error)

    async def step(self, vmi, packet, got, kind, value):
        if kind in IDIOMS:
            await getattr(self, f"do_{kind}")(packet, got, value / 1e3)
            self.count += 1
        else:
            await super().step(vmi, packet, got, kind, value)

    async def do_race(self, packet, got, pause):
        async def one(number, seconds):
            await anyio.sleep(seconds)
            got.append(number)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, 1, pause)
            tasks.start_soon(one, 2, 60)

    async def do_group(self, packet, got, pause):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, pause)
            tasks.start_soon(anyio.sleep, pause / 3)
            await anyio.sleep(pause / 2)

    async def do_fails(self, packet, got, pause):
        async def one():
            await anyio.sleep(pause)
            raise ValueError("it fails")

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                await anyio.sleep(60)
        except* ValueError as errors:
            got.append(str(errors.exceptions[0]))

    async def do_semaphore(self, packet, got, pause):
        async with self.semaphore:
            await anyio.sleep(pause)

    async def do_notified(self, packet, got, pause):
        with anyio.move_on_after(3 * pause + 0.000_37) as scope:
            async with self.condition:
                await self.condition.wait()
                got.append(self.count)
        got.append(scope.cancelled_caught)

    async def do_notify(self, packet, got, pause):
        async with self.condition:
            self.condition.notify(1)

    async def do_event(self, packet, got, pause):
        with anyio.move_on_after(3 * pause + 0.000_29) as scope:
            await self.event.wait()
        got.append(scope.cancelled_caught)

    async def do_set(self, packet, got, pause):
        self.event.set()
        self.event = anyio.Event()

    async def do_queue(self, packet, got, pause):
        with anyio.move_on_after(2 * pause + 0.000_41):
            got.append(await self.out_of.receive())

    async def do_put(self, packet, got, pause):
        try:
            self.into.send_nowait(self.count)
        except anyio.WouldBlock:
            got.append("full")

    async def do_shield(self, packet, got, pause):
        with anyio.CancelScope(shield=True):
            await anyio.sleep(pause)
            self.count += 1

    async def do_clean_up(self, packet, got, pause):
        try:
            await anyio.sleep(pause)
        finally:
            self.count += 1

    async def do_patience(self, packet, got, pause):
        with anyio.move_on_after(pause + 0.000_23) as scope:
            async with self.lock:
                await anyio.sleep(pause / 2)
        got.append(scope.cancelled_caught)

    async def do_batch(self, packet, got, pause):
        if self.batch is not None:
            self.batch[1].append(packet.value2)
            await self.batch[0].wait()
            return
        event, members = self.batch = anyio.Event(), [packet.value2]
        await anyio.sleep(pause)
        self.batch = None
        event.set()
        got.append(members)


class SerialIdioms(Idioms):
    REQUEST, serial, name = 2, True, "serial"


class SharedIdioms(Idioms):
    """The same for all VMs."""

    REQUEST, shared, name = 3, True, "shared"


class IdiomCase(Case):
    """What a seed says: guests, and their handlers, with changed versions."""

    def __init__(self, seed, *, codes=CODES, idioms=IDIOMS):
        """`idioms`: what handlers are made of, beside the steps of `Programs`."""
        super().__init__(seed, codes=codes)
        dice = random.Random(seed)
        random_one = partial(random_idiom, idioms=idioms)
        self.programs = [
            {code: tuple(random_one(dice) for _ in range(dice.randrange(1, 5))) for code in CODES}
            for _ in range(3)
        ]
        self.changed = [
            {
                code: changed_program(dice, each, random_one) if dice.random() < 0.4 else each
                for code, each in programs.items()
            }
            for programs in self.programs
        ]

    def bridges(self, *, changed):
        programs, add = (self.changed, self.add) if changed else (self.programs, 0)
        private, serial, shared = programs
        both = SharedIdioms(shared, add)
        return lambda _: Bridge(Idioms(private, add), SerialIdioms(serial, add), both)
