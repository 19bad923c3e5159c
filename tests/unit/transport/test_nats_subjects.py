"""The subjects, the messages and the book-keeping of the transport on NATS, without any NATS."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge import BridgePacket
from vmibridge.errors import WireError
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.nats.accesses import PeerAccesses
from vmibridge.transport.nats.attempts import Peer, Sent, SentTraps
from vmibridge.transport.nats.message import (
    FROM_NATS_AGENT,
    FROM_NATS_SERVER,
    Ask,
    Messages,
    Taken,
    hello_in,
    pack,
    parts_of,
)
from vmibridge.transport.nats.subjects import (
    may_be_answered,
    partition_of,
    to_all_subject,
    token_in,
    trap_subject,
    vm_token,
)
from vmibridge.transport.urls.nats import is_pattern, is_subject
from vmibridge.transport.wire import Cancel, Hello, Memory, Native, Read, Trap, Write

NAMES = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=64)
HELLO = Hello(WORD, VERSION, VERSION, b"s" * 16, "web")


class TestTokens:
    @pytest.mark.parametrize(
        ("vm", "token"),
        [
            ("web", "web"),
            ("Web_2-a", "Web_2-a"),
            ("db.example", "db=2eexample"),
            ("a b", "a=20b"),
            ("*", "=2a"),
            (">", "=3e"),
            ("a=2e", "a=3d2e"),
            ("ü", "=c3=bc"),
        ],
    )
    def test_the_name_of_a_vm_is_made_safe(self, vm, token):
        assert vm_token(vm) == token

    @given(NAMES)
    def test_a_token_is_one_and_may_be_published_to(self, vm):
        token = vm_token(vm)
        assert "." not in token
        assert is_subject(trap_subject(token, None))
        assert len(token) <= 3 * len(vm.encode())

    @given(NAMES, NAMES)
    def test_no_two_names_share_a_token(self, one, other):
        assert (vm_token(one) == vm_token(other)) == (one == other)


class TestSubjects:
    def test_magic_and_request_have_a_fixed_width(self):
        assert trap_subject("web", BridgePacket(0x42, 7, 1)) == "vmibridge.web.00000042.0007"
        assert trap_subject("web", None) == "vmibridge.web.00000000.0000"

    def test_a_pinned_one_has_its_partition_before_it(self):
        packet = BridgePacket(0x42494D56, 0x100, 1)
        number = partition_of("web", 7)
        assert trap_subject("web", packet, 7) == f"vmibridge-pinned.{number}.web.42494d56.0100"

    # From the reference vectors of FNV-1a, 32 bits (Fowler, Noll, Vo).
    @pytest.mark.parametrize(
        ("text", "value"), [("", 0x811C9DC5), ("a", 0xE40C292C), ("foobar", 0xBF9CF968)]
    )
    def test_a_partition_is_fnv_1a_modulo_their_number(self, text, value):
        assert partition_of(text, 1 << 32) == value
        assert partition_of(text, 5) == value % 5

    @pytest.mark.parametrize(
        ("subject", "token"),
        [
            ("vmibridge.web.42494d56.0100", "web"),
            ("vmibridge-pinned.3.web.42494d56.0100", "web"),
            ("vmibridge.hello.web", "web"),
            ("vmibridge-pinned.3.hello.web", "web"),
            ("mine.web.42494d56.0100", "web"),
            ("vmibridge.web.1.2", None),
            ("vmibridge", None),
        ],
    )
    def test_the_vm_is_read_from_the_end_of_a_subject(self, subject, token):
        assert token_in(subject) == token

    def test_what_all_servers_hear_is_no_trap(self):
        assert to_all_subject("web", b"\1" * 16) == f"vmibridge.web.agent.all.{'01' * 16}"
        assert len(to_all_subject("web", b"\1" * 16).split(".")) == 5

    @pytest.mark.parametrize("text", ["", "a..b", ".a", "a.", "a b", "a.*", ">", "a\r\nPUB"])
    def test_what_is_no_subject(self, text):
        assert not is_subject(text)

    @pytest.mark.parametrize("text", ["a.*.>", "a", "*.b", "vmibridge-pinned.3.>"])
    def test_what_one_may_subscribe_to(self, text):
        assert is_pattern(text)

    @pytest.mark.parametrize("text", ["", ">", "a.>.b", "a b", "a.**"])
    def test_what_one_may_not(self, text):
        assert not is_pattern(text)

    @pytest.mark.parametrize(
        ("reply", "may"),
        [("_INBOX.x.1", True), ("", False), ("vmibridge.hello.web", False), ("$SYS.x", False)],
    )
    def test_strangers_cannot_have_a_server_talk_to_servers(self, reply, may):
        assert may_be_answered(reply) == may


class TestMessages:
    def test_frames_come_out_as_they_went_in(self):
        frames = [Taken(7), Native(7)]
        assert Messages(FROM_NATS_SERVER).frames(pack(*frames)) == frames

    def test_the_hello_is_in_front(self):
        start, rest = hello_in(pack(HELLO, Ask(3, 1)))
        reader = Messages(FROM_NATS_AGENT)
        assert reader.frames(start) == [HELLO]
        assert reader.frames(rest) == [Ask(3, 1)]

    @pytest.mark.parametrize("data", [b"", b"\0\0", b"\xff" * 40, b"\5\0\0\0abc"])
    def test_where_there_is_none(self, data):
        with pytest.raises(WireError, match="no HELLO"):
            hello_in(data)

    @given(st.binary(max_size=200), st.integers(13, 40))
    def test_a_large_one_goes_in_parts_and_comes_whole(self, data, most):
        frames = [Cancel(len(data))] * (1 + len(data) // 4)
        message = pack(*frames)
        reader = Messages(FROM_NATS_AGENT)
        parts = list(parts_of(message, most))
        assert all(len(part) <= most for part in parts)
        assert [frame for part in parts for frame in reader.frames(part)] == frames

    def test_of_one_whose_part_is_lost_nothing_comes_and_the_next_one_does(self):
        reader = Messages(FROM_NATS_AGENT)
        frames = [Cancel(1)] * 30
        parts = list(parts_of(pack(*frames), 40))
        assert len(parts) > 3
        for part in parts[:1] + parts[2:] + parts[1:]:
            assert reader.frames(part) == []
        found = [frame for part in parts_of(pack(*frames), 40) for frame in reader.frames(part)]
        assert found == frames

    def test_more_than_a_frame_may_have_is_refused_before_it_is_kept(self):
        reader = Messages(FROM_NATS_AGENT, limit=100)
        with pytest.raises(WireError, match="parts"):
            for part in parts_of(bytes(1000), 60):
                reader.frames(part)

    def test_a_nats_that_takes_next_to_nothing_is_said(self):
        with pytest.raises(ValueError, match="takes messages of 12 bytes"):
            list(parts_of(bytes(100), 12))

    @pytest.mark.parametrize(
        "data", [b"\1", b"\1\0\0\0\xc1", b"\x09\0\0\0\1", pack(Cancel(1))[:-1]]
    )
    def test_what_is_no_frame(self, data):
        with pytest.raises(WireError):
            Messages(FROM_NATS_AGENT).frames(data)

    @given(st.binary(max_size=60))
    def test_nothing_else_than_a_wire_error_comes_of_garbage(self, data):
        with contextlib.suppress(WireError):
            Messages(FROM_NATS_AGENT).frames(data)


def trap(seq, vcpu=0):
    return Trap(seq, 5000, False, 2, vcpu, 0x1000, 3, 64, 0, bytes(176))


def sent(seq, vcpu=0):
    return Sent(trap(seq, vcpu), 100.0, "vmibridge.web.42494d56.0100", None)


class TestWhoHasATrap:
    """At a clock of the test's own; silence is 6 seconds, so they are asked about each second."""

    @pytest.fixture
    def traps(self):
        return SentTraps(6.0)

    def begun(self, traps, seq=1, vcpu=0, now=100.0):
        made = sent(seq, vcpu)
        traps.add(made)
        traps.begin(made, now)
        return made

    def test_the_first_that_speaks_of_it_has_it(self, traps):
        made = self.begun(traps)
        one, other = Peer(1, "a.1", 0), Peer(2, "a.2", 0)
        assert traps.held_by(made, one, 100)
        assert not traps.held_by(made, other, 100)
        assert traps.held_by(made, one, 101)

    def test_one_of_a_vcpu_takes_the_place_of_the_last(self, traps):
        self.begun(traps, 1)
        later = self.begun(traps, 2)
        assert list(traps) == [later]
        assert traps.get(1) is None
        assert traps.get(2) is later

    def test_an_attempt_that_was_given_up_is_known_by_its_number(self, traps):
        made = self.begun(traps)
        first = made.attempt
        assert traps.get(1, first) is made
        traps.send_later(made, 100)
        assert traps.get(1, first) is None
        traps.begin(made, 101)
        assert traps.get(1, first) is None
        assert traps.get(1, made.attempt) is made

    def test_one_that_no_server_has_is_sent_again_after_a_pause_and_is_not_marked(self, traps):
        made = self.begun(traps)
        traps.send_later(made, 100)
        assert traps.to_send(100.0) == []
        assert traps.to_send(101.0) == [made]
        assert not made.elsewhere
        assert not traps.held_by(made, Peer(1, "a.1", 0), 101)

    def test_the_pause_grows_to_half_a_second(self, traps):
        made = self.begun(traps)
        for _ in range(20):
            traps.send_later(made, 100)
        assert 100.25 <= made.waits_until <= 100.5

    def test_one_of_which_nothing_is_heard_is_asked_about(self, traps):
        made = self.begun(traps)
        assert traps.to_ask(100.5) == []
        assert traps.to_ask(101.0) == [made]
        assert traps.to_ask(101.5) == []

    def test_after_the_silence_it_is_given_up_and_marked(self, traps):
        made = self.begun(traps)
        traps.held_by(made, Peer(1, "a.1", 0), 103)
        assert traps.to_give_up(108.9) == []
        assert traps.to_give_up(109) == [made]
        assert made.elsewhere

    def test_a_server_that_nats_says_twice_is_gone_is(self, traps):
        made = self.begun(traps)
        peer = Peer(1, "a.1", 0)
        traps.held_by(made, peer, 100)
        peer.misses = 1
        assert traps.to_give_up(100.1) == []
        peer.misses = 2
        assert traps.to_give_up(100.1) == [made]

    def test_but_not_just_after_nats_itself_was_away(self, traps):
        made = self.begun(traps)
        peer = Peer(1, "a.1", 0)
        traps.held_by(made, peer, 100)
        traps.on_connected(105)
        traps.held_by(made, peer, 105)
        peer.misses = 2
        assert traps.to_give_up(110) == []
        assert traps.to_give_up(111) == [made]

    def test_a_server_that_speaks_is_there(self):
        peer = Peer(1, "a.1", 0)
        peer.misses = 5
        peer.speaks(7)
        assert (peer.heard, peer.misses) == (7, 0)


class TestAccesses:
    def test_those_of_two_servers_are_told_apart_and_replies_find_their_way(self):
        accesses = PeerAccesses()
        one, other = Peer(1, "a.1", 0), Peer(2, "a.2", 0)
        first = accesses.take(Read(1, 7, 0x1000, 8), one)
        second = accesses.take(Read(1, 8, 0x2000, 8), other)
        assert first.access != second.access
        assert accesses.reply(Memory(second.access, b"2")) == (other, Memory(1, b"2"))
        assert accesses.reply(Memory(first.access, b"1")) == (one, Memory(1, b"1"))
        assert accesses.reply(Memory(first.access, b"1")) is None
        assert (one.under_way, other.under_way) == (0, 0)

    def test_one_that_is_asked_for_again_is_done_once(self):
        accesses = PeerAccesses()
        peer = Peer(1, "a.1", 0)
        assert accesses.take(Write(5, 7, 0, b"x"), peer) is not None
        assert accesses.take(Write(5, 7, 0, b"x"), peer) is None
        assert peer.under_way == 1

    def test_more_than_one_server_may_have_wait_for_their_turn(self):
        accesses = PeerAccesses()
        peers = [Peer(number, f"a.{number}", 0) for number in (1, 2)]
        passed = [
            frame
            for peer in peers
            for number in range(200)
            if (frame := accesses.take(Read(number, 7, 0, 8), peer)) is not None
        ]
        assert len(passed) == 258
        for done, frame in enumerate(passed, 1):
            accesses.reply(Memory(frame.access))
            following = accesses.following()
            if following is not None:
                passed.append(following)
            assert done <= 400
        assert len(passed) == 400
        assert accesses.following() is None

    def test_a_server_that_asks_for_more_than_it_may_is_refused(self):
        accesses = PeerAccesses()
        peer = Peer(1, "a.1", 0)
        with pytest.raises(WireError, match="more accesses"):
            for number in range(1000):
                accesses.take(Read(number, 7, 0, 8), peer)
        assert peer.under_way == 516
