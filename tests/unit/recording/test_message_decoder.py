"""`DecoderFactory`: the reader of the `mcap` package gives what `RecordingReader` gives."""

import io

import msgspec
import pytest
from mcap.exceptions import DecoderNotFoundError
from mcap.reader import NonSeekingReader, make_reader
from mcap.records import Schema
from recorded_session import record, session, trap, write_file
from toy_architecture import TOY, known_toy, toy_trap

from vmibridge.errors import RecordingReadError
from vmibridge.recording import DecoderFactory, RecordingReader
from vmibridge.recording.messages import PlainTraps, RecordedArchitecture, Session

TOY_SESSION = Session("vm", format=2, architecture=RecordedArchitecture("toy", TOY.version))


def decoded(path, reader=make_reader, **what):
    made = reader(io.BytesIO(path.read_bytes()), decoder_factories=[DecoderFactory()])
    messages = []
    for found in made.iter_decoded_messages(**what):
        if isinstance(found.decoded_message, PlainTraps):
            for plain in found.decoded_message.traps:
                messages += [(plain.time, plain.event), (plain.answered, plain.reply())]
        else:
            messages.append((found.message.log_time, found.decoded_message))
    return messages


def messages(path):
    with RecordingReader(path) as reader:
        return [tuple(each) for each in reader.messages()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.mcap"
    record(path)
    return path


@pytest.mark.parametrize("reader", [make_reader, NonSeekingReader])
def test_gives_each_message_as_its_struct(run, reader):
    found = decoded(run, reader)
    assert found == messages(run)
    assert len({type(message) for _, message in found}) == 6


def test_gives_those_of_a_topic(run):
    expected = [each for each in messages(run) if type(each[1]).__name__ == "Reply"]
    found = decoded(run, topics=["reply", "plain"])
    assert [each for each in found if type(each[1]).__name__ == "Reply"] == expected
    assert len(expected) == 21
    assert 0 < len(decoded(run, topics=["reply"])) < 21


def test_without_it_there_is_none(run):
    with pytest.raises(DecoderNotFoundError):
        list(make_reader(io.BytesIO(run.read_bytes())).iter_decoded_messages())


def test_channels_of_others_are_theirs():
    factory = DecoderFactory()
    ours = Schema(1, b"", "jsonschema", "vmibridge.trap")
    assert factory.decoder_for("msgpack", ours) is not None
    assert factory.decoder_for("json", ours) is None
    assert factory.decoder_for("msgpack", None) is None
    assert factory.decoder_for("msgpack", Schema(1, b"", "", "camera")) is None


@pytest.fixture
def toys(path):
    with known_toy():
        yield write_file(
            path, [(1, TOY_SESSION), (2, toy_trap(vm="vm")), (3, toy_trap(2, vm="vm"))]
        )


def test_a_trap_has_the_registers_of_its_session(toys):
    assert decoded(toys) == messages(toys)


def test_a_trap_is_never_read_with_the_registers_of_another_architecture(toys):
    with pytest.raises(RecordingReadError, match="read the topic session, too"):
        decoded(toys, topics=["trap"])


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (msgspec.structs.replace(session(), format=99), "format 99"),
        (TOY_SESSION, "toy"),
    ],
)
def test_what_is_not_known_is_not_read(path, message, why):
    with pytest.raises(RecordingReadError, match=why):
        decoded(write_file(path, [(1, message), (2, trap(1))]))


@pytest.mark.parametrize("topic", ["session", "trap", "memory", "reply", "note", "plain"])
@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", b"\x91" * 100_000], ids=len)
def test_what_is_damaged_is_an_error(topic, data):
    schema = Schema(1, b"", "jsonschema", f"vmibridge.{topic}")
    with pytest.raises(RecordingReadError, match="cannot be decoded"):
        DecoderFactory().decoder_for("msgpack", schema)(data)
