"""The frames between agents and servers, as bytes: no sockets here."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.bridge.contract import GuestRead
from vmibridge.errors import WireError
from vmibridge.transport import AgentLimits
from vmibridge.transport.wire import (
    FROM_AGENT,
    FROM_SERVER,
    NO_DEADLINE,
    Answer,
    Cancel,
    End,
    Ended,
    FrameReader,
    Hello,
    Memory,
    Native,
    Ping,
    Pong,
    Read,
    Refused,
    Returned,
    Trap,
    Welcome,
    WireEnd,
    WireRead,
    Write,
    answer_frame,
    encode,
    guest_read,
    milliseconds,
    register_writes,
    trap_event,
    trap_filter,
    trap_frame,
    wire_read,
)
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapReason

ID = bytes(range(16))
HELLO = Hello("vmibridge", 1, 1, ID, "web", 0, True)
WELCOME = Welcome(
    1, ID, 0, (0x1234,), True, False, 5000, (None, 1, None, 2**64 - 1), 64,
    (WireRead(0x1234, 1, None, (1, 64, 0)),),
)  # fmt: skip
FROM_THE_AGENT = [
    HELLO,
    Trap(7, 5000, True, 2, 3, 0x1000, 3, 64, 0, bytes(176), ((0x5000, b"abc"),)),
    Memory(3, b"abc"),
    Memory(3, error="the VM has no memory there"),
    Ping(),
    End((WireEnd(0, "halted", "", {"rax": 2**64 - 1}),)),
    Cancel(7),
]
FROM_THE_SERVER = [
    WELCOME,
    Refused("no", False),
    Answer(7, 0x1003, 1, None, 2**64 - 1, 0),
    Native(7),
    Returned(7),
    Read(1, 7, 0x5000, 16),
    Write(2, 7, 2**64 - 1, b"abc"),
    Pong(),
    Ended(),
]
U64 = st.integers(0, 2**64 - 1)
EVENTS = st.builds(
    TrapEvent,
    seq=st.integers(1, 2**64 - 1),
    reason=st.sampled_from(TrapReason),
    registers=st.builds(Registers, **dict.fromkeys(Registers.__struct_fields__, U64)),
    flags_known=st.booleans(),
    vm=st.just("web"),
    vcpu=st.integers(0, 0xFFFF),
    ip=U64,
    length=st.integers(0, 15),
    width=st.sampled_from([16, 32, 64]),
    ring=st.integers(0, 3),
)


def names(frames):
    return [f"{type(frame).__name__}-{number}" for number, frame in enumerate(frames)]


def body(*elements):
    return msgspec.msgpack.encode(elements)


def framed(data):
    return len(data).to_bytes(4, "little") + data


class TestFrames:
    @pytest.mark.parametrize("frame", FROM_THE_AGENT, ids=names(FROM_THE_AGENT))
    def test_a_frame_of_an_agent_comes_out_as_it_went_in(self, frame):
        assert FrameReader(FROM_AGENT).feed(encode(frame)) == [frame]

    @pytest.mark.parametrize("frame", FROM_THE_SERVER, ids=names(FROM_THE_SERVER))
    def test_a_frame_of_a_server_comes_out_as_it_went_in(self, frame):
        assert FrameReader(FROM_SERVER).feed(encode(frame)) == [frame]

    @given(st.lists(st.sampled_from(FROM_THE_AGENT)), st.data())
    def test_how_the_bytes_are_cut_makes_no_difference(self, frames, data):
        stream = b"".join(map(encode, frames))
        reader, found = FrameReader(FROM_AGENT), []
        while stream:
            count = data.draw(st.integers(1, len(stream)))
            found += reader.feed(stream[:count])
            stream = stream[count:]
        assert found == frames

    def test_the_bytes_are_those_of_the_manual(self):
        assert encode(Native(7)) == b"\3\0\0\0" + b"\x92\x13\x07"
        assert encode(Answer(7, 0x1003, 1)) == b"\n\0\0\0\x97\x12\x07\xcd\x10\x03\x01\xc0\xc0\xc0"

    def test_elements_of_a_later_version_are_skipped(self):
        later = framed(body(19, 7, "something", {"new": 1}))
        assert FrameReader(FROM_SERVER).feed(later) == [Native(7)]


class TestWhatIsNoFrame:
    @pytest.mark.parametrize("frame", FROM_THE_SERVER, ids=names(FROM_THE_SERVER))
    def test_an_agent_does_not_send_what_servers_send(self, frame):
        with pytest.raises(WireError):
            FrameReader(FROM_AGENT).feed(encode(frame))

    @pytest.mark.parametrize(
        "data",
        [
            framed(b""),
            framed(b"\xc1"),
            framed(body(99)),
            framed(body(4) + b"\0"),
            framed(msgspec.msgpack.encode({"type": 4})),
            framed(body(6, -1)),
            framed(body(6, "7")),
            framed(body(6, 1.5)),
            framed(body(6)),
            framed(body(2, 7, 1 << 40, *[0] * 9)),
            framed(body(1, "vmibridge", 1, 1, b"short", "web")),
            framed(body(1, "vmibridge", 1, 1, ID, "x" * 65)),
            framed(body(1, "vmibridge", 1, 1, ID, "")),
            framed(body(2, 7, 1, False, 2, 0, 0, 3, 64, 0, bytes(177))),
            framed(b"\x91" * 5000),
        ],
    )
    def test_it_is_an_error(self, data):
        with pytest.raises(WireError):
            FrameReader(FROM_AGENT).feed(data)

    def test_a_size_beyond_the_limit_is_an_error_before_anything_is_kept(self):
        reader = FrameReader(FROM_AGENT, limit=100)
        with pytest.raises(WireError, match="101 bytes, where 100 are the most"):
            reader.feed((101).to_bytes(4, "little"))
        with pytest.raises(WireError):
            FrameReader(FROM_AGENT).feed(b"GET / HTTP/1.1\r\n")

    def test_a_limit_holds_for_a_size_that_comes_in_pieces_too(self):
        reader = FrameReader(FROM_AGENT, limit=100)
        assert reader.feed(b"\xff\xff") == []
        with pytest.raises(WireError):
            reader.feed(b"\0\0")


class TestTraps:
    @given(EVENTS)
    def test_a_trap_comes_out_as_it_went_in(self, event):
        (frame,) = FrameReader(FROM_AGENT).feed(encode(trap_frame(event, 5000)))
        assert trap_event(frame, "web") == event
        assert type(trap_event(frame, "web").registers) is Registers

    @pytest.mark.parametrize(
        ("field", "value"),
        [("reason", 0), ("reason", 8), ("width", 8), ("ring", 4), ("length", 16), ("seq", 0)],
    )
    def test_one_that_no_machine_has_is_an_error(self, field, value):
        frame = trap_frame(TrapEvent(1, TrapReason.CPUID, Registers()), 5000)
        with pytest.raises(WireError):
            trap_event(msgspec.structs.replace(frame, **{field: value}), "web")

    def test_registers_that_no_machine_has_are_not_sent(self):
        with pytest.raises(ValueError, match="64 bits"):
            trap_frame(TrapEvent(1, TrapReason.CPUID, Registers(rax=1 << 64)), 5000)

    @given(st.none() | st.builds(RegisterWrites, U64, *[st.none() | U64] * 4))
    def test_an_answer_comes_out_as_it_went_in(self, writes):
        (frame,) = FrameReader(FROM_SERVER).feed(encode(answer_frame(7, writes)))
        assert frame.seq == 7
        assert (None if isinstance(frame, Native) else register_writes(frame)) == writes

    @pytest.mark.parametrize(
        ("seconds", "expected"),
        [(0.0015, 1), (5, 5000), (-1, 0), (float("inf"), NO_DEADLINE), (1e9, NO_DEADLINE)],
    )
    def test_times_are_whole_milliseconds_of_32_bits(self, seconds, expected):
        assert milliseconds(seconds) == expected

    def test_a_welcome_says_which_traps_are_wanted(self):
        wanted = trap_filter(WELCOME)
        assert wanted.magics == {0x1234}
        assert wanted.any_hypercall
        assert not wanted.any_cpuid


class TestDeclaredReads:
    @pytest.mark.parametrize(
        "read", [GuestRead(1, 64), GuestRead(4, 65536, size_in=2, method=0xFFFF)]
    )
    def test_one_comes_out_as_it_went_in(self, read):
        assert guest_read(wire_read(0x1234, 1, read)) == read

    def test_a_server_that_sends_nonsense_is_told_so(self):
        with pytest.raises(WireError):
            guest_read(WireRead(None, 1, None, (5, 64, 0)))

    @pytest.mark.parametrize(
        "fields",
        [
            {"address": 0}, {"address": 5}, {"size": 0}, {"size": 65537}, {"size_in": 0},
            {"method": 1 << 16},
        ],
    )  # fmt: skip
    def test_what_makes_no_sense_is_a_value_error(self, fields):
        with pytest.raises(ValueError):
            GuestRead(**{"address": 1, "size": 64, **fields})


@pytest.mark.parametrize("name", AgentLimits.__struct_fields__)
def test_a_limit_is_a_positive_number(name):
    with pytest.raises(ValueError, match=name):
        AgentLimits(**{name: 0})


def test_vcpus_have_16_bits():
    with pytest.raises(ValueError, match="65535"):
        AgentLimits(vcpus=65536)
