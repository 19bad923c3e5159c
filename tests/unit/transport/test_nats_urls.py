"""`nats://` URLs, and what is said before any NATS is asked."""

import builtins

import anyio
import pytest

from vmibridge.errors import BackendError, BackendSpecError, MissingExtraError
from vmibridge.testing import FakeBackend
from vmibridge.transport import Agent, AgentServer, RemoteBackend
from vmibridge.transport.urls import parse_url
from vmibridge.transport.urls.nats import NatsUrl


class TestUrls:
    @pytest.mark.parametrize(
        ("text", "hosts"),
        [
            ("nats://nats.example", ("nats.example:4222",)),
            ("nats://nats.example/", ("nats.example:4222",)),
            ("nats://a:1,b:2", ("a:1", "b:2")),
            ("nats://[::1]:4223", ("[::1]:4223",)),
            ("nats://[::1]", ("[::1]:4222",)),
        ],
    )
    def test_hosts(self, text, hosts):
        url = parse_url(text)
        assert isinstance(url, NatsUrl)
        assert url.hosts == hosts
        assert url.subjects == ("vmibridge.*.*.*",)
        assert not url.tls

    def test_tls_with_two_slashes_is_nats_and_without_is_not(self):
        assert parse_url("tls://a:1").tls
        assert not isinstance(parse_url("tls:a:1?cert=c&key=k&ca=a"), NatsUrl)

    def test_where_a_server_listens(self):
        url = parse_url("nats://a?partition=0,3&subject=mine.>")
        assert url.subjects == ("mine.>", "vmibridge-pinned.0.>", "vmibridge-pinned.3.>")
        assert parse_url("nats://a?partitions=8").partitions == 8

    def test_secrets_come_from_files_too(self, tmp_path):
        (tmp_path / "secret").write_text("s3cret\n")
        url = parse_url(f"nats://a?user=web&password-file={tmp_path / 'secret'}")
        assert (url.user, url.password) == ("web", "s3cret")
        assert parse_url(f"nats://a?token-file={tmp_path / 'secret'}").token == "s3cret"

    def test_no_secret_is_shown(self):
        url = parse_url("nats://a?user=web&password=s3cret")
        assert "s3cret" not in f"{url} {url!r}"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("nats:a:4222", "a URL of NATS is nats://HOST:PORT"),
            ("nats://", "HOST:PORT is missing"),
            ("nats://a,", "HOST:PORT is missing"),
            ("nats://::1", "HOST:PORT is missing"),
            ("nats://a:0", "a port is a number"),
            ("nats://a:x", "a port is a number"),
            ("nats://web:s3cret@a", "are options"),
            ("nats://a?pasword=s3cret", "no option 'pasword'"),
            ("nats://a?s3cret", "OPTION=VALUE"),
            ("nats://a?token=s3cret&token=s3cret", "token is given twice"),
            ("nats://a?token=s3cret&token-file=x", "there|do not go|No such"),
            ("nats://a?token-file=nowhere", "No such file"),
            ("nats://a?credentials=nowhere", "there is no such file"),
            ("nats://a?nkey=nowhere", "there is no such file"),
            ("nats://a?partitions=x", "partitions is a number"),
            ("nats://a?partition=-1", "partition is a number"),
            ("nats://a?subject=a..b", "is not a subject"),
            ("nats://a?inbox=a.>", "inbox is the beginning"),
            ("nats://a?inbox=vmibridge", "inbox is the beginning"),
            ("nats://a?silence=0", "silence is 0.05 to 3600"),
            ("nats://a?silence=x", "silence is 0.05 to 3600"),
        ],
    )
    def test_a_wrong_one_says_what_is_wrong_and_no_secret(self, text, says):
        with pytest.raises(BackendSpecError, match=says) as raised:
            parse_url(text)
        assert "s3cret" not in str(raised.value)

    def test_certificate_and_key_go_together(self, tmp_path):
        (tmp_path / "cert").touch()
        with pytest.raises(BackendSpecError, match="cert and key go together"):
            parse_url(f"tls://a?cert={tmp_path / 'cert'}")

    def test_a_file_that_is_no_text_holds_no_secret(self, tmp_path):
        (tmp_path / "secret").write_bytes(b"\xff\xfe")
        with pytest.raises(BackendSpecError, match="is not text"):
            parse_url(f"nats://a?token-file={tmp_path / 'secret'}")

    def test_without_nats_py_the_extra_is_named(self, monkeypatch):
        real = builtins.__import__

        def fake(name, *rest):
            if name == "nats":
                raise ModuleNotFoundError(name=name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", fake)
        with pytest.raises(MissingExtraError, match="the extra 'nats'"):
            parse_url("nats://a")


class TestOnTrio:
    """nats-py is for asyncio."""

    URL = "nats://127.0.0.1:1"

    async def agent(self):
        async with FakeBackend() as backend:
            await Agent(backend, self.URL).run()

    async def server(self):
        await AgentServer([self.URL], lambda _: None).run()

    async def backend(self):
        async with RemoteBackend(self.URL):
            pass

    @pytest.mark.parametrize("end", ["agent", "server", "backend"])
    def test_each_end_says_so_in_one_error(self, end):
        with pytest.raises(BackendError, match="nats-py is for asyncio"):
            anyio.run(getattr(self, end), backend="trio")
