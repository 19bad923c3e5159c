"""What a trap costs from the queue to the register writes, against a hand-written loop.

    python benchmarks/dispatch.py [--events N] [--rounds N] [--json]

Both sides get the same traps and the same handler, which does not wait:

- *engine*: `BridgeServer` over `FakeBackend`, with its queue, lanes, deadlines and
  outcomes, iterated to the end.
- *by hand*: what one writes with anyio alone: a memory object stream between the
  feeder and the loop, and for each trap a `start_soon` and a `fail_after` around
  reading the packet, finding the handler in a dict, awaiting it, and answering.

Then the engine again with 1,000 handlers instead of 1. The process pins itself to one
core; rounds alternate between the sides, and the ratio is that of the medians.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Registers,
    TrapEvent,
    TrapReason,
)
from vmibridge.arch import read_packet, write_response
from vmibridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.testing import FakeBackend

Loop: TypeAlias = tuple[str, dict[str, object]]

VCPUS = 4
QUEUE = 256
TIMEOUT = 5.0


class Add(BridgeHandler[int]):
    """Adds one, without waiting for anything."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        return BridgeResponse(value1=packet.value1 + 1)


def make_events(count: int, request: int = 0x0100) -> list[TrapEvent]:
    return [
        TrapEvent(
            seq,
            TrapReason.VMCALL,
            Registers(rcx=STANDARD_MAGIC, rdx=request, r8=seq),
            vcpu=seq % VCPUS,
            ip=0x1000,
            length=3,
        )
        for seq in range(1, count + 1)
    ]


def make_bridge(handlers: int) -> Bridge:
    return Bridge(*[type("Add", (Add,), {"REQUEST": 0x0100 + n})() for n in range(handlers)])


async def engine(events: list[TrapEvent], bridge: Bridge) -> None:
    async with FakeBackend(events) as backend:
        server = BridgeServer(backend, bridge, timeout=TIMEOUT, queue=QUEUE)
        async for _ in server.run():
            pass
    assert len(backend.writes) == len(events)
    assert server.summary.total == len(events)


async def by_hand(events: list[TrapEvent]) -> None:
    add = Add()
    handlers = {(STANDARD_MAGIC, 0x0100): (add, add.contract)}
    writes = {}
    backend = FakeBackend()
    send, receive = anyio.create_memory_object_stream[TrapEvent](QUEUE)

    async def answer(event: TrapEvent) -> None:
        packet = read_packet(event)
        handler, contract = handlers[packet.magic, packet.request]
        context = BridgeContext(event, backend)
        response: BridgeResponse[int] | None = None
        try:
            with anyio.fail_after(TIMEOUT):
                response = await handler.handle(context, packet)
        except TimeoutError:
            pass
        if response is not None:
            response = contract.stamp(response)
        writes[event.seq] = write_response(event, response)

    async def feed() -> None:
        async with send:
            for event in events:
                try:
                    send.send_nowait(event)
                except anyio.WouldBlock:
                    await send.send(event)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed)
        async with receive:
            while True:
                try:
                    event = receive.receive_nowait()
                except anyio.WouldBlock:
                    event = await receive.receive()
                except anyio.EndOfStream:
                    break
                tasks.start_soon(answer, event)
    assert len(writes) == len(events)


def seconds(loop: Loop, side: Callable[..., Awaitable[None]], *arguments: object) -> float:
    async def timed() -> float:
        start = time.perf_counter()
        await side(*arguments)
        return time.perf_counter() - start

    return anyio.run(timed, backend=loop[0], backend_options=loop[1])


LOOPS: dict[str, Loop] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    first = make_events(options.events)
    last = make_events(options.events, 0x0100 + 999)
    one_handler, thousand_handlers = make_bridge(1), make_bridge(1000)
    if not options.json:
        print(f"{options.events} events, median of {options.rounds} rounds, us an event")
        print("loop     by hand  engine  ratio | 1000 handlers  ratio to 1")
    for name, loop in LOOPS.items():
        hand, one, many = [], [], []
        for _ in range(options.rounds):
            hand.append(seconds(loop, by_hand, first))
            one.append(seconds(loop, engine, first, one_handler))
            many.append(seconds(loop, engine, last, thousand_handlers))
        us = [statistics.median(side) / options.events * 1e6 for side in (hand, one, many)]
        if options.json:
            line = {
                "loop": name,
                "by_hand_us": us[0],
                "engine_us": us[1],
                "ratio": us[1] / us[0],
                "handlers_1000_us": us[2],
                "handlers_ratio": us[2] / us[1],
            }
            print(json.dumps(line))
        else:
            print(
                f"{name:8} {us[0]:7.2f} {us[1]:7.2f} {us[1] / us[0]:6.2f} |"
                f" {us[2]:13.2f} {us[2] / us[1]:11.2f}"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
