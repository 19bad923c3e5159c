"""What the fetch handler may fetch: URLs on its list, hosts at public addresses.

Laws: nothing is asked of a host that is not on the list, and no connection goes to an address that
was not checked.
"""

import errno
import socket
from ipaddress import ip_address, ip_network
from urllib.parse import unquote, urlsplit

import anyio
import httpcore
import pytest
from fetch_parts import OPEN, Guest, failed
from hypothesis import given, settings
from hypothesis import strategies as st

from vmibridge import (
    OutcomeKind,
    Status,
)
from vmibridge.handlers._fetch_network import CheckedBackend
from vmibridge.handlers._fetch_urls import parse_url

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
def test_no_url_with_another_host_or_port_is_taken_for_the_prefix(text):
    prefix = parse_url("http://good.test:8080/files")
    try:
        url = parse_url(text)
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
def test_a_prefix_takes_its_own_host_and_port_only(host, port, other, other_port):
    prefix = parse_url(f"http://{host}:{port}")
    url = parse_url(f"http://{other}:{other_port}/x")
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


def checked(*, private=(), literals=()):
    recorder = Recorder()
    backend = CheckedBackend(
        recorder, [ip_network(n) for n in private], [ip_address(a) for a in literals]
    )
    return backend, recorder


@pytest.mark.anyio
@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_a_host_at_an_address_that_is_not_public_is_not_connected_to(
    fetch, resolve, anyio_backend, address
):
    resolve(address)
    backend, recorder = checked(literals=["127.0.0.1", "10.0.0.1"])
    with pytest.raises(fetch.FetchError) as caught:
        await backend.connect_tcp("files.test", 80)
    assert caught.value.native == errno.EACCES
    assert recorder.tried == []


@pytest.mark.anyio
@pytest.mark.parametrize("address", PUBLIC)
async def test_a_host_at_a_public_address_is_connected_to_at_that_address(
    resolve, anyio_backend, address
):
    asked = resolve(address)
    backend, recorder = checked()
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
    backend, recorder = checked(private=["10.0.0.1/32"])
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
    backend, recorder = checked(literals=["127.0.0.1"])
    with pytest.raises(httpcore.ConnectError if allowed else fetch.FetchError):
        await backend.connect_tcp(host, 80)
    assert recorder.tried == [host] * allowed
    assert asked == []


@pytest.mark.anyio
async def test_all_addresses_of_a_host_are_tried_in_order(resolve, anyio_backend):
    resolve("8.8.8.8", "2606:4700::1111", "8.8.8.8", "10.0.0.1")
    backend, recorder = checked(private=["10.0.0.0/8"])
    with pytest.raises(httpcore.ConnectError, match=r"10\.0\.0\.1 is out of reach"):
        await backend.connect_tcp("files.test", 80)
    assert recorder.tried == ["8.8.8.8", "2606:4700::1111", "10.0.0.1"]


@pytest.mark.anyio
async def test_a_host_without_addresses_is_a_network_error(resolve, anyio_backend):
    resolve()
    backend, recorder = checked()
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
