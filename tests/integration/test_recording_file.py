"""A recording of a real guest, read by the official MCAP reader, without any of our own.

What others know of the format is the MCAP specification, and the JSON Schema of each channel.
"""

import io
import json

import anyio
import msgspec
import pytest
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.reader import NonSeekingReader, make_reader
from mcap.records import Chunk, Message, MessageIndex
from mcap.stream_reader import StreamReader, breakup_chunk
from unicorn_parts import CPUID, Echo, Misbehaves

from vmibridge import Bridge, BridgeServer, open_backend
from vmibridge.recording.file.recover import recover
from vmibridge.recording.recorder import Recorder

TOPICS = ["session", "trap", "memory", "reply", "note", "step", "outside", "plain"]
COUNT = 30
"""Calls of the guest, each with a trap and a reply; it then has memory reversed, once."""


INDEXED = "recorded with message indexes"
HOW = ["recorded", INDEXED, "recovered", "recovered from a damaged one"]


async def fetch():
    return {"known": True}


class Waits(Echo):
    """Is suspended, and asks somebody else: that is in the recording."""

    name = "echo"

    async def handle(self, vmi, packet):
        await anyio.sleep(0)
        await vmi.outside("verdict", fetch)
        return await super().handle(vmi, packet)


async def record(image, path, message_index):
    async with (
        Recorder(path, flush_traps=10, message_index=message_index) as recorder,
        open_backend(f"unicorn:{image}?vcpus=2") as backend,
    ):
        server = BridgeServer(backend, Bridge(Waits(), Misbehaves()), taps=[recorder])
        async for _ in server.run():
            pass


@pytest.fixture(scope="module", params=HOW)
def content(request, build_guest, tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "run.mcap"
    image = build_guest("calls", WIDTH=64, HOW=CPUID, PAGING=1, COUNT=COUNT)
    anyio.run(record, image, path, request.param == INDEXED)
    if request.param.startswith("recorded"):
        return path.read_bytes()
    if request.param == "recovered from a damaged one":
        # The first chunk is the session, the next one has traps of the beginning.
        data = bytearray(path.read_bytes())
        chunks = make_reader(io.BytesIO(data)).get_summary().chunk_indexes
        data[chunks[1].chunk_start_offset + 80] ^= 0xFF
        path.write_bytes(data)
    target = path.with_name("recovered.mcap")
    recover(path, target)
    return target.read_bytes()


def seeking(content):
    return make_reader(io.BytesIO(content), validate_crcs=True)


def streaming(content):
    return NonSeekingReader(io.BytesIO(content), validate_crcs=True)


READERS = pytest.mark.parametrize("reader", [seeking, streaming])


def fits(value, schema, whole):
    """Whether a value is what a JSON Schema says; of the words that ours have."""
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return any(fits(value, each, whole) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema.get("type")
    if kind == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value)
            and all(fits(each, known.get(name, others), whole) for name, each in value.items())
            and (not known or set(value) <= set(known))
        )
    if kind == "array":
        first, rest = schema.get("prefixItems", []), schema.get("items") or {}
        return (
            isinstance(value, list)
            and len(value) >= schema.get("minItems", 0)
            and all(fits(e, s, whole) for e, s in zip(value, first, strict=False))
            and all(fits(each, rest, whole) for each in value[len(first) :])
        )
    if kind == "string" and schema.get("contentEncoding") == "base64":
        return isinstance(value, bytes)
    names = {str: "string", int: "integer", bool: "boolean", float: "number", type(None): "null"}
    found = names.get(type(value))
    return kind in (None, found) or (kind, found) == ("number", "integer")


@READERS
def test_has_eight_channels_that_say_what_they_hold(content, reader):
    assert reader(content).get_header().profile == "vmibridge"
    summary = reader(content).get_summary()
    assert [channel.topic for channel in summary.channels.values()] == TOPICS
    assert {channel.message_encoding for channel in summary.channels.values()} == {"msgpack"}
    assert {schema.encoding for schema in summary.schemas.values()} == {"jsonschema"}
    named = [summary.schemas[each.schema_id].name for each in summary.channels.values()]
    assert named == [f"vmibridge.{topic}" for topic in TOPICS]


@READERS
def test_each_message_fits_the_schema_of_its_channel(content, reader):
    seen = dict.fromkeys(TOPICS, 0)
    for schema, channel, message in reader(content).iter_messages():
        whole = json.loads(schema.data)
        value = msgspec.msgpack.decode(message.data)
        assert fits(value, whole, whole), (channel.topic, value)
        assert not fits({}, whole, whole), "a schema that takes anything says nothing"
        assert not fits({**value, "of another time": 1}, whole, whole)
        seen[channel.topic] += 1
    # One that is recovered has its traps and replies apart.
    assert all(count for topic, count in seen.items() if topic != "plain")
    assert seen["session"] == 1


@READERS
def test_the_statistics_and_the_chunk_indexes_are_right(content, reader):
    found = list(reader(content).iter_messages())
    summary = reader(content).get_summary()
    statistics, chunks = summary.statistics, summary.chunk_indexes
    times = [message.log_time for _, _, message in found]
    counts = {}
    for _, channel, _ in found:
        counts[channel.id] = counts.get(channel.id, 0) + 1
    assert statistics.channel_message_counts == counts
    assert (statistics.message_count, statistics.chunk_count) == (len(found), len(chunks))
    assert (statistics.channel_count, statistics.schema_count) == (8, 8)
    assert (statistics.message_start_time, statistics.message_end_time) == (times[0], times[-1])
    assert times == sorted(times)
    assert [chunk.compression for chunk in chunks] == ["zstd"] * len(chunks)


def test_each_chunk_is_where_its_index_says(content, request):
    records = StreamReader(io.BytesIO(content), emit_chunks=True, validate_crcs=True).records
    chunks = [record for record in records if isinstance(record, Chunk)]
    indexes = seeking(content).get_summary().chunk_indexes
    assert len(chunks) > 0
    for chunk, index in zip(chunks, indexes, strict=True):
        messages = [m for m in breakup_chunk(chunk, validate_crc=True) if isinstance(m, Message)]
        times = [message.log_time for message in messages]
        assert (index.message_start_time, index.message_end_time) == (min(times), max(times))
        assert index.uncompressed_size == chunk.uncompressed_size
        assert index.compressed_size == len(chunk.data)
        assert content[index.chunk_start_offset] == Opcode.CHUNK
        behind = index.chunk_start_offset + index.chunk_length
        if request.node.callspec.params["content"] != INDEXED:
            assert index.message_index_offsets == {}
            assert content[behind] in (Opcode.CHUNK, Opcode.DATA_END, Opcode.MESSAGE_INDEX)
            continue
        assert min(index.message_index_offsets.values()) == behind
        assert set(index.message_index_offsets) == {message.channel_id for message in messages}
        for channel, offset in index.message_index_offsets.items():
            assert content[offset] == Opcode.MESSAGE_INDEX
            found = MessageIndex.read(ReadDataStream(io.BytesIO(content[offset + 9 :])))
            assert found.channel_id == channel
            mine = [message.log_time for message in messages if message.channel_id == channel]
            assert [time for time, _ in found.records] == mine


@READERS
def test_messages_are_found_by_topic_and_by_time(content, reader):
    def ask(**what):
        found = reader(content).iter_messages(**what)
        return [(channel.topic, message.log_time, message.data) for _, channel, message in found]

    everything = ask()
    for topics in (["trap"], ["reply", "memory"], ["session"], ["nothing"]):
        assert ask(topics=topics) == [each for each in everything if each[0] in topics]
    start, end = (everything[len(everything) * part // 4][1] for part in (1, 3))
    some = [each for each in everything if start <= each[1] < end]
    assert 0 < len(some) < len(everything)
    assert ask(starting_at=start, ending_before=end) == some
    traps = [each for each in some if each[0] == "trap"]
    assert ask(topics="trap", starting_at=start, ending_before=end) == traps
