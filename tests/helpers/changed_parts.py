"""Handlers that are programs made at random, with changed versions, whose answers depend on the
order of all that they do; and what it is to accept the answers of a changed one."""

import random
from contextlib import contextmanager

import anyio
import trio
from determinism_parts import MAGIC, loop_of, planned_guest, record

from vmibridge import Bridge, BridgeHandler, BridgeResponse, GuestMemoryError, method
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import OutsideError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MEMORY, REPLY, TRAP, Reply
from vmibridge.recording.replay.accept import Accepted, write_accepted
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.recording.replay.served import serve_recording
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.vm.trap import TrapEvent

CODES = range(1, 7)
SOFT, HARD = 5, 6
"""Methods with a soft deadline, and with a hard one."""
EVERY_LOOP = range(1, HARD)
"""Those that no loop does in another order. On trio a handler that is cut off in the moment in
which a sleep in it ends does not see that end; on asyncio it does."""


def random_step(dice):
    """One step of a program."""
    kind = dice.choice(
        ["count", "count", "sleep", "sleep", "read", "write", "lock", "token", "yield", "outside"]
    )
    if kind == "sleep":
        return kind, dice.choice([1, 2, 3, 5, 8, 13, 20])
    if kind == "lock":
        return kind, dice.choice([0, 1, 3, 7])
    if kind == "outside":
        return f"{kind} {dice.choice('ab')}", dice.choice([0, 0, 2, 6])
    return kind, dice.randrange(0, 0x40)


def random_program(dice):
    """What a method does, by its steps."""
    return tuple(random_step(dice) for _ in range(dice.randrange(0, 5)))


def changed_program(dice, program, random_step=random_step):
    """Another version of it: other waits, other values, another order."""
    steps = list(program)
    for _ in range(dice.randrange(1, 4)):
        place = dice.randrange(0, len(steps) + 1)
        what = dice.choice(["add", "drop", "swap", "change"])
        if what == "add" or not steps:
            steps.insert(place, random_step(dice))
        elif what == "drop":
            del steps[min(place, len(steps) - 1)]
        elif what == "swap":
            dice.shuffle(steps)
        else:
            steps[min(place, len(steps) - 1)] = random_step(dice)
    return tuple(steps)


class Programs(BridgeHandler[object]):
    """Runs the program of a method; its answer is what it has counted, read and got."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, programs, add=0):
        self.programs, self.add = programs, add
        self.count = 0

    async def __aenter__(self):
        self.lock = anyio.Lock()
        self.give, self.take = anyio.create_memory_object_stream[int](2)
        for token in range(2):
            self.give.send_nowait(token)
        return self

    async def __aexit__(self, *_):
        self.give.close()
        self.take.close()

    async def run(self, vmi, packet):
        got = []
        for kind, value in self.programs[packet.method]:
            await self.step(vmi, packet, got, kind, value)
        self.count += 1
        value1 = 0x100 + self.count + self.add
        return BridgeResponse(value1=value1, output=[self.count, *got])

    async def step(self, vmi, packet, got, kind, value):
        match kind.split():
            case ["count"]:
                self.count += 1
                got.append(self.count)
            case ["sleep"]:
                await anyio.sleep((value + packet.value1 % 3) / 1e3)
            case ["yield"]:
                await anyio.sleep(0)
            case ["lock"]:
                async with self.lock:
                    got.append(self.count)
                    await anyio.sleep(value / 1e3)
                    self.count += 1
            case ["token"]:
                token = await self.take.receive()
                got.append(token)
                await anyio.sleep(value / 8e3)
                self.give.send_nowait(token)
            case ["read"]:
                try:
                    got.append((await vmi.memory.read(0x1000 + value, 2)).hex())
                except GuestMemoryError as error:
                    got.append(str(error))
                self.count += 1
            case ["write"]:
                await vmi.memory.write(0x1080 + value % 8, bytes([packet.value2 & 0xFF]))
                self.count += 1
            case ["outside", key]:

                async def fetch():
                    await anyio.sleep(value / 1e3)
                    return [key, value]

                try:
                    got.append(await vmi.outside(key, fetch))
                except OutsideError as error:
                    got.append(str(error))
                self.count += 1

    @method(1)
    async def one(self, vmi, packet):
        return await self.run(vmi, packet)

    @method(2)
    async def two(self, vmi, packet):
        return await self.run(vmi, packet)

    @method(3)
    async def three(self, vmi, packet):
        return await self.run(vmi, packet)

    @method(4)
    async def four(self, vmi, packet):
        return await self.run(vmi, packet)

    @method(SOFT, soft_timeout=0.007)
    async def told_to_wait(self, vmi, packet):
        return await self.run(vmi, packet)

    @method(HARD, timeout=0.02)
    async def too_late(self, vmi, packet):
        try:
            return await self.run(vmi, packet)
        finally:
            self.count += 1


class SerialPrograms(Programs):
    REQUEST, serial = 2, True


class SharedPrograms(Programs):
    """The same for all VMs."""

    REQUEST, shared = 3, True


@contextmanager
def trio_in_order(seed):
    """Tasks of trio that could go on in any order do so in that of the seed."""
    run = trio._core._run
    run._r.seed(seed)
    before, run._ALLOW_DETERMINISTIC_SCHEDULING = run._ALLOW_DETERMINISTIC_SCHEDULING, True
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING = before


KINDS = (Programs, SerialPrograms, SharedPrograms)


class Case:
    """What a seed says: guests, handlers, and their changed versions; and the order of trio, which
    is the same each time that something is recorded, accepted or replayed."""

    def __init__(self, seed, vms=4, vcpus=4, *, codes=CODES):
        """`codes`: of the methods that are asked."""
        self.seed = seed
        dice = random.Random(seed)
        self.programs = [{code: random_program(dice) for code in CODES} for _ in KINDS]
        self.changed = [
            {
                code: changed_program(dice, each) if dice.random() < 0.4 else each
                for code, each in programs.items()
            }
            for programs in self.programs
        ]
        self.add = dice.choice([0, 0, 0x1000])
        self.settings = {"in_flight": dice.choice([1, 2, 3, 64, 64])}
        self.plans = {
            f"vm{number}": [
                [
                    (
                        dice.choice([1, 1, 2, 3]),
                        dice.choice(codes),
                        dice.randrange(0, 9),
                        dice.choice([0, 0, 1, 2, 5]),
                    )
                    for _ in range(dice.randrange(1, 6))
                ]
                for _ in range(dice.randrange(1, vcpus + 1))
            ]
            for number in range(dice.randrange(1, vms + 1))
        }

    def bridges(self, *, changed):
        """What serves each VM, by its name."""
        programs, add = (self.changed, self.add) if changed else (self.programs, 0)
        private, serial, shared = programs
        both = SharedPrograms(shared, add)
        return lambda _: Bridge(Programs(private, add), SerialPrograms(serial, add), both)

    def record(self, path, loop="asyncio", *, virtual=True):
        """Record the guests with the handlers that are not changed."""
        guests = {name: planned_guest(plan) for name, plan in self.plans.items()}
        bridges = self.bridges(changed=False)
        with trio_in_order(self.seed):
            record(path, guests, bridges, loop, virtual=virtual, **self.settings)

    def replay(self, path, loop, differences, *, changed=True):
        """Replay them with the changed handlers, or with those that are not."""
        bridges = self.bridges(changed=changed)
        with trio_in_order(self.seed):
            replay(path, list(self.plans), bridges, loop, differences=differences)

    def accept(self, source, target, loop):
        """Accept the answers of the changed handlers; returns how many are new."""
        bridges = self.bridges(changed=True)
        with trio_in_order(self.seed):
            return accept(source, target, list(self.plans), bridges, loop)[0]


def replay(path, names, bridges, loop="asyncio", *, accept=False, differences=None):
    """Replay VMs together, as the command does; returns the verdict and the results."""
    verdict = Verdict()
    if accept:
        verdict.accepted = Accepted()

    async def main():
        async with serve_recording(
            path,
            names,
            bridges,
            verdict,
            ReplayOptions(),
            renamed={},
            change=lambda settings: settings,
            on_difference=None if differences is None else differences.append,
        ) as served:
            async for _ in served.server.run():
                pass
            return served.result()

    result = anyio.run(main, **loop_of(loop, virtual=loop != "uvloop"))
    return verdict, result


def assert_accesses_are_of_open_traps(path):
    """Each access stands between the trap that it names and the reply to that."""
    waiting, unwinding = set(), set()
    with RecordingReader(path) as reader:
        for _, message in reader.messages(TRAP, REPLY, MEMORY):
            key = message.vm, message.seq
            if isinstance(message, TrapEvent):
                waiting.add(key)
            elif isinstance(message, Reply):
                waiting.remove(key)
                if message.kind in (OutcomeKind.TIMEOUT, OutcomeKind.CANCELLED):
                    unwinding.add(key)
            else:
                assert key in waiting | unwinding, (path, message)


def accept(source, target, names, bridges, loop="asyncio"):
    """Accept the answers of now; returns how many are new."""
    verdict, result = replay(source, names, bridges, loop, accept=True)
    write_accepted(source, target, verdict.accepted)
    return verdict.accepted.count, result
