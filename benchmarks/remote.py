"""What a trap costs whose handler is at the other end of a unix socket.

    python benchmarks/remote.py [--traps N] [--rounds N] [--loops asyncio,uvloop,trio] [--json]

Against a bare echo: two tasks with an anyio stream between them, length-prefixed MessagePack
of the same 220 bytes as a trap has, decoded and encoded at each end.

- *one in flight*: one vCPU, and one frame that goes there and back.
- *64 in flight*: 64 vCPUs, and 64 tasks that each wait for their frame to come back. Writes are
  coalesced: what is sent while the loop turns goes out in one piece.

*engine* is the whole way: a VM that sends its next trap when the last is answered, the agent,
the socket, the server, its lanes and workers, a handler, and the consumer of the outcomes.
All is in one process, pinned to one core; rounds alternate between the sides, and a ratio is
that of the medians. The bar is 0.5. On asyncio and uvloop grpc.aio and NATS, with the same
bodies, are measured in the same rounds, each with as many callers.
"""

import argparse
import gc
import json
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import msgspec
from anyio.abc import ByteStream
from common import LOOPS, Add, ClosedLoop, make_events, pin, run
from remote_peers import PEERS

from vmibridge import BridgeServer, TrapEvent
from vmibridge.transport import Agent, RemoteBackend
from vmibridge.transport.wire import Trap, trap_frame

BAR = 0.5
IN_FLIGHT = (1, 64)
SIZE = struct.Struct("<I")

Side = Callable[[str, list[TrapEvent], int], Awaitable[float]]


async def engine(path: str, events: list[TrapEvent], vcpus: int) -> float:
    taken = 0.0

    async def agent() -> None:
        nonlocal taken
        async with ClosedLoop(events, vcpus) as vm:
            carrier = Agent(vm, f"unix:{path}")
            vm.times = {1: (0.0, 0.0), len(events): (0.0, 0.0)}
            await carrier.run()
            assert carrier.counts.answered == len(events)
            taken = vm.times[len(events)][0] - vm.times[1][0]

    async with anyio.create_task_group() as tasks, RemoteBackend(f"unix:{path}") as backend:
        tasks.start_soon(agent)
        outcomes = 0
        async for _ in BridgeServer(backend, Add()).run():
            outcomes += 1
    assert outcomes == len(events)
    return taken


class Frames:
    """Length-prefixed MessagePack over a stream; a write a call of `send`."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.decode = msgspec.msgpack.Decoder(Trap).decode
        self.encode = msgspec.msgpack.Encoder().encode
        self.buffer = b""

    async def receive(self) -> list[Trap]:
        found: list[Trap] = []
        while not found:
            buffer = self.buffer + await self.stream.receive()
            at = 0
            while len(buffer) - at >= 4:
                size = SIZE.unpack_from(buffer, at)[0]
                if len(buffer) - at - 4 < size:
                    break
                found.append(self.decode(buffer[at + 4 : at + 4 + size]))
                at += 4 + size
            self.buffer = buffer[at:]
        return found

    async def send(self, frames: list[Trap]) -> None:
        parts = []
        for frame in frames:
            body = self.encode(frame)
            parts += [SIZE.pack(len(body)), body]
        await self.stream.send(b"".join(parts))


class Callers:
    """The client's end of the echo: each caller waits for its own frame to come back.

    What is sent while the loop turns goes out in one piece, by one writer.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.peer = Frames(stream)
        self.unsent: list[Trap] = []
        self.waiting: dict[int, anyio.Event] = {}
        self.more = anyio.Event()

    async def call(self, frame: Trap) -> None:
        back = self.waiting[frame.seq] = anyio.Event()
        self.unsent.append(frame)
        self.more.set()
        await back.wait()

    async def write(self) -> None:
        while True:
            await self.more.wait()
            self.more = anyio.Event()
            unsent, self.unsent = self.unsent, []
            await self.peer.send(unsent)

    async def read(self) -> None:
        with suppress(anyio.ClosedResourceError):
            while True:
                for frame in await self.peer.receive():
                    self.waiting.pop(frame.seq).set()


async def answer(stream: ByteStream) -> None:
    async with stream:
        peer = Frames(stream)
        try:
            while True:
                await peer.send(await peer.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass


async def echo(path: str, events: list[TrapEvent], in_flight: int) -> float:
    frames = [trap_frame(event, 5000) for event in events]
    async with anyio.create_task_group() as tasks:
        listener = await anyio.create_unix_listener(path)
        tasks.start_soon(listener.serve, answer)
        async with await anyio.connect_unix(path) as stream:
            start = time.perf_counter()
            if in_flight == 1:
                peer = Frames(stream)
                for frame in frames:
                    await peer.send([frame])
                    await peer.receive()
            else:
                callers = Callers(stream)

                async def one(mine: list[Trap]) -> None:
                    for frame in mine:
                        await callers.call(frame)

                async with anyio.create_task_group() as ours:
                    ours.start_soon(callers.write)
                    ours.start_soon(callers.read)
                    async with anyio.create_task_group() as vcpus:
                        for vcpu in range(in_flight):
                            vcpus.start_soon(one, frames[vcpu::in_flight])
                    ours.cancel_scope.cancel()
            taken = time.perf_counter() - start
        # A stream of anyio's that is cancelled as its end comes complains in asyncio's loop.
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    return taken


SIDES: dict[str, Side] = {"echo": echo, "engine": engine}


async def peer(name: str, path: str, events: list[TrapEvent], in_flight: int) -> float:
    """A tenth of the events: they are slow."""
    encode = msgspec.msgpack.Encoder().encode
    bodies = [encode(trap_frame(event, 5000)) for event in events[::10]]
    return 10 * await PEERS[name](path, bodies, in_flight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traps", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", default=",".join(LOOPS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pin()
    # As the command line does; see docs/benchmarks.md.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    if not options.json:
        print(f"{options.traps} traps, median of {options.rounds} rounds, round trips a second")
        print("loop     in flight     echo   engine  ratio (bar 0.5)  grpc.aio    nats")
    for name in options.loops.split(","):
        for in_flight in IN_FLIGHT:
            events = make_events(options.traps, in_flight)
            sides = dict(SIDES)
            if name != "trio":
                sides |= {other: partial(peer, other) for other in PEERS}
            taken: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side, function in sides.items():
                    with tempfile.TemporaryDirectory() as folder:
                        path = str(Path(folder) / "socket")
                        taken[side].append(run(LOOPS[name], function, path, events, in_flight))
            rates = {side: options.traps / statistics.median(each) for side, each in taken.items()}
            ratio = rates["engine"] / rates["echo"]
            if options.json:
                line = {"loop": name, "in_flight": in_flight, **rates, "ratio": ratio}
                print(json.dumps(line | {"bar": BAR}))
            else:
                print(
                    f"{name:8} {in_flight:9} {rates['echo']:8.0f} {rates['engine']:8.0f}"
                    f" {ratio:6.2f}          {rates.get('grpc.aio', 0):9.0f}"
                    f" {rates.get('nats', 0):7.0f}"
                )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
