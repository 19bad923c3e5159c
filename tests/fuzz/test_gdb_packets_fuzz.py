"""A stub may send anything. The parser has packets, or its own error, and nothing else."""

import random

import pytest

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.commands import StubError
from vmibridge.backends.qemu.gdb.packets import (
    Mark,
    Notification,
    PacketError,
    PacketReader,
    encode,
)
from vmibridge.backends.qemu.gdb.registers import parse_description

# The same lines, for every example: other tests show that they are covered.
pytestmark = pytest.mark.no_cover

SEEDS = [
    b"OK",
    b"E14",
    b"T05thread:p01.02;",
    b"T02thread:01;core:1;",
    b"W00",
    b"mp01.01,p01.02",
    b"PacketSize=20020;qXfer:features:read+;vContSupported+;multiprocess+",
    b"l<target><reg name='rax' bitsize='64' regnum='0'/><xi:include href='a.xml'/></target>",
    b"O6869",
    bytes(range(256)),
    b"00" * 608,
]
PARSERS = [
    commands.parse_stop,
    commands.parse_threads,
    commands.parse_features,
    commands.parse_part,
    commands.parse_output,
    commands.check_ok,
    commands.parse_hex,
    parse_description,
    lambda data: commands.packet_size(commands.parse_features(data)),
    lambda data: commands.parse_memory(data, 2),
]
MARKS = b"$#}*%+-\x00\x03\x1d\x7e\xff"


def mutated(rng):
    data = bytearray(encode(rng.choice(SEEDS)))
    if rng.random() < 0.3:
        data[:0] = rng.choice([b"+", b"-", b"%", b"++", b"$"])
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del data[at : at + rng.randrange(1, 8)]
        elif kind == 1:
            data[at:at] = bytes([rng.choice(MARKS)]) * rng.randrange(1, 5)
        elif kind == 2:
            data[at : at + 1] = bytes([rng.randrange(256)])
        else:
            data[at:at] = data[: rng.randrange(1, 20)]
    if rng.random() < 0.5 and b"#" in data:
        # With the right checksum what is inside is looked at.
        begin = data.find(b"$") + 1
        end = data.find(b"#", begin)
        data[end:] = b"#%02x" % (sum(data[begin:end]) & 0xFF)
    return bytes(data)


def check(count, seed):
    rng = random.Random(seed)
    parsed = 0
    for _ in range(count):
        stream = mutated(rng)
        reader = PacketReader(4096)
        cut = rng.randrange(len(stream) + 1)
        try:
            for piece in (stream[:cut], stream[cut:]):
                reader.feed(piece)
                while (packet := reader.next()) is not None:
                    if packet is Mark.NACK:
                        continue
                    assert isinstance(packet, bytes | Notification)
                    assert len(packet) <= 4096
                    parsed += 1
                    rng.choice(PARSERS)(packet)
        except (PacketError, StubError):
            pass
    # Enough of them got through for the parsers of replies to have been tried.
    assert parsed > count // 10


def test_no_packet_raises_anything_but_an_error_of_its_own():
    check(50_000, 1)


@pytest.mark.slow
def test_no_packet_of_a_million_raises_anything_but_an_error_of_its_own():
    check(1_000_000, 2)
