"""While one peer floods a server, the VM of another has its answers within a few turns of the loop.

The flood is written by a thread, which fills its socket again whenever the server has taken from
it. Turns are counted, no time: from the trap, which is in the socket of the server by then, to the
answer.
"""

import itertools
import socket
import threading
from contextlib import suppress

import anyio
import pytest
from anyio.lowlevel import checkpoint
from remote_parts import REQUEST, FakeAgent, frame_of, served, trap

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.wire import (
    HELLO_LIMIT,
    MAX_PREFETCHED_PER_TRAP,
    Answer,
    Cancel,
    End,
    Hello,
    Memory,
    Ping,
    encode,
)

pytestmark = pytest.mark.anyio

MOST_TURNS = 10
TRAPS = 30


class Handler(BridgeHandler[None]):
    MAGIC, REQUEST = STANDARD_MAGIC, REQUEST
    may_wait = True

    @method(1)
    async def at_once(self, vmi, packet):
        return BridgeResponse(value1=7)

    @method(2)
    async def never(self, vmi, packet):
        await anyio.sleep_forever()

    @method(3)
    async def from_memory(self, vmi, packet):
        return BridgeResponse(value1=len(await vmi.memory.read_physical(0x1000, 64)))


def hello(number, vm="flood"):
    return encode(Hello(WORD, VERSION, VERSION, number.to_bytes(16, "big"), vm))


def traps(code, **fields):
    """Traps of one vCPU with rising numbers, a thousand at a time."""
    for first in itertools.count(1, 1000):
        frames = (frame_of(trap(seq, code=code), **fields) for seq in range(first, first + 1000))
        yield b"".join(map(encode, frames))


def prefetched():
    memory = ((0x8000, bytes(MAX_PREFETCHED_PER_TRAP)),)
    for seq in itertools.count(1):
        yield encode(frame_of(trap(seq, seq % 4, code=2), memory=memory))


FLOODS = {
    "pings": lambda: itertools.repeat(encode(Ping()) * 5000),
    "cancellations": lambda: itertools.repeat(encode(Cancel(7)) * 5000),
    "memory that nobody asked for": lambda: itertools.repeat(encode(Memory(1, bytes(1 << 16)))),
    "ends": lambda: itertools.repeat(encode(End(())) * 5000),
    "traps that are answered": lambda: traps(1),
    "traps that nobody waits for": lambda: traps(2),
    "traps that read memory": lambda: traps(3),
    "memory that comes with traps": prefetched,
}
CONNECTIONS = {
    "the same hello again and again": lambda _: hello(1),
    "a new session each time": hello,
    "a new VM each time": lambda number: hello(number, f"flood{number}"),
    "a hello that does not end": lambda _: HELLO_LIMIT.to_bytes(4, "little") + b"\x91" * 999,
    "nothing": lambda _: b"",
}


class Flood:
    """A thread that connects, greets and sends, and comes again when it is hung up on. What it is
    told it reads, but does not look at."""

    def __init__(self, path, greeting, pieces, enough):
        self._path, self._greeting, self._pieces = path, greeting, pieces
        self._enough = enough
        self._connections = self._bytes = 0
        self._over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over = True
        self._thread.join()

    @property
    def has_done_enough(self):
        """Whether the server has taken from it what makes a flood."""
        connections, sent = self._enough
        return self._connections >= connections and self._bytes >= sent

    def _run(self):
        while not self._over:
            with socket.socket(socket.AF_UNIX) as peer, suppress(OSError):
                peer.settimeout(0.05)
                peer.connect(self._path)
                self._connections += 1
                peer.sendall(self._greeting(self._connections))
                for piece in self._pieces():
                    self._send(peer, piece)
                    if self._over:
                        return

    def _send(self, peer, piece):
        left = memoryview(piece)
        while left and not self._over:
            with suppress(TimeoutError):
                sent = peer.send(left)
                self._bytes += sent
                left = left[sent:]
            with suppress(BlockingIOError):
                peer.recv(1 << 20, socket.MSG_DONTWAIT)


async def most_turns_until_an_answer(url, flood):
    """How many turns of the loop an answer of another VM took at the most."""
    turns = most = 0

    async def count():
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with served(url, Handler()) as server, FakeAgent.connected(url) as quiet:
        await quiet.hello(session=b"q" * 16, vm="quiet")
        with flood:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(count)
                for seq in itertools.count(1):
                    if seq > TRAPS and flood.has_done_enough:
                        break
                    # So that the flood has its part in each.
                    for _ in range(5):
                        await checkpoint()
                    before = turns
                    quiet.post(frame_of(trap(seq)))
                    assert await quiet.next() == Answer(seq, 0x1003, 7)
                    most = max(most, turns - before)
                tasks.cancel_scope.cancel()
        assert "quiet" in server.vms
    return most


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "serve.sock")


@pytest.mark.parametrize("name", FLOODS)
async def test_of_frames(path, name):
    flood = Flood(path, lambda _: hello(1), FLOODS[name], enough=(1, 1 << 20))
    assert await most_turns_until_an_answer(f"unix:{path}", flood) <= MOST_TURNS


@pytest.mark.parametrize("name", CONNECTIONS)
async def test_of_connections(path, name):
    flood = Flood(path, CONNECTIONS[name], lambda: (), enough=(100, 0))
    assert await most_turns_until_an_answer(f"unix:{path}", flood) <= MOST_TURNS
