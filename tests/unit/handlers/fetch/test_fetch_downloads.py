"""Downloads for the guest, against a real HTTP server on loopback: whole ones, and handles."""

import errno
import ssl
from collections.abc import Iterator

import anyio
import pytest
from fetch_parts import (
    BIG,
    BUFFER,
    CLOSE,
    LENGTH,
    OPEN,
    READ,
    TOP,
    Guest,
    Site,
    failed,
    happened,
    invalid,
    serving,
)

from vmibridge import (
    OutcomeKind,
    Status,
)
from vmibridge.bridge.contract import STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4


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
        handler._transfers._last_handle = 4093
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
