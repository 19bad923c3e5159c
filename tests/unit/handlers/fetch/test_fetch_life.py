"""The fetch handler's life: cancellation, shutdown, a server around it, its settings.

Law: every end of a transfer frees its handle and its socket.
"""

import errno
import gc
import socket
import sys

import anyio
import msgspec
import pytest
from fetch_parts import BIG, BUFFER, CLOSE, OPEN, READ, URL, Guest, failed, happened, invalid

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgePacket,
    BridgeServer,
    OutcomeKind,
    Registers,
    Status,
    TrapEvent,
    TrapReason,
)
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.errors import MissingExtraError, ServerStateError
from vmibridge.handlers._fetch_urls import parse_url
from vmibridge.testing import FakeBackend

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
def test_a_host_is_named_to_the_server_in_its_plain_form(text, authority):
    assert parse_url(text).authority == authority


def test_without_httpcore_the_handler_says_what_to_install(load_handler, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpcore", None)
    monkeypatch.delitem(sys.modules, "vmibridge.handlers._fetch_network", raising=False)
    module = load_handler("fetch")
    with pytest.raises(MissingExtraError, match="the extra 'fetch'"):
        module.Fetch()
    assert module.Fetch.REQUEST == 0x0023
