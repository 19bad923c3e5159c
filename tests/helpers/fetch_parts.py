"""A server of the tests' own for the fetch handler, which answers as it is told, and a guest that
asks.
"""

import contextlib
import gc
import ssl
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import anyio

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgePacket,
    Registers,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
)
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.testing import FakeBackend, FakeMemory

OPEN, READ, CLOSE, LENGTH = 1, 2, 3, 4
URL = 0x1000
BUFFER = 0x10_0000
TOP = (1 << 64) - 1
BIG = bytes(range(256)) * 1200


def failed(stage: int, native: int, code: int = 0) -> int:
    return Status(stage, StatusKind.FAILED, code, native).encode()


def invalid(stage: int) -> int:
    return Status(stage, StatusKind.INVALID_PARAMETERS).encode()


# --- the server ------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    """One connection to the server; `do_GET` picks the method by the path's last part."""

    protocol_version = "HTTP/1.1"
    server: "Site"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.arrived.release()
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        if path.startswith("/status/"):
            self.begin({"Content-Length": "4", "Location": unquote(query)}, int(name))
            self.wfile.write(b"body")
        elif path.startswith("/stalled/"):
            self.begin({"Content-Length": "1000", "Location": unquote(query)}, int(name))
            self.wait_for_end()
        else:
            getattr(self, f"send_{name}", self.send_path)()

    def begin(self, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()

    def send_whole(self, body: bytes) -> None:
        self.begin({"Content-Length": str(len(body))})
        self.wfile.write(body)

    def send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def wait_for_end(self) -> None:
        """Stall until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            self.connection.recv(1)
        self.server.closed.release()
        self.close_connection = True

    def send_path(self) -> None:
        self.send_whole(self.path.encode())

    def send_empty(self) -> None:
        self.send_whole(b"")

    def send_big(self) -> None:
        self.send_whole(BIG)

    def send_headers(self) -> None:
        self.send_whole(str(self.headers).encode())

    def send_peer(self) -> None:
        self.send_whole(str(self.client_address[1]).encode())

    def send_chunked(self) -> None:
        self.begin({"Transfer-Encoding": "chunked"})
        for part in (b"one ", b"two ", b"three", b""):
            self.send_chunk(part)

    def send_steps(self) -> None:
        """Two chunks, the second only when the test says so."""
        self.begin({"Transfer-Encoding": "chunked"})
        self.send_chunk(b"first")
        assert self.server.go.wait(20)
        self.send_chunk(b"second")
        self.send_chunk(b"")

    def send_until_close(self) -> None:
        self.close_connection = True
        self.begin({"Connection": "close"})
        self.wfile.write(b"no length")

    def send_cut(self) -> None:
        self.close_connection = True
        self.begin({"Content-Length": "100"})
        self.wfile.write(b"0123456789")

    def send_cut_chunk(self) -> None:
        self.close_connection = True
        self.begin({"Transfer-Encoding": "chunked"})
        self.wfile.write(b"64\r\n0123456789")

    def send_cut_headers(self) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")

    def send_nothing(self) -> None:
        self.close_connection = True

    def send_garbage(self) -> None:
        self.close_connection = True
        self.wfile.write(b"\x00\xff\x1b[2J no HTTP at all\r\n\r\n")

    def send_long_header(self) -> None:
        self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000)

    def send_bad_length(self) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello")

    def send_huge_length(self) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nhello")

    def send_huge(self) -> None:
        """Chunks without end, or until the client has had enough."""
        self.begin({"Transfer-Encoding": "chunked"})
        with contextlib.suppress(ConnectionError):
            while True:
                self.send_chunk(b"x" * 4096)
        self.server.closed.release()
        self.close_connection = True

    def send_stall(self) -> None:
        self.begin({"Content-Length": "100"})
        self.wfile.write(b"start")
        self.wait_for_end()

    def send_hang(self) -> None:
        self.wait_for_end()

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


class Site(ThreadingHTTPServer):
    """What the guest downloads from, with what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Paths, in order."""
        self.arrived = threading.Semaphore(0)
        """Released once for each request."""
        self.closed = threading.Semaphore(0)
        """Released once for each client that a stalled answer saw leave."""
        self.go = threading.Event()
        self.scheme = "http"
        self.errors: list[BaseException | None] = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def root(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError | ssl.SSLError):
            self.errors.append(error)


@contextlib.contextmanager
def serving(site: Site) -> Iterator[Site]:
    thread = threading.Thread(target=partial(site.serve_forever, poll_interval=0.002))
    thread.start()
    try:
        yield site
    finally:
        site.go.set()
        site.shutdown()
        thread.join()
        site.server_close()
        # What a transfer left behind is to warn in the test that left it.
        gc.collect()
    assert site.errors == []


# --- the guest -------------------------------------------------------------------------


class Guest:
    """One vCPU with memory of its own, in front of a handler."""

    def __init__(self, handler, address_space: int = 0x5000) -> None:
        self.bridge = Bridge(handler)
        self.memory = FakeMemory({URL: bytes(4096), BUFFER: bytes(65536)})
        self.address_space = address_space

    async def call(self, method: int, value1: int = 0, value2: int = 0, value3: int = 0):
        backend = FakeBackend()
        backend.memory = self.memory
        event = TrapEvent(1, TrapReason.VMCALL, Registers(cr3=self.address_space), length=3)
        packet = BridgePacket(STANDARD_MAGIC, 0x0023, method, value1, value2, value3)
        return await self.bridge.dispatch(BridgeContext(event, backend), packet)

    async def open(self, url: str | bytes):
        raw = url.encode() if isinstance(url, str) else url
        self.memory.write(URL, raw.ljust(4096, b"\0"))
        return await self.call(OPEN, URL)

    async def handle(self, url: str) -> int:
        outcome = await self.open(url)
        assert outcome.response.value1 == Status(OPEN).encode(), Status.decode(
            outcome.response.value1
        )
        return outcome.response.value2

    async def read(self, handle: int, capacity: int = 0, buffer: int = BUFFER):
        return await self.call(READ, handle, buffer, capacity)

    async def rest(self, handle: int, capacity: int = 65536) -> bytes:
        """Read to the end."""
        found = b""
        while True:
            outcome = await self.read(handle, capacity)
            assert outcome.response.value1 == Status(READ).encode(), Status.decode(
                outcome.response.value1
            )
            assert outcome.output == outcome.response.value2 <= (capacity or 4096)
            if not outcome.output:
                return found
            found += self.memory[BUFFER][: outcome.output]

    async def fetch(self, url: str) -> bytes:
        handle = await self.handle(url)
        body = await self.rest(handle)
        assert (await self.call(CLOSE, handle)).response.value1 == Status(CLOSE).encode()
        return body


async def happened(semaphore: threading.Semaphore) -> bool:
    return await anyio.to_thread.run_sync(lambda: semaphore.acquire(timeout=20))
