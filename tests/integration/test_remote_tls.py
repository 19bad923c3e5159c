"""Who may connect: by certificates over TLS, by users over a unix socket.

Whoever may not is refused in bounded time and memory, and the VM that is served goes on.
"""

import datetime
import errno
import os
import re
import resource
import socket
import ssl
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from patience import HUNG
from remote_parts import Certificates, Echo, FakeAgent, frame_of, served, trap

from vmibridge.errors import (
    BackendError,
    BackendSpecError,
    ConnectionLostError,
    RefusedByServerError,
)
from vmibridge.testing import FakeBackend
from vmibridge.transport import Agent, AgentLimits
from vmibridge.transport.agent.dial import dial
from vmibridge.transport.sockets import connection
from vmibridge.transport.sockets.tls import tls_context
from vmibridge.transport.urls import parse_url
from vmibridge.transport.wire import Ping, encode

pytestmark = pytest.mark.anyio
MASK = (1 << 64) - 1
LIMITS = AgentLimits(handshake=0.5, handshakes=16)


@pytest.fixture
def made(tmp_path):
    return Certificates(tmp_path)


@pytest.fixture
def strangers(tmp_path_factory):
    """Certificates of another authority."""
    return Certificates(tmp_path_factory.mktemp("strangers"))


class Served:
    """A server, and a VM that is served by it, which `goes_on` asks something."""

    def __init__(self, server, link):
        self.server, self.link = server, link
        self.port = server.ports[0]
        self.seq = 0

    async def goes_on(self):
        self.seq += 1
        self.link.post(frame_of(trap(self.seq, value=self.seq)))
        with anyio.fail_after(HUNG):
            (answer,) = await self.link.receive()
        assert (answer.seq, answer.rax) == (self.seq, ~self.seq & MASK)


@asynccontextmanager
async def over_tls(made, options=""):
    url = f"tls:127.0.0.1:0?{made.of('localhost')}{options}"
    async with (
        served(url, Echo(), limits=LIMITS) as server,
        connecting(made, server.ports[0]) as dialled,
    ):
        there = Served(server, dialled.link)
        await there.goes_on()
        yield there
        await there.goes_on()


def connecting(made, port, *, name="agent.example", expects="localhost", **options):
    url = f"tls:127.0.0.1:{port}?{made.of(name, **options)}&name={expects}"
    return dial(parse_url(url), os.urandom(16), "vm", FakeBackend())


async def is_refused(how, kind=ConnectionLostError, match=""):
    with anyio.fail_after(HUNG), pytest.raises(kind, match=match):
        async with how:
            raise AssertionError("welcome")


class TestCertificates:
    async def test_one_of_the_authority_is_welcome(self, made):
        async with over_tls(made) as there:
            assert there.server.vms == ["vm"]

    async def test_one_of_another_authority_is_not(self, made, strangers):
        async with over_tls(made) as there:
            # It trusts the server, and the server does not trust it.
            strangers.ca = made.ca
            await is_refused(connecting(strangers, there.port), match="TLS")

    async def test_a_server_of_another_authority_is_not_talked_to(self, made, strangers):
        async with over_tls(made) as there:
            await is_refused(connecting(strangers, there.port), match="certificate is not accepted")

    async def test_one_that_has_expired_is_not(self, made):
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        async with over_tls(made) as there:
            await is_refused(connecting(made, there.port, not_after=past), match="TLS")

    async def test_a_server_of_another_name_is_not_talked_to(self, made):
        async with over_tls(made) as there:
            await is_refused(
                connecting(made, there.port, expects="other.example"), match="is not accepted"
            )

    async def test_a_client_of_another_name_is_not_served(self, made):
        async with over_tls(made, "&names=agent.example,other.example") as there:
            await is_refused(
                connecting(made, there.port, name="third.example"),
                RefusedByServerError,
                match="third.example",
            )

    @pytest.mark.parametrize("certificate", ["none", "old version"])
    async def test_without_a_certificate_or_tls_1_3_there_is_no_way_in(self, made, certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(made.ca)
        if certificate == "old version":
            context = tls_context(
                parse_url(f"tls:localhost:1?{made.of('agent.example')}"), server_side=False
            )
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with over_tls(made) as there:

            def talk():
                with (
                    socket.create_connection(("127.0.0.1", there.port), timeout=10) as plain,
                    context.wrap_socket(plain, server_hostname="localhost") as wrapped,
                ):
                    wrapped.send(b"\0" * 100)
                    return wrapped.recv(1)

            with pytest.raises(OSError):
                assert await anyio.to_thread.run_sync(talk) == b"", "an answer"
                raise ConnectionResetError

    async def test_the_agent_tells_what_is_wrong_with_a_certificate_and_goes_on_trying(
        self, made, strangers, caplog
    ):
        async with over_tls(made) as there:
            url = f"tls:127.0.0.1:{there.port}?{strangers.of('a.example')}&name=localhost"
            async with FakeBackend() as vm, anyio.create_task_group() as tasks:
                agent = Agent(vm, url, longest_pause=0.01)
                tasks.start_soon(agent.run)
                with anyio.fail_after(HUNG):
                    while "is not accepted" not in caplog.text:
                        await anyio.sleep(0.001)
                agent.stop()


class TestFiles:
    @pytest.mark.parametrize("which", ["cert", "key", "ca"])
    def test_one_that_is_not_there_or_is_something_else_is_told(self, made, tmp_path, which):
        files = dict(part.split("=") for part in made.of("localhost").split("&"))
        for content in (None, b"not a certificate"):
            path = tmp_path / f"wrong-{which}"
            if content:
                path.write_bytes(content)
            options = "&".join(f"{k}={v}" for k, v in {**files, which: path}.items())
            with pytest.raises(BackendSpecError, match=f"wrong-{which}"):
                tls_context(parse_url(f"tls:localhost:1?{options}"), server_side=True)

    @pytest.mark.parametrize("which", ["cert", "key", "ca"])
    def test_one_that_may_not_be_looked_for_is_told(self, made, which):
        files = dict(part.split("=") for part in made.of("localhost").split("&"))
        options = "&".join(f"{k}={v}" for k, v in {**files, which: "x" * 300}.items())
        with pytest.raises(BackendSpecError, match=r"x{300}: File name too long"):
            tls_context(parse_url(f"tls:localhost:1?{options}"), server_side=True)

    @pytest.mark.parametrize("which", ["cert", "key", "ca"])
    def test_one_that_may_not_be_read_is_named_and_no_other(self, made, which, monkeypatch):
        options = made.of("localhost")
        refused = dict(part.split("=") for part in options.split("&"))[which]
        plain = Path.open

        def opened(path, *arguments, **named):
            if str(path) == refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return plain(path, *arguments, **named)

        monkeypatch.setattr(Path, "open", opened)
        url = parse_url(f"tls:localhost:1?{options}")
        with pytest.raises(BackendSpecError, match=f": {re.escape(refused)}: Permission denied$"):
            tls_context(url, server_side=True)


class TestPeersThatDoNotKeepToIt:
    async def test_garbage_is_hung_up_on(self, made):
        async with over_tls(made) as there:
            for data in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, os.urandom(5000)):
                async with await anyio.connect_tcp("127.0.0.1", there.port) as peer:
                    await peer.send(data)
                    await hangs_up(peer)
            await there.goes_on()

    async def test_silence_is_hung_up_on(self, made):
        async with over_tls(made) as there:
            async with await anyio.connect_tcp("127.0.0.1", there.port) as peer:
                await hangs_up(peer)
            async with connecting_raw(made, there.port) as wrapped:
                # It has shaken hands, and says nothing.
                await hangs_up(wrapped)

    async def test_half_a_hello_is_hung_up_on(self, tmp_path):
        url = f"unix:{tmp_path / 'x.sock'}"
        async with (
            served(url, Echo(), limits=LIMITS),
            await anyio.connect_unix(tmp_path / "x.sock") as peer,
        ):
            await peer.send(b"\x40\0\0\0\x91")
            await hangs_up(peer)

    async def crowd(self, made, count):
        """`count` connections: a third say nothing, a third send garbage, a third hang up."""
        async with over_tls(made) as there:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            crowd = []
            for number in range(count):
                peer = await anyio.connect_tcp("127.0.0.1", there.port)
                if number % 3 == 1:
                    await peer.send(b"\xff" * 100)
                if number % 3 == 2:
                    await peer.aclose()
                else:
                    crowd.append(peer)
                if len(crowd) > 64:
                    await crowd.pop(0).aclose()
                if number % 100 == 0:
                    await there.goes_on()
            with anyio.fail_after(HUNG):
                while there.server.refused < count - len(crowd) - LIMITS.handshakes:
                    await anyio.sleep(0.01)
            await there.goes_on()
            for peer in crowd:
                await peer.aclose()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 64 << 10  # KiB

    async def test_a_crowd_of_300_keeps_nobody_out(self, made):
        await self.crowd(made, 300)

    @pytest.mark.slow
    async def test_a_crowd_of_10_000_keeps_nobody_out(self, made):
        await self.crowd(made, 10_000)

    async def test_pings_of_a_peer_that_does_not_read_are_bounded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(connection, "_MAX_UNSENT", 64 << 10)
        url = f"unix:{tmp_path / 'x.sock'}"
        async with served(url, Echo()) as server, FakeAgent.connected(url) as agent:
            await agent.hello()
            (there,) = server._listener._connections
            pings = encode(Ping()) * 1000
            with anyio.fail_after(HUNG):
                while not there.closed:
                    with suppress(BlockingIOError, BrokenPipeError):
                        agent.connection._socket.send(pings)
                    await anyio.sleep(0)


@asynccontextmanager
async def connecting_raw(made, port):
    """A TLS connection with a good certificate, and no HELLO."""
    url = parse_url(f"tls:127.0.0.1:{port}?{made.of('agent.example')}&name=localhost")
    context = tls_context(url, server_side=False)
    async with await anyio.connect_tcp(
        "127.0.0.1",
        port,
        ssl_context=context,
        tls_hostname="localhost",
        tls_standard_compatible=False,
    ) as wrapped:
        yield wrapped


async def hangs_up(peer):
    with anyio.fail_after(HUNG):
        try:
            while await peer.receive():
                pass
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass


class TestUnixSockets:
    async def test_the_file_has_the_mode_that_was_asked_for(self, tmp_path):
        path = tmp_path / "x.sock"
        async with served(f"unix:{path}?mode=0o660", Echo()):
            assert path.stat().st_mode & 0o777 == 0o660
        assert not path.exists()

    async def test_users_that_are_not_named_are_refused(self, tmp_path):
        url = f"unix:{tmp_path / 'x.sock'}"
        async with served(f"{url}?uid={os.geteuid() + 1}", Echo()), FakeBackend() as vm:
            with pytest.raises(BackendError, match=f"user {os.geteuid()} may not"):
                await Agent(vm, url).run()

    async def test_a_socket_that_a_server_left_behind_is_no_obstacle(self, tmp_path):
        path = tmp_path / "x.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        async with served(f"unix:{path}", Echo()), FakeAgent.connected(f"unix:{path}") as agent:
            assert (await agent.hello()).version == 1

    async def test_the_session_of_another_peer_cannot_be_taken(self, made):
        url = f"tls:127.0.0.1:0?{made.of('localhost')}"
        async with served(url, Echo(), limits=LIMITS) as server:
            port = server.ports[0]
            session = os.urandom(16)

            def enter(name):
                where = f"tls:127.0.0.1:{port}?{made.of(name)}&name=localhost"
                return dial(parse_url(where), session, "vm", FakeBackend())

            async with enter("one.example"):
                await is_refused(enter("two.example"), RefusedByServerError, match="another peer")
