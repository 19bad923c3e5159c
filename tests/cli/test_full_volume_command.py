"""Recordings on a volume that is full, and files that are cut while handlers are reloaded."""

import json
import signal
import sys
from itertools import chain
from subprocess import DEVNULL

import pytest
from needs import own_namespaces
from probe_guest import ENDLESS, command, counted

from vmibridge.recording import RecordingReader, recorded_traps

pytestmark = pytest.mark.no_cover
VCPUS = 4

VOLUME = '''
"""In a namespace of its own: a command that records into a volume with little room in it.

There is more when the volume was full. With `endless` the command is stopped after that; with
`stopped` there is none, and it is stopped.
"""
import os, shutil, subprocess, sys

os.mkdir("volume")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", "volume"], check=True)
room = os.statvfs("volume")
with open("volume/other", "wb") as file:
    file.write(bytes(room.f_bavail * room.f_frsize - int(sys.argv[2])))
with subprocess.Popen(sys.argv[3:], stderr=subprocess.PIPE, text=True) as process:
    for line in process.stderr:
        sys.stderr.write(line)
        if "No space left on device: the guests are held" in line and sys.argv[1] == "stopped":
            process.terminate()
        elif "No space left on device" in line and sys.argv[1] != "stopped":
            os.truncate("volume/other", 0)
        if "there is room again" in line and sys.argv[1] == "endless":
            process.terminate()
shutil.copytree("volume", "kept")
sys.exit(process.returncode)
'''


@pytest.fixture
def recorded(children, image, handlers, tmp_path):
    """Run a guest of this code: status, the summary, what was logged, and the files."""
    (tmp_path / "volume.py").write_text(VOLUME)
    within = [*own_namespaces("--mount"), sys.executable, "volume.py"]

    def run(how, room, code, *options):
        line = ["run", "--backend", f"unicorn:{image(code)}", "--handlers", handlers]
        line += ["--record", "volume", "--quiet", "--json", *options]
        arguments = [*within, how, str(room), *command(*line)]
        with children.start(arguments, cwd=tmp_path) as process:
            out, told = process.communicate()
        summary = json.loads(out.splitlines()[-1])["summary"] if out else {}
        return process.returncode, summary, told, sorted((tmp_path / "kept").glob("*.mcap"))

    return run


def whole(path):
    """The numbers of the traps of a file, which is whole."""
    with RecordingReader(path) as reader:
        traps = list(recorded_traps(reader.messages()))
        assert (reader.problems, reader.complete) == ([], True), path
    return traps


@pytest.mark.parametrize("room", [0, 40_000], ids=["at the start", "later"])
def test_a_volume_that_is_full_holds_the_guest_and_the_command_goes_on(recorded, room):
    status, summary, told, files = recorded("ends", room, counted(2000))
    assert status == 0, told
    assert "No space left on device: the guests are held until there is room" in told
    assert ": nothing is missing, the guests go on" in told
    assert (summary["total"], summary["unrecorded"]) == (2000, 0)
    (file,) = files
    assert [trap.event.seq for trap in whole(file)] == list(range(1, 2001))


def test_or_the_guest_goes_on_and_the_gap_is_told(recorded):
    options = ["--unrecorded", "continue", "--exit-zero"]
    status, summary, told, files = recorded("endless", 40_000, ENDLESS, *options)
    assert status == 0, told
    assert "; the run continues without a recording, until there is room" in told
    lost = summary["unrecorded"]
    assert f"; {lost} traps were not recorded" in told
    before, behind = map(whole, files)
    assert len(before) + len(behind) + lost == summary["total"]
    assert behind[0].event.seq == len(before) + lost + 1


@pytest.mark.parametrize("more", [[], ["--rotate", "1M"], ["--exit-zero"]], ids=str)
def test_a_stop_while_guests_are_held_counts_what_is_lost_and_is_no_good_end(recorded, more):
    status, summary, told, files = recorded("stopped", 40_000, ENDLESS, *more)
    lost = summary["unrecorded"]
    assert lost > 0
    assert f"; {lost} trap" in told
    assert told.endswith("the recording ends here: No space left on device\n")
    assert status == 1
    (file,) = files
    with RecordingReader(file) as reader:
        kept = sum(1 for _ in recorded_traps(reader.messages()))
        assert not reader.complete
    assert kept + lost == summary["total"]


@pytest.mark.parametrize("loop", [[], ["--async-backend", "trio"]], ids=str)
def test_files_are_cut_and_handlers_reloaded_and_no_trap_is_lost(
    children, image, handlers, tmp_path, loop
):
    (tmp_path / "runs").mkdir()
    line = ["run", "--backend", f"unicorn:{image(ENDLESS)}?vcpus={VCPUS}", "--handlers", handlers]
    line += ["--record", "runs", "--rotate", "128K", "--quiet", "--exit-zero", *loop]
    cuts = reloads = 0
    with children.start(command(*line), cwd=tmp_path, stdout=DEVNULL) as process:
        for told in process.stderr:
            cut = "; it goes on in " in told
            cuts += cut
            reloads += ": handlers reloaded, for 1 running VM" in told
            # A reload may take as long as many cuts do.
            if cuts >= 6 and reloads >= 2:
                process.terminate()
                break
            if cut:
                process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 0
    files = sorted((tmp_path / "runs").glob("*.mcap"), key=lambda each: int(each.stem[4:]))
    assert len(files) > 6
    assert all(file.stat().st_size <= 128 << 10 for file in files)
    *before, last = [[trap.event.seq for trap in whole(file) if trap.reply] for file in files]
    answered = [*chain(*before), *last]
    # Each once, whichever file it is in.
    assert len({*answered}) == len(answered)
    # When it is stopped, a trap of each vCPU but one may have been overtaken, and not be answered.
    overtaken = {*range(1, max(answered) + 1)} - {*answered}
    assert len(overtaken) < VCPUS
    assert all(seq > max(*chain(*before)) - VCPUS for seq in overtaken)
