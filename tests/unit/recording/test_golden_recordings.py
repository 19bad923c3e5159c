"""Recordings that earlier versions wrote, which every later version reads.

Each file in `golden/` is named by its version: the recording of `recorded_session.record`, and
beside it what was read from it then, a message a line. A later version may know more of a message,
and finds the rest as it was. Those with `-outside` have the calls of `recorded_session.Outer`, too.
"""

import json
import shutil
from pathlib import Path

import anyio
import msgspec
import pytest
from recorded_session import STEER, Outer

from vmibridge.cli import main
from vmibridge.recording import RecordingReader, Replay, recorded_traps
from vmibridge.recording.messages import OUTSIDE
from vmibridge.recording.replay.backend import ReplayBackend

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.mcap"))
OUTSIDE_GOLDEN = Path(__file__).parent / "golden" / "unreleased-3-outside.mcap"

every_version = pytest.mark.parametrize("recording", GOLDEN, ids=lambda path: path.stem)


def has(found, expected):
    """Whether `found` has all that is expected, at any depth."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            key in found and has(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(has, found, expected))
    return found == expected


def test_there_is_one():
    assert [path.stem for path in GOLDEN][:1] == ["0.2.0"]


@every_version
def test_its_messages_are_read_as_they_were(recording):
    lines = recording.with_suffix(".jsonl").read_text().splitlines()
    with RecordingReader(recording) as reader:
        messages = list(reader.messages())
    assert len(messages) == len(lines) > 50
    for (time, message), line in zip(messages, lines, strict=True):
        found = {"time": time, "kind": type(message).__name__, "message": message}
        assert has(json.loads(msgspec.json.encode(found)), json.loads(line))


def test_what_came_from_outside_is_there_in_each_of_its_forms():
    with RecordingReader(OUTSIDE_GOLDEN) as reader:
        calls = [each.message for each in reader.messages(OUTSIDE)]
    assert {(each.key, each.number) for each in calls} == {
        ("number", 0),
        ("number", 1),
        ("later", 0),
        ("fail", 0),
        ("never", 0),
    }
    forms = {(each.key, each.data is None, each.error, each.at_once) for each in calls}
    assert forms == {
        ("number", False, None, True),
        ("later", False, None, False),
        ("fail", True, STEER, True),
        ("never", True, None, False),
    }
    assert all(each.is_cut_off == (each.key == "never") for each in calls)


@pytest.mark.anyio
async def test_what_came_from_outside_is_replayed():
    released = anyio.Event()
    released.set()

    def make(vm):
        return Outer(released)

    async with Replay(OUTSIDE_GOLDEN, make, methods="add", no_outside=True) as replay:
        result = await replay.run()
        assert (result.different, result.unchecked) == (0, {})
        assert result.compared == 5, replay.report()


@every_version
def test_its_traps_have_their_replies(recording):
    with RecordingReader(recording) as reader:
        traps = list(recorded_traps(reader.messages()))
    assert {trap.event.vm for trap in traps} == {"red", "blue"}
    assert len(traps) == 21
    assert all(trap.packet and trap.reply for trap in traps)
    assert sum(len(trap.accesses) for trap in traps) == 21


@every_version
def test_it_can_be_opened_to_be_replayed(recording):
    assert ReplayBackend(recording, vm="red").vm == "red"


@every_version
@pytest.mark.parametrize("to", ["jsonl", "foxglove", "sqlite", "perfetto"])
def test_it_is_exported(recording, tmp_path, to):
    copy = shutil.copy(recording, tmp_path / "run.mcap")
    assert main(["export", str(copy), "--to", to]) == 0
    assert len(list(tmp_path.iterdir())) == 2


@every_version
def test_it_is_inspected_and_reported(recording, tmp_path, capsys):
    assert main(["inspect", str(recording), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 20
    assert main(["report", str(recording), "-o", str(tmp_path / "run.html")]) == 0
    assert (tmp_path / "run.html").stat().st_size > 10_000
