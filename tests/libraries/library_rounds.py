"""A guest that calls a library over and over, while the library's server is killed and started.

The run has rounds. In the middle of each the server is killed, with requests under way, and started
again. After each round the guest is silent, and what is there then is taken down: it has to be the
same from the first round to the last.
"""

import asyncio
import gc
import random
import resource
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anyio
from anyio.to_thread import run_sync as in_thread
from library_handlers import BRIEF, CHANGE, DEADLINE, HASTY, LEAVE, SLOW, Library
from library_servers import Server

from vmibridge import BridgePacket, BridgeResponse, BridgeServer, OutcomeKind
from vmibridge.testing import FakeGuest

VCPUS = 8
ROUNDS = 5
_SILENCE = 60.0
"""Seconds within which a round has come to its end after its last answer."""
_TURN = 0.02
_NO_ANSWER = 0xFFFF_FFFF_FFFF_FFFF
_KINDS = (BRIEF, HASTY, SLOW, CHANGE, LEAVE)
_WEIGHTS = (40, 25, 20, 10, 5)


class Sample(NamedTuple):
    """What is there while no request is under way."""

    files: int
    tasks: int
    memory: float
    """MiB."""


class Result(NamedTuple):
    outcomes: Counter[OutcomeKind]
    samples: list[Sample]
    wrong: list[str]
    """Answers that were those of another request."""
    half_done: int
    left_behind: int
    """Queries whose handlers had ended, at the ends of the rounds; they came to an end, too."""


class _ForgetfulGuest(FakeGuest):
    """Keeps no answer: 50,000 of them would be taken for memory that the libraries lose."""

    async def call(self, *arguments, **options):
        writes = await super().call(*arguments, **options)
        if len(self.events) > 64:
            self.events = [event for event in self.events if event.seq in self._open]
            self.writes = {seq: self.writes[seq] for seq in list(self.writes)[-64:]}
        return writes


class Rounds:
    def __init__(self, handler: Library, server: Server, requests: int) -> None:
        self._handler, self._server = handler, server
        self._each = requests // ROUNDS
        self._random = random.Random(17)
        self._numbers = iter(range(1, 1 << 32))
        self._up = anyio.Event()
        self._half = anyio.Event()
        self._wrong: list[str] = []
        self._samples: list[Sample] = []
        self._half_done = self._left_behind = 0

    async def run(self) -> Result:
        outcomes: Counter[OutcomeKind] = Counter()
        async with _ForgetfulGuest(self._guest) as backend:
            fallback = BridgeResponse(value1=_NO_ANSWER)
            server = BridgeServer(backend, self._handler, fallback=fallback)
            async for outcome in server.run():
                outcomes[outcome.kind] += 1
        return Result(outcomes, self._samples, self._wrong, self._half_done, self._left_behind)

    async def _guest(self, vm: FakeGuest) -> None:
        self._up.set()
        for _ in range(ROUNDS):
            self._half = anyio.Event()
            left = iter(range(self._each))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._kill_and_start)
                for vcpu in range(VCPUS):
                    tasks.start_soon(self._vcpu, vm, vcpu, left)
            with anyio.fail_after(_SILENCE):
                await self._settle()
        self._half_done = await self._handler.half_done()

    async def _kill_and_start(self) -> None:
        await self._half.wait()
        self._up = anyio.Event()
        await in_thread(self._server.kill)
        await in_thread(self._server.start)
        self._up.set()

    async def _vcpu(self, vm: FakeGuest, vcpu: int, left) -> None:
        for index in left:
            if index == self._each // 2:
                self._half.set()
            number, kind = next(self._numbers), self._random.choices(_KINDS, _WEIGHTS)[0]
            packet = BridgePacket(
                self._handler.MAGIC, self._handler.REQUEST, kind, number, self._micros(kind), 0, 0
            )
            writes = await vm.call(packet, vcpu=vcpu)
            assert writes is not None
            if writes.rax == _NO_ANSWER:
                # Else the requests of a round would be over before the server is back.
                await self._up.wait()
            elif writes.rax != number:
                self._wrong.append(f"{kind}: {number} got {writes.rax}")

    def _micros(self, kind: int) -> int:
        """How long a request takes, so that its deadline comes anywhere; 0: an hour."""
        if kind == SLOW and self._random.random() < 0.8:
            return 0
        return self._random.randrange(1, round(DEADLINE * 1.2e6))

    async def _settle(self) -> None:
        """Wait until nothing of the round is left, and take down what is there."""
        while handlers_alive():
            await anyio.sleep(_TURN)
        await self._handler.use_all_at_once()
        self._left_behind += await in_thread(self._server.queries_left)
        while await in_thread(self._server.queries_left):
            await anyio.sleep(_TURN)
        gc.collect()
        self._samples.append(Sample(open_files(), tasks_alive(), resident()))


def on_trio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def handlers_alive() -> list[str]:
    """The tasks of requests, by their names."""
    if on_trio():
        import trio

        names, todo = [], [trio.lowlevel.current_root_task()]
        while todo:
            task = todo.pop()
            names.append(task.name)
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    else:
        names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("vmibridge handler")]


def tasks_alive() -> int:
    if on_trio():
        import trio

        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def run_rounds(handler: Library, server: Server, requests: int, loop) -> Result:
    name, options = loop
    return anyio.run(
        partial(Rounds(handler, server, requests).run), backend=name, backend_options=options
    )
