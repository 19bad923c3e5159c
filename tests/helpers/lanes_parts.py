"""Traps for lanes, and tasks that wait for them."""

from typing import Self

import anyio
from anyio.lowlevel import checkpoint

from vmibridge.engine.lanes import Lanes
from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason


def trap(seq: int, vcpu: int = 0) -> TrapEvent:
    return TrapEvent(seq, TrapReason.CPUID, Registers(), vcpu=vcpu, length=2)


def filled(capacity: int, *vcpus: int) -> tuple[Lanes, list[TrapEvent]]:
    """Lanes with a trap of each vCPU given, and those traps."""
    lanes = Lanes(capacity)
    events = [trap(seq, vcpu) for seq, vcpu in enumerate(vcpus, 1)]
    for event in events:
        lanes.put_nowait(event)
    return lanes, events


async def settle() -> None:
    """Let every task run for as long as it can: nothing here waits for time."""
    for _ in range(20):
        await checkpoint()


class Tasks:
    """Tasks that are cancelled at the end of the block, and what they ended with."""

    def __init__(self) -> None:
        self.group = anyio.create_task_group()
        self.done: list = []

    async def __aenter__(self) -> Self:
        await self.group.__aenter__()
        return self

    async def __aexit__(self, *error):
        self.group.cancel_scope.cancel()
        return await self.group.__aexit__(*error)

    async def start(self, function, *args) -> anyio.CancelScope:
        """Start it and let it run until it waits; cancel the returned scope to end it."""
        scope = anyio.CancelScope()

        async def run() -> None:
            with scope:
                try:
                    self.done.append(await function(*args))
                except TrapQueueClosedError as error:
                    self.done.append(error)

        self.group.start_soon(run)
        await settle()
        return scope
