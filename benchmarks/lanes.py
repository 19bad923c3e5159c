"""What a trap costs with 1,000 lanes, against 1.

    python benchmarks/lanes.py [--lanes N] [--events N] [--rounds N] [--json]

A lane is the queue of one vCPU. The same number of traps, and a handler that does not
wait, in two ways:

- *closed*: a vCPU sends its next trap when the one before is answered.
- *open*: the traps are there, of the vCPUs in turn, and are fed as the queue takes them.

The process pins itself to one core; rounds alternate between the sides, and a ratio is
that of the medians.
"""

import argparse
import json
import statistics
import sys

from common import LOOPS, QUEUE, Add, ClosedLoop, make_events, pin, seconds

from vmibridge import BridgeServer, OutcomeKind, TrapEvent
from vmibridge.testing import FakeBackend

WAYS = ("closed", "open")


async def engine(way: str, events: list[TrapEvent], lanes: int) -> None:
    async with ClosedLoop(events, lanes) if way == "closed" else FakeBackend(events) as backend:
        server = BridgeServer(backend, Add(), queue=QUEUE)
        async for _ in server.run():
            pass
    assert server.summary.outcomes[OutcomeKind.HANDLED] == len(events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lanes", type=int, default=1000)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pin()
    traps = {lanes: make_events(options.events, lanes) for lanes in (1, options.lanes)}
    sides = [(way, lanes) for way in WAYS for lanes in traps]
    if not options.json:
        print(f"{options.events} events, median of {options.rounds} rounds, us an event")
        lanes = f"1 lane {options.lanes:5} lanes  ratio"
        print(f"{'':8} {'closed':{len(lanes)}} | open")
        print(f"loop     {lanes} | {lanes}")
    for name, loop in LOOPS.items():
        taken: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for (way, lanes), each in taken.items():
                each.append(seconds(loop, engine, way, traps[lanes], lanes))
        us = {side: statistics.median(each) / options.events * 1e6 for side, each in taken.items()}
        line: dict[str, object] = {"loop": name, "lanes": options.lanes}
        for way in WAYS:
            one, many = us[way, 1], us[way, options.lanes]
            line |= {f"{way}_1_us": one, f"{way}_us": many, f"{way}_ratio": many / one}
        if options.json:
            print(json.dumps(line))
        else:
            cells = [
                f"{line[f'{way}_1_us']:6.2f} {line[f'{way}_us']:11.2f} {line[f'{way}_ratio']:6.2f}"
                for way in WAYS
            ]
            print(f"{name:8} {cells[0]} | {cells[1]}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
