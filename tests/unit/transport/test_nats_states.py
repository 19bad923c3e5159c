"""What an agent on NATS keeps of servers and traps, over a clock of the test's own."""

import ssl

import pytest
from nats.aio.client import Client
from nats.errors import AuthorizationError, Error

from vmibridge.errors import NatsRefusedError
from vmibridge.transport.nats import peers as nats_peers
from vmibridge.transport.nats.login import denied_by, is_refusal, reason
from vmibridge.transport.nats.patched import NatsPyClient
from vmibridge.transport.nats.peers import Peers, Waiting


def test_a_nats_py_that_cannot_be_held_to_tls_is_refused(monkeypatch):
    monkeypatch.delattr(Client, "_connect_command")
    NatsPyClient(tls=False)
    with pytest.raises(NatsRefusedError, match="cannot be held to TLS"):
        NatsPyClient(tls=True)


class TestPeers:
    def test_one_is_known_by_where_it_listens_and_by_its_number(self):
        peers = Peers(silence=3)
        web = peers.speaking("inbox.web", 0)
        assert peers.speaking("inbox.web", 1) is web
        assert peers.speaking("inbox.db", 1) is not web
        assert peers.numbered(web.number) is web
        assert peers.numbered(77) is None

    def test_one_that_does_not_say_where_it_listens_is_none(self):
        assert Peers(silence=3).speaking("", 0) is None

    def test_there_are_no_more_than_so_many(self, monkeypatch):
        monkeypatch.setattr(nats_peers, "MAX_PEERS", 2)
        peers = Peers(silence=3)
        assert [peers.speaking(f"inbox.{n}", 0) is None for n in range(4)] == [
            False, False, True, True,
        ]  # fmt: skip
        assert peers.speaking("inbox.0", 0) is not None

    def test_those_that_are_heard_take_turns(self):
        peers = Peers(silence=3)
        one, two, silent, gone = (peers.speaking(f"inbox.{n}", 10) for n in range(4))
        silent.heard = 1
        gone.misses = 1
        assert {peers.heard_of(11) for _ in range(2)} == {one, two}
        assert peers.heard_of(20) is None

    def test_those_that_are_gone_are_forgotten_unless_they_have_something_of_ours(self):
        peers = Peers(silence=3)
        there, silent, gone, holder, reads = (peers.speaking(f"inbox.{n}", 0) for n in range(5))
        there.speaks(90)
        gone.speaks(90)
        gone.misses = 1
        reads.under_way = 1
        assert peers.forget_silent(100, 60, {holder, None}) == [silent, gone]
        assert list(peers) == [there, holder, reads]
        assert peers.numbered(gone.number) is None
        # One that speaks after all is another one.
        assert peers.speaking("inbox.2", 100) is not gone

    def test_a_name_fits_a_terminal(self):
        assert Peers(silence=3).speaking("inbox.\x1b[31m", 0).name == r"\x1b[31m"


class TestWaiting:
    def test_what_was_told_to_wait_is_kept_until_it_is_done_or_its_server_gone(self):
        web, db = (Peers(silence=3).speaking(name, 0) for name in ("inbox.web", "inbox.db"))
        waiting = Waiting()
        for key, peer in (("a", web), ("b", db), ("c", db), ("d", web)):
            waiting.add(key, peer)
        waiting.drop("a")
        waiting.drop("never")
        waiting.drop_peer(db)
        assert [waiting.get(key) for key in "abcd"] == [None, None, None, web]

    def test_the_oldest_are_forgotten(self, monkeypatch):
        monkeypatch.setattr(nats_peers, "_MAX_WAITING", 2)
        web = Peers(silence=3).speaking("inbox.web", 0)
        waiting = Waiting()
        for key in "abc":
            waiting.add(key, web)
        assert [waiting.get(key) for key in "abc"] == [None, web, web]


class TestReasons:
    @pytest.mark.parametrize(
        ("error", "refusal", "says"),
        [
            (AuthorizationError(), True, "NATS refuses us: wrong credentials, or none"),
            (Error("nats: 'authorization violation'"), True, "NATS refuses us: wrong cred"),
            (Error("nats: user authentication expired"), True, r"or none \(expired\)"),
            (ssl.SSLError(1, "x"), False, "TLS: no TLS there"),
            (ConnectionRefusedError(111, "Connection refused"), False, "Connection refused"),
            (ConnectionResetError(), False, "NATS has closed the connection"),
            (BrokenPipeError(32, "Broken pipe"), False, "NATS has closed the connection"),
            (
                Error("nats: 'maximum \x1b connections'"),
                False,
                r"NATS: 'maximum \\x1b connections'",
            ),
            (Error("nats: s3cret"), False, "NATS: Error"),
            (KeyError("s3cret"), False, "NATS: KeyError"),
        ],
    )
    def test_each_is_said_in_words_that_hold_no_secret(self, error, refusal, says):
        assert is_refusal(error) is refusal
        with pytest.raises((OSError, NatsRefusedError), match=says) as raised:
            raise reason(error)
        assert isinstance(raised.value, NatsRefusedError) == (
            refusal or isinstance(error, ssl.SSLError)
        )
        assert "s3cret" not in str(raised.value)

    def test_what_is_denied_is_told_as_nats_says_it(self):
        error = Error('nats: permissions violation for publish to "a.\x1bb"')
        assert denied_by(error) == r'NATS does not permit publish to "a.\x1bb"'
        assert denied_by(Error("nats: else")) is None
