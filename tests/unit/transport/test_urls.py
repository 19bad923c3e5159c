"""Where agents connect and servers listen: what a URL says, and what it may not."""

from pathlib import Path

import pytest

from vmibridge import open_backend
from vmibridge.errors import BackendSpecError
from vmibridge.transport import RemoteBackend
from vmibridge.transport.urls import TcpUrl, TlsUrl, UnixUrl, parse_url

FILES = "cert=c.pem&key=k.pem&ca=a.pem"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/x.sock", UnixUrl(Path("/run/x.sock"))),
        ("unix:x?mode=0o660&uid=0,1000", UnixUrl(Path("x"), 0o660, (0, 1000))),
        ("tcp:127.0.0.1:7000", TcpUrl("127.0.0.1", 7000)),
        ("tcp:localhost:0", TcpUrl("localhost", 0)),
        ("tcp:[::1]:7000", TcpUrl("::1", 7000)),
        ("tcp:0.0.0.0:7000?anywhere=true", TcpUrl("0.0.0.0", 7000)),
        (
            f"tls:host.example:7000?{FILES}",
            TlsUrl("host.example", 7000, Path("c.pem"), Path("k.pem"), Path("a.pem"), (),
                   "host.example"),
        ),
        (
            f"tls:0.0.0.0:7000?{FILES}&names=a,b&name=s",
            TlsUrl("0.0.0.0", 7000, Path("c.pem"), Path("k.pem"), Path("a.pem"), ("a", "b"), "s"),
        ),
    ],
)  # fmt: skip
def test_a_url_says_where(text, expected):
    assert parse_url(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a URL is"),
        ("/run/x.sock", "a URL is"),
        ("http://host", "a URL is"),
        ("unix:", "path"),
        ("unix:x?mode=rw", "mode"),
        ("unix:x?mode=0o1777", "mode"),
        ("unix:x?uid=me", "uid"),
        ("unix:x?colour=red", "no option 'colour'"),
        ("unix:x?mode=0o600&mode=0o660", "twice"),
        ("unix:x?mode", "OPTION=VALUE"),
        ("tcp:127.0.0.1", "HOST:PORT"),
        ("tcp::7000", "HOST:PORT"),
        ("tcp:127.0.0.1:70000", "a port is a number up to 65535"),
        ("tcp:127.0.0.1:seven", "HOST:PORT"),
        ("tcp:::1:7000", "brackets"),
        ("tcp:0.0.0.0:7000", "anyone there could connect"),
        ("tcp:192.0.2.1:7000", "anyone there could connect"),
        ("tcp:host.example:7000", "anyone there could connect"),
        ("tcp:[::]:7000", "anyone there could connect"),
        ("tcp:127.0.0.1:7000?anywhere=perhaps", "anywhere"),
        ("tls:host:7000", "cert"),
        ("tls:host:7000?cert=c&key=k", "ca"),
    ],
)
def test_what_is_wrong_is_told(text, why):
    with pytest.raises(BackendSpecError, match=why):
        parse_url(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("unix:/x?mode=0o660", "unix:/x"),
        ("tcp:[::1]:7000", "tcp:[::1]:7000"),
        (f"tls:host:7000?{FILES}", "tls:host:7000"),
    ],
)
def test_it_is_shown_without_its_options(text, shown):
    assert str(parse_url(text)) == shown


def test_a_spec_names_the_vm_of_an_agent():
    backend = open_backend("remote:unix:/run/s?mode=0o660", vm="web")
    assert isinstance(backend, RemoteBackend)
    assert backend.vm == "web"
    with pytest.raises(BackendSpecError):
        open_backend("remote:tcp:192.0.2.1:1")
