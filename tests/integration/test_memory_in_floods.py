"""What a real `vmibridge serve` takes while a peer floods it: RSS, against the bound of that flood.

The bounds are those of `transport.limits`, `transport.wire` and the settings of the server. A flood
passes much more than its bound through the server; the peer reads nothing of what it is told. Run
with `-s`, it prints the table.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from children import Child
from nats_parts import nats_server

from vmibridge.backends.qemu.gdb.packets import MAX_PACKET
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentLimits
from vmibridge.transport.session import MAX_PREFETCHED
from vmibridge.transport.sockets import connection
from vmibridge.transport.wire import (
    HELLO_LIMIT,
    MAX_PREFETCHED_PER_TRAP,
    NO_DEADLINE,
    Cancel,
    Hello,
    Memory,
    Ping,
    Pong,
    Read,
    Trap,
    Welcome,
    encode,
)

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

LIMITS = AgentLimits()
MiB = 1 << 20
NOISE = 6 * MiB
"""What Python takes for objects that come and go, in pages that it does not give back: for 30,000
of them, too, before it collects garbage."""
OVER = 1.5

HANDLERS = """
import anyio
from vmibridge import BridgeHandler, BridgeResponse, method

class Flooded(BridgeHandler[None]):
    MAGIC, REQUEST = 0x1234, 1

    @method(1)
    async def at_once(self, vmi, packet):
        return BridgeResponse(value1=1)

    @method(2, timeout=3600.0)
    async def never(self, vmi, packet):
        await anyio.sleep_forever()
"""


def hello(number, vm):
    return encode(Hello("vmibridge", 1, 1, number.to_bytes(16, "big"), vm))


def trap(seq, method, vcpu=0, memory=()):
    # rcx and rdx are the third and the fourth of 22 registers.
    registers = [0] * 22
    registers[2:4] = 0x1234, 1 | method << 16
    packed = b"".join(each.to_bytes(8, "little") for each in registers)
    fields = (seq, NO_DEADLINE, False, 2, vcpu, 0x1000, 3, 64, 0, packed, memory)
    return encode(Trap(*fields))


def resident(child):
    pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Server:
    def __init__(self, folder, url):
        (folder / "handlers.py").write_text(HANDLERS)
        self.path = folder / "s"
        command = [
            sys.executable,
            "-m",
            "vmibridge",
            "serve",
            "--listen",
            url or f"unix:{self.path}",
        ]
        # Standard output is the outcomes: nobody wants them.
        self.child = Child(
            [*command, "--handlers", folder / "handlers.py", "--timeout", "3600"],
            seconds=600,
            stdout=subprocess.DEVNULL,
        )
        for line in self.child.stderr:
            if "listening" in line:
                break
        else:
            raise AssertionError(self.child.told())

    def connect(self):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(self.path))
        peer.settimeout(60)
        return peer

    def agent(self, number=1, vm="web"):
        """An agent that has said HELLO and was welcomed."""
        peer = self.connect()
        peer.sendall(hello(number, vm))
        assert peer.recv(65536)
        return peer

    def is_there(self):
        """Whether it serves another VM still: also, all that was sent before has been taken."""
        with self.agent(10**6, "other") as peer:
            peer.sendall(trap(1, 1))
            return bool(peer.recv(65536))


@contextmanager
def serving(folder, url=None):
    server = Server(folder, url)
    try:
        yield server
    finally:
        server.child.send_signal(signal.SIGTERM)
        with suppress(AssertionError):
            server.child.communicate()
        server.child.end()


def flood(child, peer, data, times):
    """Send it so often; the most that was resident meanwhile."""
    most = resident(child)
    # A server that has had enough hangs up.
    with suppress(OSError):
        for _ in range(times):
            peer.sendall(data)
            most = max(most, resident(child))
    return most


def pings(server):
    with server.agent() as peer:
        return flood(server.child, peer, encode(Ping()) * 5_000, 60)


def cancels(server):
    with server.agent() as peer:
        return flood(server.child, peer, encode(Cancel(7)) * 5_000, 60)


def unasked_memory(server):
    with server.agent() as peer:
        return flood(server.child, peer, encode(Memory(1, bytes(512 << 10))), 200)


def traps(server):
    most = 0
    with server.agent() as peer:
        for first in range(1, 40_000, 1000):
            data = b"".join(trap(seq, 2) for seq in range(first, first + 1000))
            most = max(most, flood(server.child, peer, data, 1))
    return most


def prefetched(server):
    memory = ((0x1000, bytes(MAX_PREFETCHED_PER_TRAP)),)
    most = 0
    with server.agent() as peer:
        for vcpu in range(LIMITS.vcpus):
            most = max(most, flood(server.child, peer, trap(vcpu + 1, 2, vcpu, memory), 1))
    return most


def hellos_that_do_not_end(server):
    peers = []
    most = 0
    try:
        for _ in range(4 * LIMITS.handshakes):
            peers.append(server.connect())
            data = HELLO_LIMIT.to_bytes(4, "little") + bytes(HELLO_LIMIT - 1)
            most = max(most, flood(server.child, peers[-1], data, 1))
    finally:
        for peer in peers:
            peer.close()
    return most


def hellos_again_and_again(server):
    most = 0
    for _ in range(600):
        with server.connect() as peer:
            most = max(most, flood(server.child, peer, hello(1, "web"), 1))
    return most


def new_sessions(server):
    most = 0
    for number in range(600):
        with server.connect() as peer:
            most = max(most, flood(server.child, peer, hello(number + 2, f"vm{number}"), 1))
    return most


SETTINGS = ServerSettings()
A_VM = 256 << 10
"""What one VM takes, with its handlers, lanes and tasks."""

FLOODS = [
    (pings, connection._MAX_UNSENT),
    (cancels, 0),
    (unasked_memory, 1 * MiB),
    (traps, SETTINGS.queue * 4096),
    (prefetched, MAX_PREFETCHED + LIMITS.vcpus * 8192),
    (hellos_that_do_not_end, LIMITS.handshakes * HELLO_LIMIT),
    (hellos_again_and_again, A_VM),
    (new_sessions, 2 * LIMITS.new_sessions * A_VM),
]


@pytest.mark.parametrize(("send", "bound"), FLOODS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_flood_takes_what_its_bound_allows(tmp_path, send, bound):
    with serving(tmp_path) as server:
        assert server.is_there()
        before = resident(server.child)
        grown = send(server) - before
        assert server.is_there()
        grown = max(grown, resident(server.child) - before)
    told(send.__name__, before, grown, bound)
    assert grown <= OVER * bound + NOISE


@pytest.mark.parametrize("what", ["hellos", "pings"])
def test_a_flood_on_nats_takes_what_its_bound_allows(tmp_path, what):
    body = hello(1, "web") + (encode(Ping()) if what == "pings" else b"")
    message = b"PUB vmibridge.hello.web none.here %d\r\n%b\r\n" % (len(body), body)
    with nats_server(tmp_path) as nats, serving(tmp_path, nats.url) as server:
        before = resident(server.child)
        with socket.create_connection(("127.0.0.1", nats.port)) as peer:
            peer.sendall(b'CONNECT {"verbose":false}\r\n')
            grown = flood(server.child, peer, message * 1000, 40) - before
            # NATS has taken it all; the server has it, or has it in front of it.
            peer.sendall(b"PING\r\n")
            while b"PONG" not in peer.recv(65536):
                pass
            grown = max(grown, resident(server.child) - before)
        assert server.child.poll() is None
    # What nats-py keeps of one subscription, as its `pending_bytes_limit`.
    bound = 128 * MiB
    told(f"nats {what}", before, grown, bound)
    assert grown <= OVER * bound + NOISE


# mov ecx, 0x1234; mov edx, 1 << 16 | 1; vmcall; hlt
ONE_TRAP = bytes.fromhex("b934120000 ba01000100 0f01c1 f4")


def test_an_agent_whose_server_reads_memory_without_end_takes_what_its_bound_allows(tmp_path):
    pytest.importorskip("unicorn")
    (tmp_path / "guest.bin").write_bytes(ONE_TRAP)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(60)
        backend = f"unicorn:{tmp_path / 'guest.bin'}?memory=64MiB"
        command = ["-m", "vmibridge", "agent", "--backend", backend]
        with Child(
            [sys.executable, *command, "--connect", f"unix:{tmp_path / 's'}"], seconds=600
        ) as child:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(10)
                assert peer.recv(65536)
                magics, fallback = (0x1234,), (None,) * 4
                peer.sendall(
                    encode(Welcome(1, b"m" * 16, 0, magics, False, False, 60_000, fallback, 1024))
                )
                assert peer.recv(65536)
                before = resident(child)
                most = flood(
                    child,
                    peer,
                    b"".join(encode(Read(number, 1, 0, 16 * MiB)) for number in range(1, 601)),
                    1,
                )
                # It answers nothing more: it has hung up, or holds what it may.
                with suppress(OSError):
                    while peer.send(encode(Pong()) * 1000):
                        most = max(most, resident(child))
    told("agent, reads", before, most - before, connection._MAX_UNSENT)
    assert most - before <= OVER * connection._MAX_UNSENT + NOISE


def packet(body):
    return b"$%b#%02x" % (body, sum(body) & 0xFF)


@pytest.mark.parametrize(
    ("name", "start", "again"),
    [
        ("stops", b"", packet(b"T05thread:p01.01;") * 1000),
        ("console output", b"", packet(b"O" + b"41" * 500) * 20),
        ("one without an end", b"$", b"a" * 20_000),
        ("no packet", b"", b"+" * 20_000),
    ],
)
def test_a_gdbstub_that_floods_takes_what_its_bound_allows(tmp_path, name, start, again):
    (tmp_path / "handlers.py").write_text(HANDLERS)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "gdb"))
        listener.listen()
        listener.settimeout(60)
        command = ["-m", "vmibridge", "run", "--handlers", tmp_path / "handlers.py"]
        backend = f"qemu-gdb:unix:{tmp_path / 'gdb'}?site=0x1000"
        with Child([sys.executable, *command, "--backend", backend], seconds=600) as child:
            peer, _ = listener.accept()
            with peer:
                # One that takes no more is silent to us, too.
                peer.settimeout(10)
                before = resident(child)
                most, sent = before, 0
                with suppress(OSError):
                    peer.sendall(start)
                    while sent < 32 * MiB:
                        peer.sendall(again)
                        sent += len(again)
                        with suppress(IndexError):
                            most = max(most, resident(child))
    told(f"gdbstub, {name}", before, most - before, MAX_PACKET)
    assert sent
    assert most - before <= OVER * MAX_PACKET + NOISE


def told(name, before, grown, bound):
    sys.stdout.write(
        f"\n{name:24} {before / MiB:6.1f} MiB at rest, {grown / MiB:+6.1f} MiB"
        f" in the flood, bound {bound / MiB:6.1f} MiB\n"
    )
