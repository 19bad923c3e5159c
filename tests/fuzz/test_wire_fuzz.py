"""Whatever bytes come, the decoder gives frames or one kind of error, and keeps little."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.errors import WireError
from vmibridge.transport.wire import (
    FROM_AGENT,
    FROM_SERVER,
    Answer,
    Cancel,
    End,
    FrameReader,
    Hello,
    Memory,
    Ping,
    Read,
    Refused,
    Trap,
    Welcome,
    WireEnd,
    WireRead,
    Write,
    encode,
    trap_event,
)

# The same lines, for every example: other tests show that they are covered.
pytestmark = pytest.mark.no_cover

ID = bytes(range(16))
LIMIT = 4096
SEEDS = {
    FROM_AGENT: [
        Hello("vmibridge", 1, 1, ID, "web"),
        Trap(7, 5000, False, 2, 3, 0x1000, 3, 64, 0, bytes(range(176)), ((0x5000, b"abc"),)),
        Memory(3, b"abc" * 50),
        Ping(),
        End((WireEnd(0, "halted", "at its end", {"rax": 2**64 - 1}),)),
        Cancel(7),
    ],
    FROM_SERVER: [
        Welcome(1, ID, 0, (1, 2), True, False, 5000, (None, 1, 2, 3), 64,
                (WireRead(1, 1, None, (1, 64, 0)),)),
        Refused("no"),
        Answer(7, 0x1003, 1, 2, 3, 4),
        Read(1, 7, 0x5000, 16),
        Write(2, 7, 0x5000, b"abc"),
    ],
}  # fmt: skip


def decode(decoder, data, cut):
    """The frames of what is fed in two pieces; `None` for an error."""
    reader = FrameReader(decoder, LIMIT)
    try:
        frames = reader.feed(data[:cut]) + reader.feed(data[cut:])
        for frame in frames:
            if isinstance(frame, Trap):
                trap_event(frame, "vm")
    except WireError:
        return None
    finally:
        assert len(reader._partial) <= max(LIMIT + 4, len(data))
    return frames


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_frames_or_an_error(data, cut):
    for decoder in SEEDS:
        decode(decoder, data, cut)


def mutate(random_, data):
    changed = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(changed))
        kind = random_.randrange(4)
        if kind == 0:
            changed[at] = random_.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 2:
            changed.insert(at, random_.randrange(256))
        elif len(changed) > 1:
            del changed[at]
    return bytes(changed)


def check_mutations(count):
    random_ = random.Random(7)
    streams = [(decoder, encode(frame)) for decoder, frames in SEEDS.items() for frame in frames]
    valid = 0
    for _ in range(count):
        decoder, data = random_.choice(streams)
        data = mutate(random_, data)
        found = decode(decoder, data, random_.randrange(len(data)))
        valid += found is not None
    # A changed address is still an address, and a size that grew waits for more.
    assert 0 < valid < count


def test_30_000_mutations_are_frames_or_an_error():
    check_mutations(30_000)


@pytest.mark.slow
def test_1_000_000_mutations_are_frames_or_an_error():
    check_mutations(1_000_000)
