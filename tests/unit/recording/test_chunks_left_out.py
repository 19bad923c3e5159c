"""`--since`: chunks of before are not unpacked, and the traps are the same as with them."""

import json

import pytest
from recorded_session import MAX_U64, reply, session, trap, write_file

from vmibridge.cli import main
from vmibridge.recording.file import damage
from vmibridge.recording.file import reader as reader_module
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import Note
from vmibridge.recording.selection import SelectedTraps, Selection

SECOND = 1_000_000_000
CHUNKS = 20


def pair(seq, vm="vm"):
    return [(seq * SECOND, trap(seq, vm=vm)), (seq * SECOND + 5, reply(seq, vm=vm))]


def write(path, extra=(), library="vmibridge tests"):
    """A chunk for each second; `extra` by the number of the chunk."""
    extra = dict(extra)
    chunks = [[*extra.get(seq, []), *pair(seq)] for seq in range(1, CHUNKS + 1)]
    return write_file(path, [(1, session())], *chunks, library=library)


@pytest.fixture
def unpacked(monkeypatch):
    """How many chunks were."""
    count = []
    unpack = reader_module.unpack

    def counted(body):
        count.append(len(body))
        return unpack(body)

    for module in (reader_module, damage):
        monkeypatch.setattr(module, "unpack", counted)
    return count


def select(path, since, *, skip=True):
    heard = []
    with RecordingReader(path) as reader:
        traps = SelectedTraps(
            reader.messages(),
            Selection.parse(since=since),
            heard.append,
            reader=reader if skip else None,
        )
        found = [(trap.time, trap.event, trap.reply) for trap in traps]
        return found, heard, traps.start, (reader.complete, reader.problems)


@pytest.mark.parametrize("since", ["0", "0.000000006", "9", "9.5", "18.9", "19", "19.1", "100"])
def test_the_traps_are_the_same(path, since):
    write(path, {7: [(7 * SECOND, session("late"))]})
    assert select(path, since) == select(path, since, skip=False)


def test_chunks_of_before_are_not_unpacked(path, unpacked):
    write(path)
    found, _, start, (complete, problems) = select(path, "15")
    assert [event.seq for _, event, _ in found] == [16, 17, 18, 19, 20]
    assert start == SECOND
    assert (complete, problems) == (True, [])
    # The session, the first trap, and those.
    assert len(unpacked) == 1 + 1 + 5


def test_sessions_and_notes_of_before_are_heard_but_for_retries(path, unpacked):
    late, lost = session("late"), Note("lost", "something", "vm", 1)
    retry = Note("retry", "asks again", "vm", 9, 8)
    extra = {4: [(4 * SECOND, late)], 6: [(6 * SECOND, lost)], 9: [(9 * SECOND, retry)]}
    write(path, extra)
    _, heard, _, _ = select(path, "15")
    assert heard == [session(), late, lost]
    assert len(unpacked) == 1 + 1 + 2 + 5


def test_a_file_of_another_tool_is_read_whole(path, unpacked):
    write(path, library="a tool that packs again")
    found, _, _, _ = select(path, "15")
    assert len(found) == 5
    assert len(unpacked) == 1 + CHUNKS


def test_a_pass_begins_with_all(path):
    write(path)
    with RecordingReader(path) as reader:
        reader.skip_before = MAX_U64
        assert sum(1 for _ in reader.messages()) == 1 + 2 * CHUNKS


def test_a_file_that_is_cut_short_is_read_so_too(path, unpacked):
    write(path)
    path.write_bytes(path.read_bytes()[:-9000])
    found, _, _, (complete, _) = select(path, "10")
    assert found
    assert not complete
    assert len(unpacked) < CHUNKS


def test_inspect_shows_the_same(path, capsys, unpacked):
    write(path)
    assert main(["inspect", str(path), "--json", "--since", "15"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seq"] for line in lines if "seq" in line] == [16, 17, 18, 19, 20]
    assert len(unpacked) < CHUNKS
