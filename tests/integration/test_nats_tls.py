"""NATS over TLS, and what not a NATS server: nothing is said to it."""

import anyio
import anyio.abc
import pytest
from nats_parts import ON_ASYNCIO, PASSWORDS, Guest, Work, fail, nats_server
from remote_parts import Certificates, carry, served

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import BackendError
from vmibridge.transport import AgentServer

pytestmark = ON_ASYNCIO


class TestTls:
    @pytest.fixture
    def made(self, tmp_path):
        return Certificates(tmp_path)

    def config(self, made, *more):
        cert, key, ca = (each.partition("=")[2] for each in made.of("127.0.0.1").split("&"))
        options = (f'cert_file: "{cert}"', f'key_file: "{key}"', f'ca_file: "{ca}"', *more)
        return "tls {\n" + "\n".join(options) + "\n}"

    async def test_it_proves_both_ends(self, tmp_path, made):
        outcomes = []

        async def on_outcome(outcome):
            outcomes.append(outcome.kind)

        with nats_server(tmp_path, self.config(made, "verify: true")) as nats:
            url = nats.url.replace("nats:", "tls:")
            async with served(f"{url}?{made.of('host.example')}", Work(), on_outcome=on_outcome):
                agent, _ = await carry(Guest(1, 3), f"{url}?{made.of('agent.example')}")
        assert agent.counts.answered == 3
        assert outcomes == [OutcomeKind.HANDLED] * 3

    async def test_with_credentials_inside_it_needs_no_certificate_of_ours(self, tmp_path, made):
        with nats_server(tmp_path, self.config(made) + PASSWORDS) as nats:
            async with served(f"{nats.url}?user=host&password=s3cret-h&ca={made.ca}", Work()):
                agent, _ = await carry(
                    Guest(1, 3), f"{nats.url}?user=web&password=s3cret-w&ca={made.ca}"
                )
        assert agent.counts.answered == 3

    async def test_a_certificate_of_another_authority_does_not_do(self, tmp_path, made):
        other = tmp_path / "other"
        other.mkdir()
        with nats_server(tmp_path, self.config(made)) as nats:
            for options in ("", f"?ca={Certificates(other).ca}"):
                for said in await fail(nats.url + options):
                    assert "TLS: the certificate is not accepted: " in said

    async def test_nor_does_one_of_another_name(self, tmp_path, made):
        with nats_server(tmp_path, self.config(made)) as nats:
            url = nats.url.replace("127.0.0.1", "localhost")
            for said in await fail(f"{url}?ca={made.ca}"):
                assert "mismatch" in said

    async def test_without_a_certificate_that_nats_asks_for_nobody_is_in(self, tmp_path, made):
        with (
            nats_server(tmp_path, self.config(made, "verify: true")) as nats,
            pytest.raises(BackendError, match=r"certificate required|closed the connection"),
        ):
            await AgentServer([f"{nats.url}?ca={made.ca}"], lambda _: Work()).run()

    @pytest.mark.parametrize("url", ["tls://HOST?", "nats://HOST?ca=CA&"])
    async def test_where_it_is_wanted_nothing_is_said_without_it(self, made, url):
        """As from one who is in between, and asks for no TLS."""
        heard = bytearray()

        async def pretend(stream):
            async with stream:
                await stream.send(b'INFO {"max_payload":1048576,"auth_required":true}\r\n')
                try:
                    while True:
                        heard.extend(await stream.receive())
                except anyio.EndOfStream:
                    pass

        listening = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listening, anyio.create_task_group() as tasks:
            tasks.start_soon(listening.serve, pretend)
            host = f"127.0.0.1:{listening.extra(anyio.abc.SocketAttribute.local_port)}"
            url = url.replace("HOST", host).replace("CA", str(made.ca))
            for said in await fail(f"{url}user=web&password=s3cret-w"):
                assert said.endswith(
                    "NATS does not ask for TLS there, and without it nothing is said"
                )
            tasks.cancel_scope.cancel()
        assert not heard


class TestNoNats:
    async def test_that_nobody_listens_is_an_error_for_a_server(self, tmp_path):
        with nats_server(tmp_path) as nats:
            pass
        with pytest.raises(BackendError, match=r"127\.0\.0\.1:\d+: Connect"):
            await AgentServer([nats.url], lambda _: Work()).run()

    @pytest.mark.parametrize(
        ("greeting", "says"),
        [
            (b"INFO {\r\n", "not a NATS server"),
            (b"HTTP/1.1 400 Bad Request\r\n", "not a NATS server"),
            (b'INFO {"max_payload":1048576}\r\n', "closed the connection"),
            (b"INFO {}\r\n-ERR 'maximum connections exceeded'\r\n", "maximum connections exceeded"),
        ],
    )
    async def test_somebody_else_who_does_is_one_too(self, greeting, says):
        async def hang_up(stream):
            async with stream:
                await stream.send(greeting)
                if b"INFO" in greeting:
                    await stream.receive()

        listening = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listening, anyio.create_task_group() as tasks:
            tasks.start_soon(listening.serve, hang_up)
            port = listening.extra(anyio.abc.SocketAttribute.local_port)
            with pytest.raises(BackendError, match=says):
                await AgentServer([f"nats://127.0.0.1:{port}"], lambda _: Work()).run()
            tasks.cancel_scope.cancel()

    async def test_one_who_never_speaks_is_given_up(self, monkeypatch):
        monkeypatch.setattr("vmibridge.transport.nats.client._CONNECT", 0.2)
        listening = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listening:
            port = listening.extra(anyio.abc.SocketAttribute.local_port)
            with pytest.raises(BackendError, match="NATS does not answer"):
                await AgentServer([f"nats://127.0.0.1:{port}"], lambda _: Work()).run()
