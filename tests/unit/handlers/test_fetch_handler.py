"""Downloads for the guest, against a real HTTP server on the loopback.

Laws: nothing is asked of a host that is not on the list, no connection goes to an
address that was not checked, and every end of a transfer frees its handle and socket.
"""

import contextlib
import errno
import gc
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from urllib.parse import unquote, urlsplit

import anyio
import httpcore
import msgspec
import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgePacket,
    BridgeServer,
    OutcomeKind,
    Registers,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.errors import MissingExtraError, ServerStateError
from vmibridge.testing import FakeBackend, FakeMemory, drive

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


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure_site(monkeypatch, tmp_path, authority) -> Iterator[Site]:
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("files.test", "127.0.0.1").configure_cert(context)
    with Site() as site:
        site.scheme = "https"
        site.socket = context.wrap_socket(
            site.socket, server_side=True, do_handshake_on_connect=False
        )
        with serving(site):
            yield site


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


@pytest.fixture(scope="module")
def fetch(load_handler):
    return load_handler("fetch")


@pytest.fixture
def make(fetch):
    """A handler with the settings given."""

    def make(**fields):
        return fetch.Fetch(fetch.Fetch.Settings(**fields))

    return make


async def happened(semaphore: threading.Semaphore) -> bool:
    return await anyio.to_thread.run_sync(lambda: semaphore.acquire(timeout=20))


@pytest.fixture
def resolve(monkeypatch):
    """Answer every look-up with the addresses given, and keep the names."""

    def resolve(*addresses: str) -> list[str]:
        asked: list[str] = []

        async def getaddrinfo(host, port, **options):
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

        monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
        return asked

    return resolve


# --- downloads -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_url_is_opened_read_to_its_end_and_closed(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        opened = await guest.open(f"{site.root}/some/file?q=1")
        assert opened.kind is OutcomeKind.HANDLED
        assert opened.response.values == (
            Status(OPEN).encode(),
            1,
            STANDARD_VERIFY_VALUE3,
            STANDARD_VERIFY_VALUE4,
        )
        assert await guest.rest(1) == b"/some/file?q=1"
        again = await guest.read(1)
        assert again.response.values[:2] == (Status(READ).encode(), 0)
        closed = await guest.call(CLOSE, 1)
        assert closed.response.values[:2] == (Status(CLOSE).encode(), 0)
        assert (await guest.read(1)).response.value1 == invalid(READ)
    assert site.asked == ["/some/file?q=1"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("empty", b""),
        ("big", BIG),
        ("chunked", b"one two three"),
        ("until_close", b"no length"),
    ],
)
async def test_a_body_arrives_whole_however_it_is_framed(make, site, anyio_backend, name, body):
    async with make(allow=[site.root]) as handler:
        assert await Guest(handler).fetch(f"{site.root}/{name}") == body


@pytest.mark.anyio
@pytest.mark.parametrize("capacity", [0, 1000, 65536])
async def test_a_read_gives_at_most_the_capacity(make, site, anyio_backend, capacity):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        assert await guest.rest(await guest.handle(f"{site.root}/big"), capacity) == BIG


@pytest.mark.anyio
async def test_a_read_gives_what_is_there_without_waiting_for_more(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/steps")
        first = await guest.read(handle, 65536)
        assert first.output == 5
        assert guest.memory[BUFFER].startswith(b"first\0")
        site.go.set()
        assert await guest.rest(handle) == b"second"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "length"), [("big", len(BIG)), ("empty", 0), ("chunked", TOP), ("until_close", TOP)]
)
async def test_the_length_is_told_where_the_server_did(make, site, anyio_backend, name, length):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/{name}")
        told = await guest.call(LENGTH, handle)
        assert told.response.values[:2] == (Status(LENGTH).encode(), length)


@pytest.mark.anyio
async def test_the_content_is_asked_for_as_it_is(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        headers = (await Guest(handler).fetch(f"{site.root}/headers")).decode().lower()
    assert f"host: 127.0.0.1:{site.server_port}\n" in headers
    assert "accept-encoding: identity\n" in headers
    assert "user-agent: vmibridge/" in headers


@pytest.mark.anyio
async def test_fetches_in_a_row_share_a_connection(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        assert await guest.fetch(f"{site.root}/peer") == await guest.fetch(f"{site.root}/peer")


@pytest.mark.anyio
async def test_a_connection_is_given_back_at_the_end_of_its_content(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        first = await guest.rest(await guest.handle(f"{site.root}/peer"))
        assert await guest.rest(await guest.handle(f"{site.root}/peer")) == first


@pytest.mark.anyio
async def test_a_fragment_is_not_sent(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        assert await Guest(handler).fetch(f"{site.root}/a#b") == b"/a"


@pytest.mark.anyio
async def test_https_is_fetched_from_a_server_with_a_trusted_certificate(
    make, secure_site, anyio_backend
):
    async with make(allow=[secure_site.root]) as handler:
        guest = Guest(handler)
        assert await guest.fetch(f"{secure_site.root}/big") == BIG
        handle = await guest.handle(f"{secure_site.root}/stall")
        assert (await guest.read(handle)).output == 5
        await guest.call(CLOSE, handle)
        assert await happened(secure_site.closed)


@pytest.mark.anyio
async def test_https_checks_the_certificate_against_the_host_of_the_url(
    make, secure_site, resolve, anyio_backend
):
    resolve("127.0.0.1")
    port = secure_site.server_port
    hosts = [f"https://files.test:{port}", f"https://other.test:{port}"]
    async with make(allow=hosts, private=["127.0.0.0/8"]) as handler:
        guest = Guest(handler)
        assert await guest.fetch(f"{hosts[0]}/a") == b"/a"
        assert (await guest.open(f"{hosts[1]}/a")).response.value1 == failed(OPEN, errno.EIO)


@pytest.mark.anyio
async def test_a_certificate_that_nobody_trusts_is_a_network_error(
    make, secure_site, monkeypatch, anyio_backend
):
    monkeypatch.delenv("SSL_CERT_FILE")
    async with make(allow=[secure_site.root]) as handler:
        opened = await Guest(handler).open(f"{secure_site.root}/a")
    assert opened.response.value1 == failed(OPEN, errno.EIO)
    assert secure_site.asked == []


# --- what is allowed -------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url",
    [
        "{root}/secret",
        "{root}/filesystem",
        "{root}/",
        "{root}",
        "{root}/FILES/a",
        "{root}/%66iles/a",
        "{root}//files/a",
        "{root}/files/../secret",
        "{root}/files/..",
        "{root}/files/./a",
        "{root}/files/%2e%2e/secret",
        "{root}/files/%2E./secret",
        "{root}/files/.%2e%2fsecret",
        "{root}/files/..%2fsecret",
        "{root}/files/%252e%252e/secret",
        "{root}/files/%2525252525252e./secret",
        "{root}/files/..;x=y/secret",
        "{root}/files/..%20/secret",
        "{root}/files/.../secret",
        "{root}/files/..%5csecret",
        "{root}/files\\..\\secret",
        "{root}/files/a\\b",
        "{root}/files/a b",
        "{root}/files/a\tb",
        "{root}/files/a\r\nX-Forged: 1",
        "{root}/files/%00",
        "{root}/files/%0d%0aX-Forged:1",
        "{root}/files/\x7f",
        "{root}/files/é",
        "{root}@evil.test/files/a",
        "http://user@127.0.0.1:{port}/files/a",
        "http://user:pw@127.0.0.1:{port}/files/a",
        "http://evil.test#@127.0.0.1:{port}/files/a",
        "http://evil.test\\@127.0.0.1:{port}/files/a",
        "http://127.0.0.1:{port}.evil.test/files/a",
        "http://127.0.0.1.evil.test:{port}/files/a",
        "http://127.0.0.1/files/a",
        "http://127.0.0.1:/files/a",
        "http://127.0.0.1:0/files/a",
        "http://127.0.0.1:65536/files/a",
        "http://127.0.0.1:99999999/files/a",
        "http://127.0.0.1:+{port}/files/a",
        "http://127.0.0.1:٨٠/files/a",
        "http://127.0.0.2:{port}/files/a",
        "http://127.1:{port}/files/a",
        "http://2130706433:{port}/files/a",
        "http://0x7f000001:{port}/files/a",
        "http://0177.0.0.1:{port}/files/a",
        "http://127.0.0.1.:{port}/files/a",
        "http://[::ffff:127.0.0.1]:{port}/files/a",
        "http://[::1]:{port}/files/a",
        "http://[::1/files/a",
        "http://localhost:{port}/files/a",
        "http://%31%32%37.0.0.1:{port}/files/a",
        "https://127.0.0.1:{port}/files/a",
        "ftp://127.0.0.1:{port}/files/a",
        "file:///etc/passwd",
        "gopher://127.0.0.1:{port}/files/a",
        "//127.0.0.1:{port}/files/a",
        "/files/a",
        "http:/files/a",
        "http://",
        "http:///files/a",
        " {root}/files/a",
        "{root}/files/a\n",
        "",
        "\x1b[2J",
        "%",
    ],
)
async def test_a_url_that_is_not_on_the_list_is_refused_without_a_connection(
    make, site, anyio_backend, url
):
    async with make(allow=[f"{site.root}/files"], private=["127.0.0.0/8", "::1/128"]) as handler:
        opened = await Guest(handler).open(url.format(root=site.root, port=site.server_port))
        assert opened.kind is OutcomeKind.HANDLED
        assert opened.response.values[:2] == (failed(OPEN, errno.EACCES), 0)
    assert site.asked == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        "/files",
        "/files/",
        "/files/a",
        "/files/a/b.txt",
        "/files//a",
        "/files?q=../../x",
        "/files/a?x=http://evil.test/",
        "/files/a%20b",
        "/files/100%25",
        "/files/.hidden",
        "/files/a..b",
        "/files/a@b:c",
        "/files/%e2%82%ac",
    ],
)
async def test_a_url_on_the_list_or_below_is_fetched(make, site, anyio_backend, path):
    async with make(allow=[f"{site.root}/files"]) as handler:
        assert await Guest(handler).fetch(site.root + path) == path.encode()


@pytest.mark.anyio
async def test_scheme_and_host_are_compared_without_case(make, site, resolve, anyio_backend):
    resolve("127.0.0.1")
    port = site.server_port
    async with make(allow=[f"HTTP://Files.Test:{port}/A"], private=["127.0.0.1/32"]) as handler:
        assert await Guest(handler).fetch(f"hTTp://fILES.tEST:{port}/A") == b"/A"


@pytest.mark.anyio
async def test_by_default_nothing_is_allowed(fetch, site, anyio_backend):
    async with fetch.Fetch() as handler:
        opened = await Guest(handler).open(site.root)
    assert opened.response.value1 == failed(OPEN, errno.EACCES)


PIECES = [
    "http", "https", "HTTP", "://", ":", "//", "/", "\\", "@", "?", "#", ";", "%", ".",
    "good.test", "evil.test", "GOOD.test", "[::1]", ":8080", ":80", ":08080", "8080", "files",
    "/files", "a", "..", "%2e%2e", "%2f", "%5c", "%40", "\u3002", "\u017f", "\t", "\n", " ",
    "\x00",
]  # fmt: skip


@given(
    st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=10).map("".join),
        st.lists(st.sampled_from(PIECES), max_size=6).map(
            lambda tail: "http://good.test:8080/files" + "".join(tail)
        ),
        st.text(max_size=40).map("http://good.test:8080/files/".__add__),
    )
)
@settings(max_examples=500)
def test_no_url_with_another_host_or_port_is_taken_for_the_prefix(fetch, text):
    prefix = fetch.parse_url("http://good.test:8080/files")
    try:
        url = fetch.parse_url(text)
    except ValueError:
        return
    if url.is_under(prefix):
        # Two other parsers, the one of the library that connects among them.
        split = urlsplit(text)
        assert (split.scheme.lower(), split.hostname, split.port) == ("http", "good.test", 8080)
        other = httpcore.URL(text)
        assert (other.scheme, other.host, other.port) == (b"http", b"good.test", 8080)
        assert split.username is split.password is None
        path = unquote(split.path)
        assert path == "/files" or path.startswith("/files/")
        assert ".." not in path.replace("\\", "/").split("/")


@given(
    host=st.from_regex(r"[a-z0-9]{1,5}(\.[a-z]{1,5}){1,2}", fullmatch=True),
    port=st.integers(1, 65535),
    other=st.from_regex(r"[a-z0-9]{1,5}(\.[a-z]{1,5}){1,2}", fullmatch=True),
    other_port=st.integers(1, 65535),
)
def test_a_prefix_takes_its_own_host_and_port_only(fetch, host, port, other, other_port):
    prefix = fetch.parse_url(f"http://{host}:{port}")
    url = fetch.parse_url(f"http://{other}:{other_port}/x")
    assert url.is_under(prefix) == (host == other and port == other_port)


# --- addresses -------------------------------------------------------------------------


NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1",
    "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%2", "fec0::1", "fd00::1", "ff02::1", "ff0e::1",
    "2001:db8::1", "2001::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "2002:7f00:1::1", "2002:a00:1::1", "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1",
    "64:ff9b:1::8.8.8.8",
]  # fmt: skip
PUBLIC = [
    "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1",
]  # fmt: skip


class Recorder(httpcore.AsyncNetworkBackend):
    """Keeps the addresses that it is to connect to, and reaches none."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.tried.append(host)
        raise httpcore.ConnectError(f"{host} is out of reach")


def checked(fetch, *, private=(), literals=()):
    recorder = Recorder()
    backend = fetch.CheckedBackend(
        recorder, [ip_network(n) for n in private], [ip_address(a) for a in literals]
    )
    return backend, recorder


@pytest.mark.anyio
@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_a_host_at_an_address_that_is_not_public_is_not_connected_to(
    fetch, resolve, anyio_backend, address
):
    resolve(address)
    backend, recorder = checked(fetch, literals=["127.0.0.1", "10.0.0.1"])
    with pytest.raises(fetch.FetchError) as caught:
        await backend.connect_tcp("files.test", 80)
    assert caught.value.native == errno.EACCES
    assert recorder.tried == []


@pytest.mark.anyio
@pytest.mark.parametrize("address", PUBLIC)
async def test_a_host_at_a_public_address_is_connected_to_at_that_address(
    fetch, resolve, anyio_backend, address
):
    asked = resolve(address)
    backend, recorder = checked(fetch)
    with pytest.raises(httpcore.ConnectError):
        await backend.connect_tcp("files.test", 80)
    assert asked == ["files.test"]
    assert recorder.tried == [address]


@pytest.mark.anyio
@pytest.mark.parametrize("private", ["10.0.0.2", "::1", "::ffff:10.0.0.2"])
async def test_one_address_that_is_not_allowed_spoils_the_host(
    fetch, resolve, anyio_backend, private
):
    resolve("8.8.8.8", private, "8.8.4.4")
    backend, recorder = checked(fetch, private=["10.0.0.1/32"])
    with pytest.raises(fetch.FetchError):
        await backend.connect_tcp("files.test", 80)
    assert recorder.tried == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "allowed"),
    [("127.0.0.1", True), ("8.8.8.8", True), ("10.0.0.1", False), ("127.0.0.2", False)],
)
async def test_an_address_as_host_is_not_looked_up_but_checked_as_well(
    fetch, resolve, anyio_backend, host, allowed
):
    asked = resolve("8.8.8.8")
    backend, recorder = checked(fetch, literals=["127.0.0.1"])
    with pytest.raises(httpcore.ConnectError if allowed else fetch.FetchError):
        await backend.connect_tcp(host, 80)
    assert recorder.tried == [host] * allowed
    assert asked == []


@pytest.mark.anyio
async def test_all_addresses_of_a_host_are_tried_in_order(fetch, resolve, anyio_backend):
    resolve("8.8.8.8", "2606:4700::1111", "8.8.8.8", "10.0.0.1")
    backend, recorder = checked(fetch, private=["10.0.0.0/8"])
    with pytest.raises(httpcore.ConnectError, match=r"10\.0\.0\.1 is out of reach"):
        await backend.connect_tcp("files.test", 80)
    assert recorder.tried == ["8.8.8.8", "2606:4700::1111", "10.0.0.1"]


@pytest.mark.anyio
async def test_a_host_without_addresses_is_a_network_error(fetch, resolve, anyio_backend):
    resolve()
    backend, recorder = checked(fetch)
    with pytest.raises(httpcore.ConnectError, match="no address"):
        await backend.connect_tcp("files.test", 80)
    assert recorder.tried == []


@pytest.mark.anyio
async def test_a_private_address_on_the_list_is_allowed_for_itself_only(
    make, site, resolve, anyio_backend
):
    resolve("127.0.0.1")
    named = f"http://files.test:{site.server_port}"
    async with make(allow=[site.root, named]) as handler:
        guest = Guest(handler)
        assert await guest.fetch(f"{site.root}/a") == b"/a"
        assert (await guest.open(f"{named}/a")).response.value1 == failed(OPEN, errno.EACCES)
    assert site.asked == ["/a"]


@pytest.mark.anyio
@pytest.mark.parametrize(("private", "allowed"), [("127.0.0.0/8", True), ("10.0.0.0/8", False)])
async def test_a_host_may_be_in_a_private_network_that_is_listed(
    make, site, resolve, anyio_backend, private, allowed
):
    asked = resolve("127.0.0.1")
    named = f"http://files.test:{site.server_port}"
    async with make(allow=[named], private=[private]) as handler:
        opened = await Guest(handler).open(f"{named}/a")
    status = Status(OPEN).encode() if allowed else failed(OPEN, errno.EACCES)
    assert opened.response.value1 == status
    assert asked == ["files.test"]
    assert site.asked == ["/a"] * allowed


@pytest.mark.anyio
async def test_a_name_that_changes_its_address_is_looked_up_and_checked_each_time(
    make, site, resolve, anyio_backend
):
    named = f"http://files.test:{site.server_port}"
    async with make(allow=[named], private=["127.0.0.0/8"]) as handler:
        guest = Guest(handler)
        asked = resolve("127.0.0.1")
        # The answer ends with the connection, so that the next one is made anew.
        assert await guest.fetch(f"{named}/until_close") == b"no length"
        assert asked == ["files.test"]
        resolve("10.0.0.1")
        opened = await guest.open(f"{named}/until_close")
        assert opened.response.value1 == failed(OPEN, errno.EACCES)


@pytest.mark.anyio
async def test_the_next_address_is_tried_where_one_refuses(make, site, resolve, anyio_backend):
    resolve("127.0.0.2", "127.0.0.1")
    named = f"http://files.test:{site.server_port}"
    async with make(allow=[named], private=["127.0.0.0/8"]) as handler:
        assert await Guest(handler).fetch(f"{named}/a") == b"/a"


@pytest.mark.anyio
async def test_a_name_that_cannot_be_looked_up_is_a_network_error(make, monkeypatch, anyio_backend):
    async def getaddrinfo(host, port, **options):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    async with make(allow=["http://files.test"]) as handler:
        opened = await Guest(handler).open("http://files.test/a")
    assert opened.response.value1 == failed(OPEN, errno.EIO)


# --- redirects -------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("{root}/files/b", "/files/b"),
        ("/files/b?x=1", "/files/b?x=1"),
        ("../files/b", "/files/b"),
        ("?x=1", None),
        ("//127.0.0.1:{port}/files/b", "/files/b"),
        ("/files/b#part", "/files/b"),
    ],
)
async def test_a_redirect_to_an_allowed_url_is_followed(
    make, site, anyio_backend, status, location, path
):
    location = location.format(root=site.root, port=site.server_port)
    start = f"/status/{status}?{location}"
    async with make(allow=[f"{site.root}/files", f"{site.root}/status"], redirects=1) as handler:
        opened = await Guest(handler).open(site.root + start)
        if path is None:
            # It leads to itself, and is one redirect too many.
            assert opened.response.value1 == failed(OPEN, status, 1)
        else:
            assert opened.response.value1 == Status(OPEN).encode()
            assert site.asked[1:] == [path]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "location",
    [
        "{root}/secret",
        "/secret",
        "../secret",
        "/files/%2e%2e/secret",
        "/files/..%2fsecret",
        "http://evil.test/files/b",
        "//evil.test/files/b",
        "https://127.0.0.1:{port}/files/b",
        "http://127.0.0.1:1/files/b",
        "http://user@127.0.0.1:{port}/files/b",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://[::1/files/b",
        "/files/a b",
        "/files\\b",
        "/files/é",
        "/files/" + "a" * 3000,
    ],
)
async def test_a_redirect_to_a_url_that_is_not_allowed_is_refused(
    make, site, anyio_backend, location
):
    location = location.format(root=site.root, port=site.server_port)

    class Redirect(Answer):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)
            self.begin({"Location": location, "Content-Length": "0"}, 302)

    site.RequestHandlerClass = Redirect
    async with make(allow=[f"{site.root}/files"]) as handler:
        opened = await Guest(handler).open(f"{site.root}/files/a")
        assert opened.response.values[:2] == (failed(OPEN, errno.EACCES), 0)
    assert site.asked == ["/files/a"]


@pytest.mark.anyio
@pytest.mark.parametrize("limit", [0, 1, 5])
async def test_of_a_redirect_too_many_the_guest_gets_the_status(make, site, anyio_backend, limit):
    async with make(allow=[site.root], redirects=limit) as handler:
        opened = await Guest(handler).open(f"{site.root}/status/307?/status/307?/")
        assert opened.response.values[:2] == (
            Status(OPEN).encode() if limit >= 2 else failed(OPEN, 307, 1),
            1 if limit >= 2 else 0,
        )
        loop = await Guest(handler).open(f"{site.root}/status/302?")
        assert loop.response.value1 == failed(OPEN, 302, 1)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "status", [201, 204, 206, 300, 304, 305, 400, 401, 403, 404, 500, 503, 999]
)
async def test_an_answer_other_than_200_fails_with_the_http_status(
    make, site, anyio_backend, status
):
    async with make(allow=[site.root], max_open=1) as handler:
        guest = Guest(handler)
        for _ in range(2):
            opened = await guest.open(f"{site.root}/status/{status}?/elsewhere")
            assert opened.response.values[:2] == (failed(OPEN, status, 1), 0)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (302, Status(OPEN).encode()),
        (404, failed(OPEN, 404, 1)),
        (200, failed(OPEN, errno.EFBIG)),
    ],
)
async def test_a_body_that_is_not_wanted_is_not_waited_for(
    make, site, anyio_backend, status, answer
):
    async with make(allow=[site.root], max_bytes=999) as handler:
        opened = await Guest(handler).open(f"{site.root}/stalled/{status}?/a")
        assert opened.response.value1 == answer
        assert await happened(site.closed)


# --- networks that fail ----------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["cut_headers", "nothing", "garbage", "long_header", "bad_length"])
async def test_a_server_that_talks_no_http_is_a_network_error(make, site, anyio_backend, name):
    async with make(allow=[site.root], max_open=1) as handler:
        guest = Guest(handler)
        opened = await guest.open(f"{site.root}/{name}")
        assert opened.response.values[:2] == (failed(OPEN, errno.EIO), 0)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_a_port_where_nobody_listens_is_a_network_error(make, anyio_backend):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with make(allow=[url]) as handler:
        assert (await Guest(handler).open(url)).response.value1 == failed(OPEN, errno.EIO)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["cut", "cut_chunk"])
async def test_a_body_that_is_cut_off_fails_and_frees_the_handle(make, site, anyio_backend, name):
    async with make(allow=[site.root], max_open=1) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/{name}")
        assert (await guest.read(handle)).output == 10
        end = await guest.read(handle)
        assert end.response.values[:2] == (failed(READ, errno.EIO), 0)
        assert end.output is None
        assert (await guest.read(handle)).response.value1 == invalid(READ)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_content_declared_longer_than_allowed_is_refused_at_once(make, site, anyio_backend):
    async with make(allow=[site.root], max_bytes=len(BIG) - 1, max_open=1) as handler:
        guest = Guest(handler)
        for name in ("big", "huge_length"):
            opened = await guest.open(f"{site.root}/{name}")
            assert opened.response.values[:2] == (failed(OPEN, errno.EFBIG), 0)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_content_of_exactly_the_limit_is_fetched(make, site, anyio_backend):
    async with make(allow=[site.root], max_bytes=len(BIG)) as handler:
        assert await Guest(handler).fetch(f"{site.root}/big") == BIG
    async with make(allow=[site.root], max_bytes=len("one two three")) as handler:
        assert await Guest(handler).fetch(f"{site.root}/chunked") == b"one two three"


@pytest.mark.anyio
async def test_content_that_grows_longer_than_allowed_is_cut_off(make, site, anyio_backend):
    async with make(allow=[site.root], max_bytes=100_000, max_open=1) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/huge")
        taken = 0
        while (outcome := await guest.read(handle, 65536)).output:
            taken += outcome.output
        assert outcome.response.values[:2] == (failed(READ, errno.EFBIG), 0)
        assert taken <= 100_000
        assert await happened(site.closed)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


# --- handles ---------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_handle_belongs_to_the_address_space_that_opened_it(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        owner, thief = Guest(handler, 0x5000), Guest(handler, 0x6000)
        handle = await owner.handle(f"{site.root}/a")
        assert (await thief.read(handle)).response.value1 == invalid(READ)
        assert (await thief.call(LENGTH, handle)).response.value1 == invalid(LENGTH)
        assert (await thief.call(CLOSE, handle)).response.value1 == invalid(CLOSE)
        assert thief.memory[BUFFER] == bytes(65536)
        assert await owner.rest(handle) == b"/a"


@pytest.mark.anyio
@pytest.mark.parametrize("handle", [0, 2, 4095, 4096, TOP])
@pytest.mark.parametrize("method", [READ, CLOSE, LENGTH])
async def test_a_handle_that_is_not_open_is_invalid(make, site, anyio_backend, method, handle):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        assert await guest.handle(f"{site.root}/a") == 1
        outcome = await guest.call(method, handle, BUFFER)
        assert outcome.kind is OutcomeKind.HANDLED
        assert outcome.response.values[:2] == (invalid(method), 0)


@pytest.mark.anyio
async def test_as_many_handles_as_allowed_are_open_at_a_time(make, site, anyio_backend):
    async with make(allow=[site.root], max_open=12) as handler:
        guest, other = Guest(handler, 0x5000), Guest(handler, 0x6000)
        handles = [await guest.handle(f"{site.root}/stall") for _ in range(12)]
        assert len(set(handles)) == 12
        for vcpu in (guest, other):
            opened = await vcpu.open(f"{site.root}/a")
            assert opened.response.values[:2] == (failed(OPEN, errno.EMFILE), 0)
        await guest.call(CLOSE, handles[5])
        assert await other.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_an_open_that_still_waits_counts_as_open(make, site, anyio_backend):
    async with make(allow=[site.root], max_open=1) as handler:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Guest(handler).open, f"{site.root}/hang")
            assert await happened(site.arrived)
            second = await Guest(handler).open(f"{site.root}/a")
            assert second.response.value1 == failed(OPEN, errno.EMFILE)
            tasks.cancel_scope.cancel()
        assert await Guest(handler).fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_handles_never_run_out(make, site, anyio_backend):
    async with make(allow=[site.root], max_open=2) as handler:
        guest = Guest(handler)
        kept = await guest.handle(f"{site.root}/stall")
        handler._last_handle = 4093
        found = []
        for _ in range(4):
            found.append(await guest.handle(f"{site.root}/a"))
            await guest.call(CLOSE, found[-1])
        assert kept == 1
        assert found == [4094, 4095, 2, 3]


@pytest.mark.anyio
async def test_an_unused_handle_is_taken_back_when_another_is_opened(make, site, anyio_backend):
    async with make(allow=[site.root], max_open=1, idle_timeout=0.001) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/stall")
        assert (await guest.read(handle)).output == 5
        await anyio.sleep(0.002)
        assert await guest.fetch(f"{site.root}/a") == b"/a"
        assert (await guest.read(handle)).response.value1 == invalid(READ)
        assert await happened(site.closed)


@pytest.mark.anyio
async def test_a_handle_that_is_being_read_is_not_taken_back(make, site, anyio_backend):
    async with make(allow=[site.root], idle_timeout=0.001) as handler:
        guest, other = Guest(handler), Guest(handler)
        handle = await guest.handle(f"{site.root}/steps")
        assert (await guest.read(handle)).output == 5
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guest.read, handle)
            await anyio.sleep(0.002)
            assert await other.fetch(f"{site.root}/a") == b"/a"
            site.go.set()
        assert guest.memory[BUFFER].startswith(b"second")


@pytest.mark.anyio
async def test_handles_are_read_side_by_side(make, site, anyio_backend):
    async with make(allow=[site.root]) as handler:
        waiting, reading = Guest(handler), Guest(handler)
        held = await waiting.handle(f"{site.root}/steps")
        assert (await waiting.read(held)).output == 5
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiting.read, held)
            await anyio.wait_all_tasks_blocked()
            assert await reading.fetch(f"{site.root}/big") == BIG
            site.go.set()
        assert waiting.memory[BUFFER].startswith(b"second")


@pytest.mark.anyio
@pytest.mark.parametrize("method", [READ, CLOSE])
async def test_a_handle_that_is_being_read_is_busy(make, site, anyio_backend, method):
    async with make(allow=[site.root]) as handler:
        first, second = Guest(handler), Guest(handler)
        handle = await first.handle(f"{site.root}/steps")
        assert (await first.read(handle)).output == 5
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.read, handle)
            await anyio.wait_all_tasks_blocked()
            outcome = await second.call(method, handle, BUFFER)
            assert outcome.response.values[:2] == (failed(method, errno.EBUSY), 0)
            site.go.set()
        assert first.memory[BUFFER].startswith(b"second")
        assert await first.rest(handle) == b""


# --- hostile parameters ----------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("buffer", [0, 0xDEAD_0000, TOP, BUFFER + 65530])
async def test_a_bad_buffer_loses_no_data(make, site, anyio_backend, buffer):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/big")
        for _ in range(2):
            outcome = await guest.read(handle, 4096, buffer)
            assert outcome.response.values[:2] == (invalid(READ), 0)
            assert outcome.output is None
        assert await guest.rest(handle) == BIG


@pytest.mark.anyio
@pytest.mark.parametrize("capacity", [65537, 1 << 32, TOP])
async def test_a_capacity_over_64_kib_is_invalid_and_loses_nothing(
    make, site, anyio_backend, capacity
):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/a")
        outcome = await guest.read(handle, capacity)
        assert outcome.response.values[:2] == (invalid(READ), 0)
        assert await guest.rest(handle) == b"/a"


@pytest.mark.anyio
@pytest.mark.parametrize("address", [0, 0xDEAD_0000, TOP, TOP - 2047, URL + 4095])
async def test_a_url_that_is_not_readable_is_invalid(make, anyio_backend, address):
    async with make() as handler:
        guest = Guest(handler)
        guest.memory.write(URL + 4095, b"h")
        outcome = await guest.call(OPEN, address)
        assert outcome.response.values[:2] == (invalid(OPEN), 0)


@pytest.mark.anyio
async def test_a_url_may_have_2048_bytes_and_no_more(make, site, anyio_backend):
    longest = f"{site.root}/".ljust(2048, "a")
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        assert await guest.fetch(longest) == longest.removeprefix(site.root).encode()
        assert (await guest.open(longest + "a")).response.value1 == invalid(OPEN)
        border = URL + 4096 - 2048
        guest.memory.regions = {border: bytearray(longest.encode())}
        assert (await guest.call(OPEN, border)).response.value1 == invalid(OPEN)


@pytest.mark.anyio
@given(
    raw=st.binary(max_size=200),
    method=st.integers(0, 6),
    values=st.tuples(*[st.integers(0, TOP)] * 2),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_the_guest_sends_it_gets_an_answer(make, anyio_backend, raw, method, values):
    async with make(allow=["http://127.0.0.1:1/files"]) as handler:
        guest = Guest(handler)
        outcomes = [await guest.open(raw), await guest.call(method, *values)]
    for outcome in outcomes:
        if outcome.kind is OutcomeKind.HANDLED:
            kind = Status.decode(outcome.response.value1).kind
            assert kind in (StatusKind.INVALID_PARAMETERS, StatusKind.FAILED)
        else:
            assert outcome.kind is OutcomeKind.REJECTED
            assert method not in (OPEN, READ, CLOSE, LENGTH)


@pytest.mark.anyio
@pytest.mark.parametrize("method", [0, 5, 0x0101, 0xFFFF])
async def test_an_unknown_method_is_rejected(make, anyio_backend, method):
    packet = BridgePacket(STANDARD_MAGIC, 0x0023, method)
    outcome = await drive(make(), packet)
    assert outcome.kind is OutcomeKind.REJECTED


# --- cancellation and shutdown ---------------------------------------------------------


@pytest.mark.anyio
async def test_a_cancelled_read_closes_the_transfer_and_frees_its_handle(make, site, anyio_backend):
    async with make(allow=[site.root], max_open=1) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/stall")
        assert (await guest.read(handle)).output == 5
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guest.read, handle)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert await happened(site.closed)
        assert (await guest.read(handle)).response.value1 == invalid(READ)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_a_cancelled_open_leaves_nothing_behind(make, site, anyio_backend):
    async with make(allow=[site.root], max_open=1) as handler:
        guest = Guest(handler)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guest.open, f"{site.root}/hang")
            assert await happened(site.arrived)
            tasks.cancel_scope.cancel()
        assert await happened(site.closed)
        assert await guest.fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_an_open_that_is_cancelled_in_a_tls_handshake_closes_its_socket(make, anyio_backend):
    def meet(listener: socket.socket) -> socket.socket:
        """Wait until the client has begun its handshake; never answer."""
        connection = listener.accept()[0]
        connection.settimeout(20)
        assert connection.recv(4096)
        return connection

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        async with make(allow=[url]) as handler, anyio.create_task_group() as tasks:
            tasks.start_soon(Guest(handler).open, url)
            connection = await anyio.to_thread.run_sync(meet, listener)
            tasks.cancel_scope.cancel()
        with connection:
            assert await anyio.to_thread.run_sync(connection.recv, 1) == b""
    gc.collect()


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["stall", "chunked", "big", "huge"])
@pytest.mark.parametrize("started", [False, True])
async def test_leaving_the_handler_closes_what_is_open(make, site, anyio_backend, name, started):
    async with make(allow=[site.root]) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/{name}")
        if started:
            assert (await guest.read(handle, 3)).output == 3
    if name in ("stall", "huge"):
        assert await happened(site.closed)


@pytest.mark.anyio
async def test_leaving_the_handler_ends_a_read_that_waits(make, site, anyio_backend):
    ended = []
    async with anyio.create_task_group() as tasks, make(allow=[site.root]) as handler:
        guest = Guest(handler)
        handle = await guest.handle(f"{site.root}/stall")
        assert (await guest.read(handle)).output == 5

        async def read() -> None:
            ended.append(await guest.read(handle))

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
    assert ended[0].response.value1 == failed(READ, errno.EIO)


@pytest.mark.anyio
async def test_a_handler_can_be_entered_again(make, site, anyio_backend):
    handler = make(allow=[site.root])
    for _ in range(2):
        async with handler:
            assert await Guest(handler).fetch(f"{site.root}/a") == b"/a"


@pytest.mark.anyio
async def test_a_handler_that_was_not_entered_says_so(make, anyio_backend):
    handler = make(allow=["http://127.0.0.1:1"])
    guest = Guest(handler)
    guest.memory.write(URL, b"http://127.0.0.1:1/a")
    backend = FakeBackend()
    backend.memory = guest.memory
    context = BridgeContext(TrapEvent(1, TrapReason.VMCALL, Registers(), length=3), backend)
    with pytest.raises(ServerStateError, match="__aenter__"):
        await handler.handle(context, BridgePacket(STANDARD_MAGIC, 0x0023, OPEN, URL))


@pytest.mark.anyio
async def test_in_a_server_a_read_past_its_deadline_costs_only_that_transfer(
    make, site, anyio_backend
):
    def trap(seq: int, method: int, value1: int, value2: int = 0) -> TrapEvent:
        registers = Registers(
            rcx=STANDARD_MAGIC, rdx=0x0023 | method << 16, r8=value1, r9=value2, cr3=0x5000
        )
        return TrapEvent(seq, TrapReason.VMCALL, registers, length=3)

    events = [
        trap(1, OPEN, URL),
        trap(2, READ, 1, BUFFER),
        trap(3, READ, 1, BUFFER),
        trap(4, READ, 1, BUFFER),
        trap(5, OPEN, URL + 2048),
        trap(6, READ, 2, BUFFER),
    ]
    memory = {
        URL: f"{site.root}/stall".encode().ljust(2048, b"\0")
        + f"{site.root}/a".encode().ljust(2048, b"\0"),
        BUFFER: bytes(65536),
    }
    handler = make(allow=[site.root], max_open=2)
    async with FakeBackend(events, memory=memory) as backend:
        server = BridgeServer(backend, Bridge(handler), timeout=1.0)
        outcomes = [outcome async for outcome in server.run()]
        assert [outcome.kind for outcome in outcomes] == [
            *(OutcomeKind.HANDLED, OutcomeKind.HANDLED, OutcomeKind.TIMEOUT),
            *(OutcomeKind.HANDLED, OutcomeKind.HANDLED, OutcomeKind.HANDLED),
        ]
        assert backend.writes[2].rbx == 5
        assert backend.writes[5].rax == Status(OPEN).encode()
        assert backend.writes[5].rbx == 2
        assert backend.writes[6].rbx == 2
        assert backend.memory[BUFFER].startswith(b"/a")


@pytest.mark.anyio
async def test_an_x86_guest_fetches_with_two_values(make, site, anyio_backend):
    def trap(seq: int, method: int, value1: int, value2: int = 0) -> TrapEvent:
        registers = Registers(rbp=STANDARD_MAGIC, rdx=0x0023 | method << 16, rsi=value1, rdi=value2)
        return TrapEvent(seq, TrapReason.VMCALL, registers, length=3, width=32)

    events = [trap(1, OPEN, URL), trap(2, READ, 1, BUFFER), trap(3, CLOSE, 1)]
    memory = {URL: f"{site.root}/big".encode().ljust(2048, b"\0"), BUFFER: bytes(65536)}
    async with FakeBackend(events, memory=memory) as backend:
        server = BridgeServer(backend, Bridge(make(allow=[site.root])))
        outcomes = [outcome async for outcome in server.run()]
        assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * 3
        assert backend.writes[1].rbx == 1
        assert backend.writes[2].rbx == outcomes[1].output == 4096
        assert backend.memory[BUFFER].startswith(BIG[:4096] + b"\0")


# --- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"allow": ["files.test"]}, r"allow: 'files.test': not of the form"),
        ({"allow": ["ftp://files.test"]}, "not of the form"),
        ({"allow": ["http://user@files.test"]}, "not of the form"),
        ({"allow": ["http://*.files.test"]}, "not of the form"),
        ({"allow": ["http://files.test/a?b"]}, "neither query nor fragment"),
        ({"allow": ["http://files.test/a#"]}, "neither query nor fragment"),
        ({"allow": ["http://files.test/../a"]}, "no dot segments"),
        ({"allow": ["http://files.test/a b"]}, "printable ASCII"),
        ({"allow": ["http://bücher.test"]}, "printable ASCII"),
        ({"allow": ["http://files.test:0"]}, "a port is 1 to 65535"),
        ({"allow": ["http://files..test"]}, "labels"),
        ({"allow": ["http://" + "a" * 64]}, "labels"),
        ({"allow": ["http://127.1"]}, "127.1"),
        ({"allow": ["http://0x7f.0x1"]}, "0x7f.0x1"),
        ({"allow": ["http://[::zz]"]}, "not of the form"),
        ({"allow": ["http://[1:2]"]}, "1:2"),
        ({"allow": "http://files.test"}, "allow"),
        ({"private": ["10.0.0.0/33"]}, "private: '10.0.0.0/33'"),
        ({"private": ["10.0.0.1/8"]}, "private: 10.0.0.1/8 has host bits set"),
        ({"private": ["lan"]}, "private: 'lan'"),
        ({"redirects": -1}, "redirects"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_open": 0}, "max_open"),
        ({"max_open": 4096}, "max_open"),
        ({"idle_timeout": 0.0}, "idle_timeout"),
        ({"idle_timeout": -1.0}, "idle_timeout"),
        ({"proxy": "x"}, "proxy"),
    ],
)
def test_wrong_settings_are_refused_by_name(fetch, wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, fetch.Fetch.Settings)


def test_an_idle_timeout_that_is_no_number_is_refused(fetch):
    with pytest.raises(ValueError, match="idle_timeout"):
        fetch.Fetch.Settings(idle_timeout=float("nan"))


@pytest.mark.parametrize(
    ("text", "authority"),
    [
        ("http://files.test", "files.test"),
        ("http://files.test:80", "files.test"),
        ("https://files.test:80", "files.test:80"),
        ("https://FILES.test:443/", "files.test"),
        ("http://[0:0::1]", "[::1]"),
        ("http://[::1]:8080", "[::1]:8080"),
        ("http://under_score.test", "under_score.test"),
    ],
)
def test_a_host_is_named_to_the_server_in_its_plain_form(fetch, text, authority):
    assert fetch.parse_url(text).authority == authority


def test_without_httpcore_the_handler_says_what_to_install(load_handler, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpcore", None)
    monkeypatch.delitem(sys.modules, "vmibridge.handlers._fetch_network", raising=False)
    module = load_handler("fetch")
    with pytest.raises(MissingExtraError, match="the extra 'fetch'"):
        module.Fetch()
    assert module.Fetch.REQUEST == 0x0023
