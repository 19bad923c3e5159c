"""What a trap costs from the queue to the register writes, against a hand-written loop.

    python benchmarks/dispatch.py [--events N] [--rounds N] [--json]

Both sides get the same traps and the same handler, which does not wait:

- *engine*: `BridgeServer` over `FakeBackend`, with its queue, lanes, deadlines and
  outcomes, iterated to the end.
- *by hand*: what one writes with anyio alone: a memory object stream between the
  feeder and the loop, and for each trap a `start_soon` and a `fail_after` around
  reading the packet, finding the handler in a dict, awaiting it, and answering.

Then the engine again, in two ways:

- *all on*: with a soft deadline, and a policy that has every rule and denies nothing. The
  handshake and the limits of handlers in flight are on in any case.
- *1000 handlers* instead of 1.

The process pins itself to one core; rounds alternate between the sides, and a ratio is
that of the medians.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import anyio
from common import (
    ADDRESS_SPACE,
    IP,
    LOOPS,
    QUEUE,
    REQUEST,
    Add,
    make_bridge,
    make_events,
    pin,
    seconds,
)

from vmibridge import Bridge, BridgeContext, BridgeResponse, BridgeServer, OutcomeKind, TrapEvent
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.bridge.registers import read_packet, write_response
from vmibridge.engine.access_policy import AddressRange, Policy, Quota, Rate
from vmibridge.testing import FakeBackend

VCPUS = 4
HANDLERS = 1000
TIMEOUT = 5.0
_NEVER_EMPTY = Rate(burst=1e9, rate=1e9)
_QUOTA = Quota(requests=_NEVER_EMPTY, bytes=_NEVER_EMPTY)
ALL_ON = {
    "soft_timeout": 1.0,
    "policy": Policy(
        rings=frozenset({0, 3}),
        address_spaces=frozenset({ADDRESS_SPACE, 2 * ADDRESS_SPACE}),
        instructions=(AddressRange(IP, IP + 0xFFF), AddressRange(16 * IP, 16 * IP + 0xFFF)),
        vm=_QUOTA,
        address_space=_QUOTA,
    ),
}


async def engine(events: list[TrapEvent], bridge: Bridge, settings: dict[str, Any]) -> None:
    async with FakeBackend(events) as backend:
        server = BridgeServer(backend, bridge, timeout=TIMEOUT, queue=QUEUE, **settings)
        async for _ in server.run():
            pass
    assert len(backend.writes) == len(events)
    assert server.summary.outcomes[OutcomeKind.HANDLED] == len(events)


async def by_hand(events: list[TrapEvent]) -> None:
    add = Add()
    handlers = {(STANDARD_MAGIC, REQUEST): (add, add.contract)}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pin()
    first = make_events(options.events, VCPUS)
    last = make_events(options.events, VCPUS, REQUEST + HANDLERS - 1)
    one, many = make_bridge(1), make_bridge(HANDLERS)
    sides = (
        (by_hand, first),
        (engine, first, one, {}),
        (engine, first, one, ALL_ON),
        (engine, last, many, {}),
    )
    if not options.json:
        print(f"{options.events} events, median of {options.rounds} rounds, us an event")
        print(
            "loop     by hand  engine  ratio |  all on  ratio  to engine |"
            f" {HANDLERS} handlers  ratio to 1"
        )
    for name, loop in LOOPS.items():
        taken: list[list[float]] = [[] for _ in sides]
        for _ in range(options.rounds):
            for each, side in zip(taken, sides, strict=True):
                each.append(seconds(loop, *side))
        us = [statistics.median(each) / options.events * 1e6 for each in taken]
        line = {
            "loop": name,
            "by_hand_us": us[0],
            "engine_us": us[1],
            "ratio": us[1] / us[0],
            "all_on_us": us[2],
            "all_on_ratio": us[2] / us[0],
            "all_on_to_engine": us[2] / us[1],
            "handlers_1000_us": us[3],
            "handlers_ratio": us[3] / us[1],
        }
        if options.json:
            print(json.dumps(line))
        else:
            print(
                f"{name:8} {us[0]:7.2f} {us[1]:7.2f} {us[1] / us[0]:6.2f} |"
                f" {us[2]:7.2f} {us[2] / us[0]:6.2f} {us[2] / us[1]:10.2f} |"
                f" {us[3]:13.2f} {us[3] / us[1]:11.2f}"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
