"""How many waiting handlers a second the engine keeps going, against the ideal.

    python benchmarks/waiting.py [--vcpus N] [--events N] [--rounds N] [--json]

Each vCPU sends a trap, its handler sleeps 50 ms, and the next trap comes with the answer.
So 1,000 vCPUs have at the best 20,000 answers a second. Four sides take their turns, in a process
that collects garbage after 50,000 new objects, as the commands do:

- *engine*: `BridgeServer` with its default settings, which have no soft deadline.
- *soft*: the same with a soft deadline of 10 s, which is armed for each trap and not met.
- *often*: the engine in a process that collects garbage after 700 new objects, which is Python's
  default: what a program of one's own does.
- *by hand*: what one writes with anyio alone: a memory object stream, and for each trap a
  `start_soon` and a `fail_after` around the same handler.

What counts is the steady state: from a tenth of the answers to nine tenths. The process
pins itself to one core. *busy* is the processor time for one answer, in microseconds: with
50 of them that core would have no time left.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Awaitable, Callable

import anyio
from common import LOOPS, QUEUE, REQUEST, ClosedLoop, Loop, Sleep, make_events, pin, run

from vmibridge import BridgeContext, BridgeResponse, BridgeServer, OutcomeKind, TrapEvent
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.bridge.registers import read_packet, write_response
from vmibridge.cli.event_loop import COLLECT_AFTER
from vmibridge.vm.trap import TrapFilter

SLEEP = 0.05
TIMEOUT = 60.0
SOFT_TIMEOUT = 10.0
RARELY, OFTEN = COLLECT_AFTER, 700
"""New objects after which garbage is collected: by the commands, and by Python itself."""


async def engine(backend: ClosedLoop, soft_timeout: float | None) -> None:
    async with backend:
        server = BridgeServer(
            backend, Sleep(SLEEP), timeout=TIMEOUT, soft_timeout=soft_timeout, queue=QUEUE
        )
        async for _ in server.run():
            pass
    assert server.summary.outcomes[OutcomeKind.HANDLED] == len(backend.events)


async def by_hand(backend: ClosedLoop) -> None:
    sleep = Sleep(SLEEP)
    handlers = {(STANDARD_MAGIC, REQUEST): (sleep, sleep.contract)}
    send, receive = anyio.create_memory_object_stream[TrapEvent](QUEUE)

    class Sink:
        put_nowait = staticmethod(send.send_nowait)
        put = staticmethod(send.send)

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
        await backend.resume(event, write_response(event, response))

    async def guest() -> None:
        async with send:
            await backend.run(TrapFilter(), Sink())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guest)
        async with receive:
            async for event in receive:
                tasks.start_soon(answer, event)


def measure(
    loop: Loop,
    events: list[TrapEvent],
    vcpus: int,
    threshold: int,
    side: Callable[..., Awaitable[None]],
    *arguments: object,
) -> tuple[float, float]:
    """Answers a second, and processor time for one."""
    first, last = max(1, len(events) // 10), len(events) * 9 // 10

    async def run_side() -> ClosedLoop:
        backend = ClosedLoop(events, vcpus)
        backend.times = dict.fromkeys((first, last), (0.0, 0.0))
        await side(backend, *arguments)
        return backend

    gc.collect()
    gc.set_threshold(threshold, *gc.get_threshold()[1:])
    backend = run(loop, run_side)
    assert backend.answered == len(events)
    (start, busy_start), (end, busy_end) = backend.times[first], backend.times[last]
    return (last - first) / (end - start), (busy_end - busy_start) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vcpus", type=int, default=1000)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pin()
    ideal = options.vcpus / SLEEP
    events = make_events(options.events, options.vcpus)
    sides = {
        "engine": (RARELY, engine, None),
        "soft": (RARELY, engine, SOFT_TIMEOUT),
        "often": (OFTEN, engine, None),
        "by_hand": (RARELY, by_hand),
    }
    if not options.json:
        print(
            f"{options.vcpus} vCPUs, {options.events} events, median of {options.rounds} rounds,"
            f" answers a second; the ideal is {ideal:.0f}"
        )
        heads = " | ".join(f"{side.replace('_', ' '):>9} ratio  busy" for side in sides)
        print(f"{'loop':8} {heads}")
    for name, loop in LOOPS.items():
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, arguments in sides.items():
                found[side].append(measure(loop, events, options.vcpus, *arguments))
        line: dict[str, object] = {"loop": name, "ideal": ideal}
        for side, each in found.items():
            line[side] = statistics.median(rate for rate, _ in each)
            line[f"{side}_ratio"] = line[side] / ideal
            line[f"{side}_busy_us"] = statistics.median(busy for _, busy in each) * 1e6
        if options.json:
            print(json.dumps(line))
        else:
            cells = [
                f"{line[side]:9.0f} {line[f'{side}_ratio']:5.2f} {line[f'{side}_busy_us']:5.1f}"
                for side in sides
            ]
            print(f"{name:8} {' | '.join(cells)}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
