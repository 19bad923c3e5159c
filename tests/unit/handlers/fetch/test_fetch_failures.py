"""Redirects, networks that fail, bodies that are too long, and what a hostile guest asks for."""

import errno
import socket

import pytest
from fetch_parts import (
    BIG,
    BUFFER,
    CLOSE,
    LENGTH,
    OPEN,
    READ,
    TOP,
    URL,
    Answer,
    Guest,
    failed,
    happened,
    invalid,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import (
    BridgePacket,
    OutcomeKind,
    Status,
    StatusKind,
)
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.testing import drive

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
