"""Packets of GDB's remote protocol, byte by byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.backends.qemu.gdb.packets import (
    Mark,
    Notification,
    PacketError,
    PacketReader,
    checksum,
    encode,
    unpack,
)


def read_all(*pieces, most=1 << 20):
    reader, found = PacketReader(most), []
    for piece in pieces:
        reader.feed(piece)
        while (packet := reader.next()) is not None:
            found.append(packet)
    return found


@pytest.mark.parametrize(
    ("data", "packet"),
    [
        (b"", b"$#00"),
        (b"OK", b"$OK#9a"),
        (b"m401136,10", b"$m401136,10#29"),
        (b"a$b#c}d*e", b"$a}\x04b}\x03c}\x5dd}\x0ae#51"),
    ],
)
def test_data_and_the_packet_that_carries_it(data, packet):
    assert encode(data) == packet
    assert read_all(packet) == [data]


@given(st.binary(max_size=2000))
def test_what_is_encoded_is_read(data):
    assert read_all(encode(data)) == [data]


@given(st.binary(max_size=5000))
def test_a_checksum_is_the_sum_of_all_bytes(data):
    assert checksum(data) == sum(data) & 0xFF


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(1, 7))
def test_pieces_may_have_any_size(packets, size):
    stream = b"+".join(map(encode, packets))
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert read_all(*pieces) == packets


def test_acknowledgements_say_nothing_and_a_refusal_does():
    assert read_all(b"+++$OK#9a+-+$#00") == [b"OK", Mark.NACK, b""]


def test_a_notification_is_told_apart_from_a_packet():
    notification, packet = read_all(b"%Stop:T05#99$Stop:T05#99")
    assert isinstance(notification, Notification)
    assert not isinstance(packet, Notification)
    assert notification == packet == b"Stop:T05"


@pytest.mark.parametrize(
    ("raw", "data"),
    [(b"0* ", b"0000"), (b'x0*"1', b"x0000001"), (b"}\x03*!", b"#####"), (b"a*~", b"a" * 98)],
)
def test_repeats_are_unpacked(raw, data):
    assert unpack(raw) == data
    assert read_all(b"$%b#%02x" % (raw, sum(raw) & 0xFF)) == [data]


@pytest.mark.parametrize("digits", [b"9A", b"9a"])
def test_a_checksum_may_have_either_case(digits):
    assert read_all(b"$OK#" + digits) == [b"OK"]


@pytest.mark.parametrize(
    "stream",
    [
        b"$OK#9b",
        b"$OK#zz",
        b"$OK#+9",
        b"x",
        b"\x03",
        b"$*!#4b",
        b"$a*\x1f#aa",
        b"$a}#de",
        b"$a*#8b",
    ],
)
def test_what_is_no_packet_is_an_error(stream):
    with pytest.raises(PacketError):
        read_all(stream)


def test_what_comes_before_an_error_is_read():
    reader = PacketReader()
    reader.feed(b"$OK#9a$OK#00")
    assert reader.next() == b"OK"
    with pytest.raises(PacketError, match="wrong checksum"):
        reader.next()


@pytest.mark.parametrize("stream", [b"$" + b"a" * 101, b"$" + b"a" * 101 + b"#", b"$a*~*~#00"])
def test_a_packet_that_is_too_long_is_an_error(stream):
    if stream.endswith(b"#00"):
        stream = b"$%b#%02x" % (stream[1:-3], sum(stream[1:-3]) & 0xFF)
    with pytest.raises(PacketError, match=r"more than 100 bytes|are the most"):
        read_all(stream, most=100)


def test_whether_a_packet_has_begun_is_known():
    reader = PacketReader()
    for piece, within in [(b"$O", True), (b"K#9", True), (b"a", False)]:
        reader.feed(piece)
        reader.next()
        assert reader.is_within_a_packet == within
