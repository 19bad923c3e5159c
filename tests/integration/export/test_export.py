"""What holds for an export to any format: what it takes, and how its files come to be."""

import stat
import sys
from pathlib import Path

import pytest
from exports import export
from recorded_session import MAX_U64, reply, session, trap, write_file

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError, MissingExtraError, RecordingError
from vmibridge.recording.export import FORMATS, Export, target_of
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Note
from vmibridge.recording.selection import Selection
from vmibridge.vm.trap import RegisterWrites

# Numbers that no recorder writes, but that a file may hold.
HOSTILE = [
    (0, session("\0")),
    (MAX_U64, trap(-1, vm="\0", vcpu=-(1 << 63), value=-1)),
    (MAX_U64, MemoryAccess("\0", -1, -1, -1, None, True, "\x1b")),
    (
        0,
        reply(
            -1, vm="\0", writes=RegisterWrites(-1, -1, MAX_U64), retry_of=-1, duration=float("nan")
        ),
    ),
    (5, trap(MAX_U64, vcpu=MAX_U64, value=MAX_U64)),
    (1, reply(MAX_U64, OutcomeKind.WAITING, duration=float("inf"), retry_of=MAX_U64)),
    (9, Note("lost", "\0", None, -1, MAX_U64)),
]


class TestAnyFormat:
    @pytest.mark.parametrize("name", FORMATS)
    def test_takes_the_traps_that_are_selected(self, run, name, tmp_path):
        count, _ = export(run[0], name, tmp_path / "x", outcomes=["failed"], vms=["red"])
        assert count == sum(o.kind.value == "failed" and o.event.vm == "red" for o in run[1])

    @pytest.mark.parametrize("name", FORMATS)
    def test_numbers_of_a_file_end_no_export(self, name, tmp_path):
        path = write_file(tmp_path / "x.mcap", HOSTILE)
        assert export(path, name)[0] == 2

    @pytest.mark.parametrize("name", FORMATS)
    def test_a_recording_without_traps_makes_a_file(self, name, tmp_path):
        count, targets = export(write_file(tmp_path / "x.mcap", [(1, session())]), name)
        assert count == 0
        assert all(path.exists() for path in targets)

    @pytest.mark.parametrize("name", FORMATS)
    def test_what_can_be_read_of_a_damaged_file_is_there(self, name, tmp_path):
        path = write_file(tmp_path / "x.mcap", *[[(n, trap(n)), (n, reply(n))] for n in (1, 2, 3)])
        with RecordingReader(path) as reader:
            places = [offset for offset, _ in reader.chunks()]
        data = bytearray(path.read_bytes())
        data[places[1] + 60] ^= 0xFF
        path.write_bytes(data)
        assert export(path, name)[0] == 2

    @pytest.mark.parametrize("name", FORMATS)
    def test_is_for_its_owner_only_as_a_recording_is(self, exported, name):
        assert {stat.S_IMODE(path.stat().st_mode) for path in exported[name]} == {0o600}

    @pytest.mark.parametrize("name", FORMATS)
    def test_leaves_nothing_when_it_is_stopped(self, run, name, tmp_path):
        with RecordingReader(run[0]) as reader:
            job = Export(reader, name, tmp_path / "x", Selection()).write()
            next(job)
            assert {path.suffix for path in tmp_path.iterdir()} == {".part"}
            job.close()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", FORMATS)
    def test_never_takes_the_place_of_a_file(self, run, name, tmp_path):
        target = tmp_path / "x.out"
        target.write_text("mine")
        with pytest.raises(ConfigError, match="already exists"):
            export(run[0], name, target)

    @pytest.mark.parametrize("name", FORMATS)
    def test_nor_of_one_that_comes_up_meanwhile(self, run, name, tmp_path):
        with RecordingReader(run[0]) as reader:
            export = Export(reader, name, tmp_path / "x", Selection())
            job = export.write()
            next(job)
            export.targets[-1].write_text("mine")
            with pytest.raises(ConfigError, match="already exists"):
                list(job)
        assert list(tmp_path.iterdir()) == [export.targets[-1]]
        assert export.targets[-1].read_text() == "mine"

    @pytest.mark.parametrize("name", FORMATS)
    def test_does_without_links_where_there_are_none(self, run, name, tmp_path, monkeypatch):
        def hardlink_to(self, target):
            raise PermissionError

        monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
        _, targets = export(run[0], name, tmp_path / "x")
        assert sorted(tmp_path.iterdir()) == sorted(targets)

    @pytest.mark.parametrize("name", FORMATS)
    def test_tells_that_it_cannot_be_written(self, run, name, tmp_path):
        with pytest.raises(RecordingError, match=r"none/x.*: there is no folder"):
            export(run[0], name, tmp_path / "none" / "x")

    @pytest.mark.parametrize(
        ("name", "module"), [("perfetto", "perfetto.protos"), ("parquet", "pyarrow")]
    )
    def test_tells_which_extra_is_missing(self, run, name, module, monkeypatch):
        for loaded in [each for each in sys.modules if each.startswith(module)]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.delitem(sys.modules, f"vmibridge.recording.export.{name}", raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=f"the extra '{name}'"):
            target_of(run[0], name)
