"""What calls a library over and over, while the library's server is killed and started.

The run has rounds. In the middle of each the server is killed, with requests under way, and started
again. After each round the caller is silent, and what is there then is taken down: it has to be the
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
from library_callers import HANDLER_TASK, PLAIN_TASK, Call, Caller, on_trio
from library_handlers import BRIEF, CHANGE, DEADLINE, HASTY, LEAVE, SLOW, Library
from library_servers import Server

from vmibridge import BridgePacket, OutcomeKind

VCPUS = 8
_ROUNDS = 5
_SILENCE = 60.0
"""Seconds within which a round has come to its end after its last answer."""
_TURN = 0.02
_KINDS = (BRIEF, HASTY, SLOW, CHANGE, LEAVE)
_WEIGHTS = (40, 25, 20, 10, 5)


def rounds_of(library: type[Library], requests: int) -> int:
    return max(_ROUNDS, requests // library.longest_round)


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
    lost: int
    """Connections that a pool had lost at the ends of the rounds: see `Library.give_back_lost`."""
    left_behind: int
    """Queries that ran on at the server when their client had gone, and came to an end, too."""
    deaf: int
    """See `Caller`."""


class Rounds:
    def __init__(self, caller: Caller, server: Server, requests: int) -> None:
        self._caller, self._library, self._server = caller, caller.library, server
        self._rounds = rounds_of(type(self._library), requests)
        self._each = requests // self._rounds
        self._random = random.Random(17)
        self._numbers = iter(range(1, 1 << 32))
        self._up = anyio.Event()
        self._half = anyio.Event()
        self._wrong: list[str] = []
        self._samples: list[Sample] = []
        self._half_done = self._lost = 0

    async def run(self) -> Result:
        await self._caller.run(self._guest)
        return Result(
            self._caller.outcomes,
            self._samples,
            self._wrong,
            self._half_done,
            self._lost,
            await in_thread(self._server.left_behind),
            self._caller.deaf,
        )

    async def _guest(self, call: Call) -> None:
        self._up.set()
        for _ in range(self._rounds):
            self._half = anyio.Event()
            left = iter(range(self._each))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._kill_and_start)
                for vcpu in range(VCPUS):
                    tasks.start_soon(self._vcpu, call, vcpu, left)
            with anyio.fail_after(_SILENCE):
                await self._settle()
        self._half_done = await self._library.half_done()

    async def _kill_and_start(self) -> None:
        await self._half.wait()
        self._up = anyio.Event()
        await in_thread(self._server.kill)
        await in_thread(self._server.start)
        self._up.set()

    async def _vcpu(self, call: Call, vcpu: int, left) -> None:
        for index in left:
            if index == self._each // 2:
                self._half.set()
            number, kind = next(self._numbers), self._random.choices(_KINDS, _WEIGHTS)[0]
            magic, request = self._library.MAGIC, self._library.REQUEST
            packet = BridgePacket(magic, request, kind, number, self._micros(kind), 0, 0)
            answer = await call(vcpu, packet)
            if answer is None:
                # Else the requests of a round would be over before the server is back.
                await self._up.wait()
            elif answer != number:
                self._wrong.append(f"{kind}: {number} got {answer}")

    def _micros(self, kind: int) -> int:
        """How long a request takes, so that its deadline comes anywhere; 0: an hour."""
        if kind == SLOW and self._random.random() < 0.8:
            return 0
        return self._random.randrange(1, round(DEADLINE * 1.2e6))

    async def _settle(self) -> None:
        """Wait until nothing of the round is left, and take down what is there."""
        while requests_alive():
            await anyio.sleep(_TURN)
        self._lost += await self._library.give_back_lost()
        await self._library.use_all_at_once()
        while await in_thread(self._server.queries_left):
            await anyio.sleep(_TURN)
        gc.collect()
        self._samples.append(Sample(open_files(), tasks_alive(), resident()))


def requests_alive() -> list[str]:
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
    return [name for name in names if name.startswith((PLAIN_TASK, HANDLER_TASK))]


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


def run_rounds(caller: Caller, server: Server, requests: int, loop) -> Result:
    name, options = loop
    return anyio.run(
        partial(Rounds(caller, server, requests).run), backend=name, backend_options=options
    )
