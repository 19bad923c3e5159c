"""Recordings made of recordings: what is kept is whole, in order, and as it was."""

from pathlib import Path
from random import Random

import msgspec
import pytest
import replay_parts
from determinism_parts import bridges, random_guests
from determinism_parts import record as record_guests
from laws import LONG
from recorded_messages import read, some_messages
from recorded_session import record, reply, session, trap, write_file

from vmibridge import OutcomeKind
from vmibridge.errors import ConfigError, RecordingReadError
from vmibridge.recording import MemoryAccess, Note, Session, recorded_traps
from vmibridge.recording.edit import editing, fates, keeping
from vmibridge.recording.edit.editing import EditOptions, edit
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import Step
from vmibridge.recording.new_recording import NewRecording
from vmibridge.recording.other_vms import other_vms_in
from vmibridge.recording.selection import Selection
from vmibridge.vm.trap import TrapEvent

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.mcap"))
SECOND = 10**9
WAITING = OutcomeKind.WAITING


def edited(folder, *sources, out="edited.mcap", **options):
    """Edit; returns the messages of the file that was made."""
    target = folder / out
    edit(sources, target, EditOptions(**options))
    found = read(target)
    target.unlink()
    return found


def select(**words):
    return Selection.parse(**words)


def requests_of(messages):
    """The traps of each request, as keys of the VM and of their numbers."""
    found = {}
    for each in recorded_traps(TimedMessage(*timed) for timed in messages):
        first = next((note.retry_of for _, note in each.notes), each.event.seq)
        found.setdefault((each.event.vm, first), []).append(each)
    return found


def random_recording(rng):
    """A VM or two, some vCPUs, requests that wait and ask again; one trap a second."""
    messages = [(0, session(vm)) for vm in ("red", "blue")[: rng.randrange(1, 3)]]
    vms = [message.vm for _, message in messages]
    seqs = dict.fromkeys(vms, 0)
    open_traps, waiting = {}, {}
    for second in range(1, rng.randrange(10, 40)):
        vm, vcpu = rng.choice(vms), rng.randrange(3)
        time = second * SECOND
        before = open_traps.pop((vm, vcpu), None)
        if before is None:
            seqs[vm] += 1
            seq = seqs[vm]
            messages.append((time, trap(seq, vm=vm, vcpu=vcpu, request=rng.choice([1, 2]))))
            first = waiting.pop((vm, vcpu), None)
            if first is not None:
                messages.append((time, Note("retry", "again", vm, seq, first)))
            open_traps[vm, vcpu] = seq, first
            continue
        seq, first = before
        messages.append((time, MemoryAccess(vm, seq, 0, 4, b"abcd")))
        kind = rng.choice([WAITING, OutcomeKind.HANDLED, OutcomeKind.FAILED])
        messages.append((time, reply(seq, kind, vm=vm, retry_of=first, output="1")))
        if kind is WAITING:
            waiting[vm, vcpu] = seq if first is None else first
    return [*messages, *((41 * SECOND, Note("end", "some traps", vm)) for vm in vms)]


# --- laws -------------------------------------------------------------------------------


@pytest.mark.no_cover
def test_to_edit_nothing_is_to_copy(tmp_path):
    for seed in range(200 if LONG else 8):
        messages = some_messages(seed, 60)
        path = write_file(tmp_path / f"{seed}.mcap", messages)
        assert edited(tmp_path, path) == messages, seed


@pytest.mark.no_cover
def test_whole_requests_are_kept_as_they_were_and_cut_again_the_same(tmp_path):
    for seed in range(400 if LONG else 20):
        rng = Random(seed)
        messages = random_recording(rng)
        path = write_file(tmp_path / f"{seed}.mcap", messages)
        since, until = sorted(rng.sample(range(42), 2))
        words = {
            "vms": rng.choice([[], ["red"]]),
            "vcpus": rng.choice([[], [0, 1]]),
            "requests": rng.choice([[], ["1"]]),
            # Not seconds: those are counted from the first trap, which may be cut.
            "since": rng.choice([None, f"1970-01-01T00:00:{since:02}"]),
            "until": rng.choice([None, f"1970-01-01T00:00:{until:02}"]),
        }
        selection = select(**words)
        wanted = {
            key: traps
            for key, traps in requests_of(messages).items()
            if any(selection.takes(each, SECOND) for each in traps)
        }
        if not wanted:
            with pytest.raises(ConfigError, match="no trap matches"):
                edited(tmp_path, path, selection=selection)
            continue
        found = edited(tmp_path, path, selection=selection)
        assert as_they_are(requests_of(found)) == as_they_are(wanted), seed
        assert is_within([each for each in found if type(each[1]) is not Note], messages), seed
        again = write_file(tmp_path / f"again{seed}.mcap", found)
        assert edited(tmp_path, again, selection=selection) == found, seed
        check_notes(found, messages)


def as_they_are(requests):
    """Without their places, which change."""
    return {
        key: [(each.time, each.event, each.accesses, each.reply, each.reply_time) for each in traps]
        for key, traps in requests.items()
    }


def is_within(found, messages):
    """Whether all of `found` are among the messages, in their order."""
    left = iter(messages)
    return all(each in left for each in found)


def check_notes(found, messages):
    """Where earlier traps of a VM are missing, its first trap has a note before it."""
    for vm in {message.vm for _, message in found if isinstance(message, TrapEvent)}:
        place = next(
            at
            for at, (_, each) in enumerate(found)
            if isinstance(each, TrapEvent) and each.vm == vm
        )
        first = found[place][1].seq
        before = [each for each in found[:place] if isinstance(each[1], Note) and each[1].vm == vm]
        kinds = [note.kind for _, note in before if other_vms_in(note.text) is None]
        assert kinds == ["lost"] * (first > 1)


def test_a_vm_that_is_left_out_is_noted_until_it_is_there_again(tmp_path):
    messages = [(0, session("red")), (0, session("blue"))]
    messages += [(SECOND * seq, trap(seq, vm=vm)) for seq in (1, 2) for vm in ("red", "blue")]
    path = write_file(tmp_path / "run.mcap", messages)
    parts = []
    for vm, other in (("red", "blue"), ("blue", "red")):
        parts.append(tmp_path / f"{vm}.mcap")
        edit([path], parts[-1], EditOptions(selection=select(vms=[vm])))
        (_, first), (_, note), *_ = read(parts[-1])
        assert (first.vm, note.vm, note.kind, note.seq) == (vm, vm, "lost", None)
        assert other_vms_in(note.text) == [other]
        again = edited(tmp_path, parts[-1])
        assert again == read(parts[-1])
    both = edited(tmp_path, *parts)
    assert not any(isinstance(each, Note) for _, each in both)
    assert sorted(map(repr, both)) == sorted(map(repr, messages))


@pytest.mark.no_cover
def test_what_is_split_and_merged_is_what_it_was(tmp_path):
    for seed in range(200 if LONG else 5):
        rng = Random(seed)
        messages = random_recording(rng)
        path = write_file(tmp_path / f"{seed}.mcap", messages)
        for split in ("vm", rng.randrange(1, 20) * SECOND):
            done = edit([path], tmp_path / "s.mcap", EditOptions(split=split))
            parts = [Path(name) for name in done.files]
            traps = [each for part in parts for _, each in read(part) if type(each) is TrapEvent]
            assert len(traps) == sum(type(each) is TrapEvent for _, each in messages), seed
            assert all(isinstance(read(part)[0][1], Session) for part in parts)
            if split == "vm" and len(parts) > 1:
                both = edited(tmp_path, *parts)
                assert sorted(map(repr, both)) == sorted(map(repr, messages)), seed
            for part in parts:
                part.unlink()


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_what_is_split_and_merged_has_the_order_that_it_had(tmp_path, loop):
    """Also where a handler was queued: that is recorded with what comes next, with its time."""
    queued = 0
    for seed in range(20 if LONG else 4):
        path, guests = tmp_path / f"{seed}.mcap", random_guests(seed)
        record_guests(path, guests, bridges(), loop, in_flight=2)
        messages = read(path)
        queued += sum(isinstance(each, Step) and each.kind == "queued" for _, each in messages)
        for split in ("vm", SECOND // 100):
            done = edit([path], tmp_path / "s.mcap", EditOptions(split=split))
            assert edited(tmp_path, *map(Path, done.files)) == messages, (seed, split)
            for name in done.files:
                Path(name).unlink()
    assert queued > 10


# --- each change ------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    record(tmp_path / "run.mcap")
    return tmp_path / "run.mcap"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recordings_of_earlier_versions_are_edited(path, tmp_path):
    assert edited(tmp_path, path) == read(path)
    cut = edited(tmp_path, path, selection=select(vms=["blue"]), rename={"blue": "green"})
    assert {message.vm for _, message in cut} == {"green"}
    assert sum(isinstance(message, TrapEvent) for _, message in cut) == 4


def test_times_are_shifted(recorded, tmp_path):
    before, after = read(recorded), edited(tmp_path, recorded, shift=-3600 * SECOND)
    assert [time for time, _ in after] == [time - 3600 * SECOND for time, _ in before]
    hour = before[0][1].started[11:13]
    assert after[0][1].started[11:13] == f"{(int(hour) - 1) % 24:02}"
    with pytest.raises(ConfigError, match="before 1970"):
        edited(tmp_path, recorded, shift=-(1 << 61))


def test_a_clock_of_handlers_that_no_file_can_have_is_told(tmp_path):
    """Of a session that was shifted before."""
    path = tmp_path / "far.mcap"
    with NewRecording(path) as recording:
        recording.add(Session("vm", clock=-(1 << 63)))
    with pytest.raises(ConfigError, match="the clock of handlers would be beyond 64 bits"):
        edited(tmp_path, path, shift=SECOND)


def test_vms_are_renamed(recorded, tmp_path):
    names = {"red": "blue", "blue": "red"}
    after = edited(tmp_path, recorded, rename=names)
    assert [names[each.vm] for _, each in after] == [each.vm for _, each in read(recorded)]
    with pytest.raises(ConfigError, match="would be called 'blue'"):
        edited(tmp_path, recorded, rename={"red": "blue"})
    with pytest.raises(ConfigError, match="there is no VM 'green'; there are 'red', 'blue'"):
        edited(tmp_path, recorded, rename={"green": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["run.mcap"]


class TestRedaction:
    def test_leaves_out_what_a_recorder_would_have(self, recorded, tmp_path):
        after = edited(tmp_path, recorded, redact=("memory", "0x0001:value1"))
        assert all(each.data is None for _, each in after if isinstance(each, MemoryAccess))
        for each in recorded_traps(TimedMessage(*timed) for timed in after):
            if each.packet.request == 1:
                assert each.packet.value1 == each.reply.packet.value1 == 0
                assert each.reply.output is None
                assert each.reply.error in (None, "left out")
                assert each.reply.writes.rax is None
        told = [
            [str(rule) for rule in each.redaction] for _, each in after if type(each) is Session
        ]
        assert told == [["memory", "0x0001:value1"]] * 2

    def test_is_the_same_when_it_is_done_twice(self, recorded, tmp_path):
        rules = ("0x0001:value3", "memory")
        once = edited(tmp_path, recorded, redact=rules)
        again = write_file(tmp_path / "again.mcap", once)
        assert edited(tmp_path, again, redact=rules) == once

    def test_leaves_out_more_where_the_trap_is_not_known(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fates, "_MAX_OPEN", 1)
        monkeypatch.setattr(fates, "_MAX_LATE", 0)
        messages = [(1, trap(1)), (1, trap(2)), (2, MemoryAccess("vm", 1, 0, 1, b"x")),
                    (2, MemoryAccess("vm", 2, 0, 1, b"x")), (3, reply(1, output="1"))]  # fmt: skip
        path = write_file(tmp_path / "run.mcap", messages)
        found = edited(tmp_path, path, redact=("0x0007:memory",))
        assert [each.data for _, each in found if isinstance(each, MemoryAccess)] == [None, b"x"]
        assert found[-1][1].output == "1"
        assert edited(tmp_path, path, redact=("0x0001:value1",))[-1][1].output is None


class TestMerging:
    def test_is_by_time(self, tmp_path):
        first = write_file(tmp_path / "a.mcap", [(1, session("a")), (5, trap(1, vm="a"))])
        second = write_file(tmp_path / "b.mcap", [(2, session("b")), (3, trap(1, vm="b"))])
        found = edited(tmp_path, first, second)
        assert [(time, message.vm) for time, message in found] == [
            (1, "a"), (2, "b"), (3, "b"), (5, "a")
        ]  # fmt: skip

    def test_of_two_vms_with_one_name_is_refused(self, tmp_path):
        first = write_file(tmp_path / "a.mcap", [(1, session()), (5, trap(1))])
        second = write_file(tmp_path / "b.mcap", [(2, trap(1))])
        with pytest.raises(ConfigError, match=r"b\.mcap: has a VM 'vm', and so has .*a\.mcap"):
            edited(tmp_path, first, second)
        assert not (tmp_path / "edited.mcap").exists()

    def test_joins_the_parts_of_a_recording(self, tmp_path):
        told = msgspec.structs.replace(session(), started="2026-01-01")
        later = msgspec.structs.replace(told, part=2)
        access = MemoryAccess("vm", 1, 0, 1, b"x")
        first = write_file(tmp_path / "1.mcap", [(1, told), (2, trap(1)), (3, trap(2))])
        second = write_file(
            tmp_path / "2.mcap",
            [(4, later), (4, trap(1)), (4, Note("lost", "?", "vm", 1)), (4, trap(2))],
            [(4, Note("lost", "?", "vm", 2)), (5, access), (6, reply(1)), (7, trap(3))],
        )
        whole = [(1, told), (2, trap(1)), (3, trap(2)), (5, access), (6, reply(1)), (7, trap(3))]
        assert edited(tmp_path, first, second) == whole
        assert edited(tmp_path, second, first) == whole

    def test_joins_what_was_split_by_time(self, tmp_path):
        for seed in range(5):
            messages = random_recording(Random(seed))
            messages = [(time or SECOND, started(each)) for time, each in messages]
            path = write_file(tmp_path / f"{seed}.mcap", messages)
            done = edit([path], tmp_path / "t.mcap", EditOptions(split=15 * SECOND))
            found = edited(tmp_path, *map(Path, done.files))
            assert found == messages, seed
            for name in done.files:
                Path(name).unlink()


def started(message):
    if type(message) is not Session:
        return message
    return msgspec.structs.replace(message, started="2026-01-01")


def is_gap(message):
    return isinstance(message, Note) and message.kind == "lost"


class TestCounts:
    def test_of_the_end_are_those_that_are_kept(self, tmp_path):
        end = Note("end", "3 traps", "vm", counts={"handled": 2, "failed": 1, "native": 7})
        messages = [(1, session()), (2, trap(1)), (3, reply(1)), (4, trap(2)), (5, reply(2)),
                    (6, trap(3)), (7, reply(3, OutcomeKind.FAILED)), (8, end)]  # fmt: skip
        path = write_file(tmp_path / "run.mcap", messages)
        (_, note) = edited(tmp_path, path, selection=select(outcomes=["failed"]))[-1]
        assert note.text == "1 trap"
        assert {word: count for word, count in note.counts.items() if count} == {
            "failed": 1, "native": 7
        }  # fmt: skip


class TestDamage:
    def test_is_told_in_the_file(self, tmp_path):
        path = write_file(tmp_path / "run.mcap", [(1, trap(1)), (2, reply(1))])
        path.write_bytes(path.read_bytes()[:-1])
        (*_, (_, note)) = edited(tmp_path, path)
        assert (note.kind, "the file ends here" in note.text) == ("lost", True)


class TestALongRequest:
    @pytest.mark.parametrize("kind", [OutcomeKind.HANDLED, WAITING])
    def test_is_whole_whatever_lies_between(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(fates, "_MAX_LATE", 1)
        between = [(n, each) for n in range(3, 20) for each in (trap(n), reply(n))]
        last = [(21, trap(99)), (21, Note("retry", "", "vm", 99, 1)), (22, reply(99, retry_of=1))]
        late = MemoryAccess("vm", 1, 0, 1, b"x")
        messages = [(1, trap(1, vcpu=1)), (2, reply(1, WAITING)), *between, (20, late), *last]
        if kind is not WAITING:
            messages = [(1, trap(1, vcpu=1)), *between, (20, late), (22, reply(1))]
        path = write_file(tmp_path / "run.mcap", messages)
        found = edited(tmp_path, path, selection=select(vcpus=[1]))
        assert [each for each in found if not is_gap(each[1])] == [
            each for each in messages if each not in between
        ]


class TestBounds:
    def test_files_are_not_without_number(self, tmp_path, monkeypatch):
        for module in (keeping, editing):
            monkeypatch.setattr(module, "MAX_PIECES", 3)
        path = write_file(tmp_path / "run.mcap", [(1, trap(1)), (1000 * SECOND, trap(2))])
        with pytest.raises(ConfigError, match="more than 3 files"):
            edited(tmp_path, path, split=SECOND)
        chunk = [(1, trap(1, vm=str(number))) for number in range(5)]
        path = write_file(tmp_path / "vms.mcap", chunk)
        with pytest.raises(ConfigError, match="more than 3 files"):
            edited(tmp_path, path, split="vm")
        assert len(list(tmp_path.iterdir())) == 2

    def test_messages_are_not_without_number(self, tmp_path, monkeypatch):
        monkeypatch.setattr(keeping, "_MAX_MESSAGES", 3)
        path = write_file(tmp_path / "run.mcap", [(n, trap(n)) for n in range(5)])
        with pytest.raises(RecordingReadError, match="more than 3 messages"):
            edited(tmp_path, path, selection=select(vcpus=[0]))

    def test_requests_that_wait_are_forgotten_one_by_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr(keeping, "_MAX_WAITING", 2)
        messages = [(n, each) for n in range(1, 9) for each in (trap(n), reply(n, WAITING))]
        path = write_file(tmp_path / "run.mcap", messages)
        assert edited(tmp_path, path, selection=select(vcpus=[0])) == messages


def test_the_law_has_requests_that_wait():
    """Without them, whole requests would be single traps."""
    recordings = [requests_of(random_recording(Random(seed))) for seed in range(25)]
    assert max(len(traps) for requests in recordings for traps in requests.values()) > 2


def test_a_part_is_replayed_with_no_difference(tmp_path):
    whole, part = tmp_path / "run.mcap", tmp_path / "part.mcap"
    replay_parts.record(whole, replay_parts.everything)
    edit([whole], part, EditOptions(select(requests=["probe"]), {"vm": "other"}))
    result = replay_parts.replay(part, vm="other")
    assert (result.different, result.compared > 3) == (0, True)
    assert result.compared < replay_parts.replay(whole).compared
