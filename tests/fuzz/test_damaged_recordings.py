"""A recording may hold anything: it is cut short, damaged, or made to hurt who reads it.

What can be read is read, what cannot is reported as a problem, and a file that is not a recording
is a `RecordingReadError`. Nothing else is raised, and memory and time stay bounded.
"""

import contextlib
import functools
import itertools
import struct
import tracemalloc
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import lz4.frame
import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from recorded_session import reply, session, trap, write_file

from vmibridge.errors import RecordingReadError
from vmibridge.recording.file import damage as damage_module
from vmibridge.recording.file import reader as reader_module
from vmibridge.recording.file import writer
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.file.recover import recover
from vmibridge.recording.file.unpack import MAX_CHUNK
from vmibridge.recording.messages import (
    CHANNELS,
    MEMORY,
    NOTE,
    REPLY,
    SESSION,
    TRAP,
    MemoryAccess,
    Note,
)
from vmibridge.recording.traps import recorded_traps
from vmibridge.vm.trap import TrapEvent

# The same lines, for every example: other tests show that they are covered.
pytestmark = pytest.mark.no_cover

START = 1_700_000_000 * 10**9
MAGIC = b"\x89MCAP0\r\n"
MAX_U64 = 2**64 - 1
MAX_MEMORY = 4 * MAX_CHUNK
HEADER, FOOTER, CHANNEL, MESSAGE, CHUNK, INDEX, ATTACHMENT, DATA_END, UNKNOWN = (
    *(1, 2, 4, 5, 6, 7, 9, 15, 0x80),
)
encode = msgspec.msgpack.encode


def access(seq):
    return MemoryAccess("vm", seq, 0x1000, 8, bytes(range(8)))


CHUNKS = [
    list(zip(itertools.count(START + 1000 * number), messages, strict=False))
    for number, messages in enumerate(
        [
            [session()],
            [trap(1), access(1), reply(1), trap(2, value=MAX_U64)],
            [access(2), reply(2), trap(3), reply(3)],
            [Note("end", "3 traps", "vm", counts={"handled": 3})],
        ]
    )
]
MESSAGES = [each for chunk in CHUNKS for each in chunk]


@functools.cache
def intact():
    """A small file, as a recorder writes it: short descriptions instead of the schemas."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "json_schema", lambda _: b"{}")
        return write_file(Path(folder) / "small.mcap", *CHUNKS).read_bytes()


def records(data):
    """Place, opcode and length of each record."""
    at = len(MAGIC)
    while at < len(data) - len(MAGIC):
        opcode, length = struct.unpack_from("<BQ", data, at)
        yield at, opcode, length
        at += 9 + length


def read(path, data=None):
    """The messages and the problems of a file."""
    if data is not None:
        path.write_bytes(data)
    with RecordingReader(path) as reader:
        return [tuple(each) for each in reader.messages()], list(map(str, reader.problems))


def survives(path, data):
    """Nothing but `RecordingReadError`, from all that reads a file."""
    path.write_bytes(data)
    for use in (use_messages, use_traps, use_recover):
        with contextlib.suppress(RecordingReadError):
            use(path)


def use_messages(path):
    with RecordingReader(path) as reader:
        for _ in reader.messages():
            pass


def use_traps(path):
    with RecordingReader(path) as reader:
        for _ in recorded_traps(reader.messages()):
            pass


def use_recover(path):
    target = path.with_suffix(".clean")
    target.unlink(missing_ok=True)
    done = recover(path, target)
    kept, problems = read(target)
    assert (len(kept), problems) == (sum(done.messages.values()), [])


# --- files made by hand -----------------------------------------------------------------


def text(value):
    return struct.pack("<I", len(value)) + value


def record(opcode, body, length=None):
    return struct.pack("<BQ", opcode, len(body) if length is None else length) + body


def header(profile=b"vmibridge"):
    return record(HEADER, text(profile) + text(b"tests"))


def channel(number, topic):
    head = struct.pack("<HH", number, 0)
    return record(CHANNEL, head + text(topic.encode()) + text(b"msgpack") + text(b""))


def message(number, payload):
    return record(MESSAGE, struct.pack("<HIQQ", number, 0, START, START) + payload)


def chunk(data, *, packed=None, compression=b"zstd", size=None, crc=None):
    packed = (zstandard.compress(data) if compression else data) if packed is None else packed
    size, crc = len(data) if size is None else size, zlib.crc32(data) if crc is None else crc
    body = struct.pack("<QQQI", START, START, size, crc) + text(compression)
    return record(CHUNK, body + struct.pack("<Q", len(packed)) + packed)


def lz4_chunk(data, *, size=None, cut=None):
    """`cut`: where the packed bytes end."""
    return chunk(data, packed=lz4.frame.compress(data)[:cut], compression=b"lz4", size=size)


def mcap(*parts, profile=b"vmibridge"):
    end = record(DATA_END, bytes(4)) + record(FOOTER, bytes(20)) + MAGIC
    return b"".join([MAGIC, header(profile), *parts, end])


SESSION_RECORD = message(SESSION.id, encode(session()))
TRAP_RECORD = message(TRAP.id, encode(trap(1)))
SOUND = chunk(SESSION_RECORD + TRAP_RECORD)


def frame(content, size=None):
    """A zstd frame of zeros; `size` is what it states of its content: nothing, or a lie."""
    made = zstandard.ZstdCompressor(write_content_size=size is not None)
    packed = made.compress(bytes(content))
    if size is not None:
        # Magic, descriptor: 8 bytes of size, single segment; the blocks follow.
        blocks = packed[zstandard.frame_header_size(packed) :]
        packed = struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + blocks
    return packed


# --- cut short --------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_read_up_to_there(tmp_path):
    data, path = intact(), tmp_path / "cut.mcap"
    assert read(path, data) == (MESSAGES, [])
    assert len(data) < 4096
    seen = set()
    for size in range(len(data)):
        try:
            found, problems = read(path, data[:size])
        except RecordingReadError:
            assert size < len(MAGIC)
            continue
        assert found == MESSAGES[: len(found)], size
        assert "truncated" in problems[-1], size
        seen.add(len(found))
    # One chunk after the other.
    assert seen == set(itertools.accumulate(map(len, CHUNKS), initial=0))


# --- damaged ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(CHUNKS)))
@pytest.mark.parametrize("change", [0x01, 0x04, 0x80, 0xFF])
def test_a_wrong_byte_costs_its_chunk_only(tmp_path, number, change):
    data, path = intact(), tmp_path / "damaged.mcap"
    starts = [at for at, opcode, _ in records(data) if opcode == CHUNK]
    ends = [*starts[1:], next(at for at, opcode, _ in records(data) if opcode == DATA_END)]
    others = [each for chunk in CHUNKS if chunk is not CHUNKS[number] for each in chunk]
    # Its record, also opcode and length, and the message indexes behind it.
    for at in range(starts[number], ends[number]):
        damaged = bytearray(data)
        damaged[at] ^= change
        found, problems = read(path, damaged)
        if found != MESSAGES:
            assert found == others, at
            assert problems, at


spans = st.tuples(st.integers(0, MAX_U64), st.integers(1, 200))
damages = st.lists(
    st.tuples(st.just("flip"), spans, st.integers(1, 255))
    | st.tuples(st.just("insert"), spans, st.binary(min_size=1, max_size=100))
    | st.tuples(st.just("delete"), spans, st.none())
    | st.tuples(st.just("swap"), spans, spans)
    | st.tuples(st.just("length"), spans, st.sampled_from([0, 1, 22, 2**31, 2**63, MAX_U64])),
    min_size=1,
    max_size=6,
)


def damage(data, how, span, what):
    at, end = span[0] % len(data), span[0] % len(data) + span[1]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ what]) + data[at + 1 :]
    if how == "insert":
        return data[:at] + what + data[at:]
    if how == "delete":
        return data[:at] + data[end:] or b"\0"
    if how == "swap":
        other = what[0] % len(data)
        first, second = data[at:end], data[other : other + what[1]]
        changed = data[:at] + second + data[end:]
        return changed[:other] + first + changed[other + what[1] :] or b"\0"
    # A length, where one is.
    places = [at for at, _, _ in records(intact())]
    at = (places[span[0] % len(places)] + 1) % len(data)
    return data[:at] + struct.pack("<Q", what) + data[at + 8 :]


@settings(max_examples=examples(300))
@given(damages)
def test_no_damage_to_a_file_raises_anything_else(damaged):
    data = intact()
    for each in damaged:
        data = damage(data, *each)
    with TemporaryDirectory() as folder:
        survives(Path(folder) / "damaged.mcap", data)


@settings(max_examples=examples(300))
@given(damages)
def test_nor_does_damage_that_came_before_the_checksum(damaged):
    data = SESSION_RECORD + TRAP_RECORD + message(REPLY.id, encode(reply(1))) + TRAP_RECORD
    for each in damaged:
        data = damage(data, *each)
    with TemporaryDirectory() as folder:
        survives(Path(folder) / "damaged.mcap", mcap(chunk(data)))


numbers = st.integers(-(2**63), MAX_U64) | st.sampled_from([0, 16, 32, 64])
fields = st.dictionaries(st.sampled_from(["seq", "vcpu", "ip", "length", "width", "ring"]), numbers)
registers = st.dictionaries(st.sampled_from(["rcx", "rdx", "rax", "cr3", "efer"]), numbers)


@settings(max_examples=examples(200))
@given(fields, registers, st.sampled_from(["cpuid", "vmcall", "vmmcall", "port-io", "msr"]))
def test_nor_do_numbers_that_no_vcpu_has(fields, registers, reason):
    event = {"seq": 1, "registers": registers, "reason": reason, **fields}
    assert msgspec.convert(event, TrapEvent)
    with TemporaryDirectory() as folder:
        survives(Path(folder) / "strange.mcap", mcap(chunk(message(TRAP.id, encode(event)))))


# --- strange, or made to hurt -----------------------------------------------------------

TRAP_7 = encode(trap(7))
REVERSED = b"".join(channel(7 - each.id, each.topic) for each in CHANNELS)
DEEP, LONG = b"\x81\xa1x" + b"\x91" * 1_000_000, b"\x82\xa2vm\xa1x\xa8handlers\xdd" + b"\xff" * 4
LONG_NAMES = (message(TRAP.id, encode(trap(seq, vm="x" * (1 << 20)))) for seq in range(256))
LONG_ERROR = message(MEMORY.id, encode(MemoryAccess("vm", 1, 0, 8, error="x" * (8 << 20))))
UNKNOWN_SIZE, LARGE, MOST_SAID = frame(1 << 26), 1 << 26, f"{MAX_CHUNK} is the most"

# What it is, how many of its messages arrive, and what is told.
STRANGE = {
    "a chunk without compression": (chunk(TRAP_RECORD, compression=b""), 1, None),
    "messages outside of chunks": (SESSION_RECORD + TRAP_RECORD, 2, None),
    "channels that a chunk numbers": (chunk(channel(77, "trap") + message(77, TRAP_7)), 1, None),
    "a channel of another tool": (channel(9, "camera") + chunk(message(9, b"?")), 0, None),
    "a record that nobody knows": (record(UNKNOWN, b"?" * 50), 0, None),
    "many tiny records": (chunk(record(UNKNOWN, b"") * 100_000), 0, None),
    "many messages of no channel": (chunk(message(9, b"") * 100_000), 0, None),
    "lz4": (lz4_chunk(TRAP_RECORD), 1, None),
    "lz4 that is none": (chunk(TRAP_RECORD, compression=b"lz4"), 0, "compression is 'lz4'"),
    "lz4 that unpacks to more": (lz4_chunk(bytes(LARGE), size=9), 0, "not end after the 9 bytes"),
    "lz4 that unpacks to less": (lz4_chunk(b"?", size=9), 0, "has 1 bytes and states 9"),
    "lz4 that is cut": (lz4_chunk(b"?", cut=-5), 0, "does not end"),
    "a compression of tomorrow": (chunk(TRAP_RECORD, compression=b"xz"), 0, "zstd and lz4 are"),
    "a record of 2**64-1 bytes": (record(UNKNOWN, b"", MAX_U64), 0, "9 bytes are damaged"),
    "a chunk of 2**64-1 bytes": (record(CHUNK, b"", MAX_U64), 0, "9 bytes are damaged"),
    "a message of 2**64-1 bytes": (chunk(record(MESSAGE, b"", MAX_U64)), 0, "middle of a record"),
    "a message without a head": (chunk(record(MESSAGE, b"")), 0, "too short"),
    "a footer in the middle": (record(FOOTER, bytes(20)), 0, None),
    "an empty chunk": (chunk(b""), 0, None),
    "deep nesting": (chunk(message(NOTE.id, DEEP)), 0, "nested too deeply"),
    "a list of 4,294,967,295 items": (chunk(message(SESSION.id, LONG)), 0, "cannot be decoded"),
    "a payload of something else": (chunk(message(MEMORY.id, TRAP_7)), 0, "cannot be decoded"),
    "a frame that states too much": (chunk(b"", packed=frame(9, 1 << 40), size=9), 0, "unpacks to"),
    "a frame that lies": (
        chunk(b"", packed=frame(9, MAX_CHUNK), size=MAX_CHUNK), 0, "cannot be unpacked"
    ),
    "a frame that states nothing": (
        chunk(b"", packed=UNKNOWN_SIZE, size=9), 0, "cannot be unpacked"
    ),
    "a chunk that states much": (chunk(b"", packed=UNKNOWN_SIZE, size=LARGE), 0, MOST_SAID),
    "a chunk that states 2**64-1": (chunk(b"", packed=frame(1), size=MAX_U64), 0, MOST_SAID),
    "open traps with long errors": (chunk(TRAP_RECORD) + chunk(LONG_ERROR) * 32, 33, None),
    "open traps with long names": (b"".join(map(chunk, LONG_NAMES)), 256, None),
}  # fmt: skip


@pytest.mark.slow
def test_a_million_tiny_records_cost_no_memory(tmp_path):
    part = chunk(record(UNKNOWN, b"") * 1_000_000)
    test_what_is_strange_costs_itself_only_and_no_memory(tmp_path, part, 0, None)


@pytest.mark.parametrize(("part", "count", "told"), STRANGE.values(), ids=STRANGE)
def test_what_is_strange_costs_itself_only_and_no_memory(tmp_path, part, count, told):
    path = tmp_path / "strange.mcap"
    found, problems = read(path, mcap(part, SOUND))
    assert len(found) == count + 2
    del found
    tracemalloc.start()
    try:
        use_traps(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()
    use_recover(path)
    assert [told in problem for problem in problems] == ([True] if told else []), problems


@pytest.mark.parametrize(
    "size",
    [0, 4096, 8 << 20],
    ids=["of nothing", "overlapping", "of most of the file"],
)
def test_many_fake_chunks_are_not_all_tried(tmp_path, monkeypatch, size):
    # The looks of a chunk, of `size` bytes, that holds those behind it.
    head = struct.pack("<QQQI", START, START, size, 1) + text(b"zstd") + struct.pack("<Q", size)
    fake = record(CHUNK, head, len(head) + size)
    unpacked = 0

    def unpack(body):
        nonlocal unpacked
        unpacked += len(body)
        return unpack_it(body)

    unpack_it = reader_module.unpack
    for module in (reader_module, damage_module):
        monkeypatch.setattr(module, "unpack", unpack)
    data = mcap(SOUND, record(UNKNOWN, b"", MAX_U64), *[fake * 1000 + SOUND] * 10, bytes(8 << 20))
    found, problems = read(tmp_path / "fakes.mcap", data)
    assert len(found) >= 2
    assert problems
    # A file is unpacked about once, whatever it claims.
    assert unpacked < 4 * len(data)


LATER = encode({"vm": "vm", "format": 5})


def test_channels_may_have_other_numbers(tmp_path):
    data = mcap(REVERSED, chunk(message(5, TRAP_7) + message(6, encode(session()))))
    assert read(tmp_path / "a.mcap", data) == ([(START, trap(7)), (START, session())], [])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty"),
        (b"\x7fELF", "is not an MCAP file"),
        (b"x" * 5000, "is not an MCAP file"),
        (MAGIC[:7], "is not an MCAP file"),
        (mcap(SOUND, profile=b"ros2"), "is an MCAP file of profile 'ros2', no recording"),
        (mcap(SOUND, profile=b""), "is an MCAP file of profile '', no recording"),
        (mcap(chunk(message(SESSION.id, LATER))), "has format 5, and this .* reads formats 1 to 4"),
    ],
)
@pytest.mark.parametrize("use", [use_messages, use_traps, use_recover])
def test_what_is_no_recording_is_refused(tmp_path, data, told, use):
    path = tmp_path / "none.mcap"
    path.write_bytes(data)
    with pytest.raises(RecordingReadError, match=told):
        use(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [".", "missing.mcap", "x/y.mcap", "n" * 300])
def test_what_cannot_be_opened_is_refused(tmp_path, name):
    with pytest.raises(RecordingReadError):
        RecordingReader(tmp_path / name)
