"""`vmibridge run --record` and `vmibridge recover`: what is in the file, however the run ends.

A recording that is killed is a prefix of what happened: at most 1,000 traps and a fifth of a
second are missing.
"""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
from children import Child
from probe_guest import ENDLESS, calls, command, counted

from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.file.recover import recover
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.traps import recorded_traps

FLUSH_TRAPS = 1000
FLUSH_SECONDS = 0.2
SLACK = 0.3
STALL = 0.05
"""Seconds that a busy machine may hold up the thread that writes."""


def contents(path):
    """The sessions, traps and notes of a file that is whole."""
    with RecordingReader(path) as reader:
        messages = list(reader.messages())
        assert reader.complete
        assert reader.problems == []
    sessions, notes = ([m for _, m in messages if type(m) is kind] for kind in (Session, Note))
    return sessions, list(recorded_traps(messages)), notes


def run(image, handlers, *options, code=None):
    guest = f"unicorn:{image(code or calls(1, 2, 3, 5))}"
    return ["run", "--backend", guest, "--handlers", handlers, *options]


def told_by_json(lines):
    return [(each["seq"], each["outcome"], each["values"][0]) for each in map(json.loads, lines)]


def told_by_file(traps):
    return [(trap.event.seq, trap.reply.kind.value, trap.packet.value1) for trap in traps]


# --- a run that ends ----------------------------------------------------------------------


@pytest.mark.parametrize("loop", [["--async-backend", "trio"], ["--uvloop"], []], ids=str)
def test_the_file_holds_what_was_shown(vmibridge, image, handlers, tmp_path, loop):
    done = vmibridge(*run(image, handlers, "--json", "--record", "run.mcap", *loop))
    assert done.returncode == 0, done.stderr
    sessions, traps, notes = contents(tmp_path / "run.mcap")
    assert [each.vm for each in sessions] == ["vm"]
    assert told_by_file(traps) == told_by_json(done.stdout.splitlines()[:-1])
    assert [trap.reply.kind.value for trap in traps] == ["handled", "timeout", "failed", "handled"]
    assert [(note.kind, note.counts["handled"]) for note in notes] == [("end", 2)]
    # It may hold secrets of the guest.
    assert (tmp_path / "run.mcap").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_leaves_a_whole_file(children, image, handlers, tmp_path, number):
    arguments = run(image, handlers, "--json", "--record", "run.mcap", code=ENDLESS)
    with children.start(command(*arguments), cwd=tmp_path) as process:
        lines = [process.stdout.readline()]
        process.send_signal(number)
        rest, _ = process.communicate()
    assert process.returncode == 128 + number
    *lines, summary = [*lines, *rest.splitlines()]
    _, traps, notes = contents(tmp_path / "run.mcap")
    assert told_by_file(traps) == told_by_json(lines)
    assert len(traps) == json.loads(summary)["summary"]["total"]
    assert [note.kind for note in notes] == ["end"]


@pytest.mark.parametrize(
    ("rules", "values"),
    [
        ([], (0x5EC2E7, 0x5EC2E8)),
        (["value1"], (0, None)),
        (["0x0100:value1"], (0, None)),
        (["0x0101:value1", "memory"], (0x5EC2E7, 0x5EC2E8)),
        (["memory", "256:value1"], (0, None)),
    ],
)
def test_redaction(vmibridge, image, handlers, tmp_path, rules, values):
    options = [option for rule in rules for option in ("--redact", rule)]
    code = calls(1, value="0x5EC2E7")
    done = vmibridge(*run(image, handlers, "--json", "--record", "a.mcap", *options, code=code))
    assert done.returncode == 0, done.stderr
    # What is shown is not what is recorded.
    assert told_by_json(done.stdout.splitlines()[:-1]) == [(1, "handled", 0x5EC2E7)]
    (session,), (trap,), _ = contents(tmp_path / "a.mcap")
    assert (trap.packet.value1, trap.reply.writes.rax) == values
    assert len(session.redaction) == len(rules)


def test_in_a_folder_each_run_has_a_file_of_its_own(vmibridge, image, handlers, tmp_path):
    for number in (1, 2):
        done = vmibridge(*run(image, handlers, "--record", ".", code=calls(1, value=number)))
        assert done.returncode == 0, done.stderr
        assert f"run-{number}.mcap: 1 trap was recorded" in done.stderr
        _, (trap,), _ = contents(tmp_path / f"run-{number}.mcap")
        assert trap.packet.value1 == number


# --- a run that does not begin ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--record", "new.mcap", "--redact", "value9"], 2, "'value9' is not a redaction"),
        (["--record", "new.mcap", "--redact", "0x10000:memory"], 2, "is not a redaction"),
        (["--redact", "memory"], 2, "--redact is about a recording: give --record FILE, too"),
        (["--unrecorded", "stop"], 2, "--unrecorded is about a recording: give --record FILE, too"),
        (["--record", "old.mcap"], 1, "old.mcap: already exists"),
        (["--record", "none/new.mcap"], 1, "none/new.mcap: there is no folder none"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_guest_runs(
    vmibridge, image, handlers, tmp_path, options, status, told
):
    (tmp_path / "old.mcap").write_bytes(b"precious")
    done = vmibridge(*run(image, handlers, *options))
    assert done.returncode == status
    assert done.stdout == ""
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "old.mcap").read_bytes() == b"precious"
    assert not (tmp_path / "new.mcap").exists()


# --- a full disk --------------------------------------------------------------------------


def full_after(size):
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


ENDS_HERE = "run.mcap: the recording ends here: File too large"


@pytest.mark.no_cover
@pytest.mark.parametrize("options", [[], ["--unrecorded", "stop"]], ids=str)
def test_a_full_disk_stops_the_run(vmibridge, image, handlers, tmp_path, options):
    arguments = run(image, handlers, "--record", "run.mcap", *options, "--json", code=ENDLESS)
    done = vmibridge(*arguments, "--log-level", "warning", preexec_fn=full_after(90_000))
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("vmibridge: ")] == [
        f"vmibridge: {ENDS_HERE}"
    ]
    assert "Traceback" not in done.stderr
    kept = recover(tmp_path / "run.mcap", tmp_path / "clean.mcap")
    assert [problem.text for problem in kept.problems] == [
        "the file ends here: it is truncated, or was not finished"
    ]
    numbers = [trap.event.seq for trap in contents(tmp_path / "clean.mcap")[1]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


@pytest.mark.no_cover
def test_or_lets_it_go_on_unrecorded(vmibridge, image, handlers, tmp_path):
    code = counted(5000)
    arguments = run(image, handlers, "--json", "--record", "run.mcap", code=code)
    done = vmibridge(*arguments, "--unrecorded", "continue", preexec_fn=full_after(90_000))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["total"] == 5000
    assert f"{ENDS_HERE}; the run continues without a recording" in done.stderr
    lost = int(done.stderr.split("; ")[-1].split()[0])
    recover(tmp_path / "run.mcap", tmp_path / "clean.mcap")
    assert len(contents(tmp_path / "clean.mcap")[1]) + lost == 5000


@pytest.mark.no_cover
def test_no_room_at_all_is_told_before_the_guest_runs(vmibridge, image, handlers):
    arguments = run(image, handlers, "--record", "run.mcap")
    done = vmibridge(*arguments, preexec_fn=full_after(10))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vmibridge: run.mcap: File too large\n"


# --- vmibridge recover --------------------------------------------------------------------


@pytest.fixture
def recorded(vmibridge, image, handlers, tmp_path):
    assert vmibridge(*run(image, handlers, "--record", "run.mcap")).returncode == 0
    return tmp_path / "run.mcap"


@pytest.fixture
def truncated(recorded):
    recorded.write_bytes(recorded.read_bytes()[:-100])
    return recorded


def test_recover_tells_what_was_lost_and_what_is_kept(vmibridge, truncated, tmp_path):
    done = vmibridge("recover", "run.mcap", "-o", "clean.mcap")
    assert (done.returncode, done.stderr) == (0, "")
    problem, kept = done.stdout.splitlines()
    assert problem.startswith("run.mcap: at byte ")
    assert problem.endswith(": the file ends here: it is truncated, or was not finished")
    assert kept == "clean.mcap: 1 session, 4 traps, 4 replies, 2 notes, 3 steps kept"
    sessions, traps, notes = contents(tmp_path / "clean.mcap")
    assert (len(sessions), len(traps), [each.kind for each in notes]) == (1, 4, ["end", "lost"])


RECOVER = "what can be read of it: vmibridge recover run.mcap -o run-clean.mcap"


@pytest.mark.parametrize(
    "line",
    [
        ["export", "{}", "--to", "jsonl", "-o", "-"],
        ["diff", "{}", "whole.mcap"],
        ["run", "--backend", "unicorn:{image}", "--answers", "{}", "--exit-zero"],
    ],
    ids=lambda line: line[0],
)
def test_each_reader_of_a_truncated_file_names_recover(vmibridge, image, recorded, line):
    shutil.copy(recorded, recorded.with_name("whole.mcap"))
    recorded.write_bytes(recorded.read_bytes()[:-100])
    words = {"image": image(calls(1, 2))}
    done = vmibridge(*(word.format("run.mcap", **words) for word in line))
    (told,) = [each for each in done.stderr.splitlines() if "vmibridge recover" in each]
    assert told.endswith(f"run.mcap: the file is truncated; {RECOVER}")
    # What comes by a pipe has no name.
    with recorded.open() as piped:
        done = vmibridge(*(word.format("-", **words) for word in line), stdin=piped)
    assert "-: at byte" in done.stderr
    assert "vmibridge recover" not in done.stderr


def test_recover_as_json(vmibridge, truncated):
    done = vmibridge("recover", "run.mcap", "--output", "clean.mcap", "--json")
    told = json.loads(done.stdout)
    kinds = {"session": 1, "trap": 4, "memory": 0, "outside": 0, "reply": 4, "note": 2, "step": 3}
    assert told["messages"] == kinds
    assert (told["complete"], told["problem_count"], len(told["problems"])) == (False, 1, 1)


def test_a_whole_file_is_copied(vmibridge, recorded, tmp_path):
    done = vmibridge("recover", "run.mcap", "-o", "clean.mcap")
    assert done.stdout.splitlines() == [
        "run.mcap: is whole; there was nothing to recover",
        "clean.mcap: 1 session, 4 traps, 4 replies, 1 note, 3 steps kept",
    ]
    assert contents(tmp_path / "clean.mcap") == contents(recorded)


@pytest.mark.parametrize(
    ("source", "target", "status", "told"),
    [
        ("probe.py", "clean.mcap", 2, "probe.py: is not an MCAP file"),
        ("missing.mcap", "clean.mcap", 2, "missing.mcap: No such file or directory"),
        (".", "clean.mcap", 2, ".: Is a directory"),
        ("run.mcap", "probe.py", 2, "probe.py: already exists"),
        ("run.mcap", "run.mcap", 2, "run.mcap: already exists"),
        ("run.mcap", "none/clean.mcap", 1, "none/clean.mcap: there is no folder none"),
    ],
)
@pytest.mark.no_cover
def test_what_cannot_be_recovered_is_one_line(
    vmibridge, recorded, tmp_path, source, target, status, told
):
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    done = vmibridge("recover", source, "-o", target)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"vmibridge: {told}")
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


# --- kill -9 ------------------------------------------------------------------------------

# Tells each trap to a file of its own, which outlives the process, before it answers.
WITNESS = '''
import os
import time

from vmibridge import BridgeHandler, BridgeResponse

class Witness(BridgeHandler[None]):
    """Writes down what it was asked, and when."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    file = os.open("witness", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def handle(self, vmi, packet):
        os.write(self.file, b"%d %d\\n" % (packet.value1, time.monotonic_ns()))
        return BridgeResponse(value1=packet.value1)
'''

# Few traps, so that chunks are cut by their age alone.
PAUSE = 0.005
SLOW_WITNESS = WITNESS.replace("import os", "import os\nimport anyio").replace(
    "return", f"await anyio.sleep({PAUSE})\n        return"
)


def kill_while_recording(folder, guest, seconds, handler=WITNESS):
    """How many traps were witnessed and recorded, and what the missing ones' ages were."""
    folder.mkdir()
    (folder / "witness.py").write_text(handler)
    witness = folder / "witness"
    arguments = ["--backend", f"unicorn:{guest}", "--handlers", "witness.py", "--json"]
    line = command("run", *arguments, "--record", "run.mcap")
    with Child(line, stdout=subprocess.DEVNULL, cwd=folder) as process:
        while not (witness.exists() and witness.stat().st_size):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
    lines = [tuple(map(int, line.split())) for line in witness.read_text().splitlines()]
    assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
    recover(folder / "run.mcap", folder / "clean.mcap")
    sessions, traps, notes = contents(folder / "clean.mcap")
    assert [each.vm for each in sessions] == ["vm"]
    assert [note.kind for note in notes] == ["lost"]
    # From the first trap to the last, without a hole.
    assert [trap.event.seq for trap in traps] == list(range(1, len(traps) + 1))
    assert all(trap.packet.value1 == trap.event.seq for trap in traps)
    return len(lines), len(traps), ages_of([at for _, at in lines])[len(traps) :]


def ages_of(moments):
    """How old each trap was at the last one, in seconds in which the process ran.

    While a machine with other work stops it, it cannot write either: a longer pause between two
    traps counts as `STALL`.
    """
    age, ages = 0.0, [0.0]
    for earlier, later in reversed(list(pairwise(moments))):
        age += min((later - earlier) / 1e9, STALL)
        ages.append(age)
    return ages[::-1]


def check_kills(folder, guest, count, seed):
    moments = random.Random(seed)
    jobs = [(folder / str(number), moments.uniform(0.2, 1.2)) for number in range(count)]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda job: kill_while_recording(job[0], guest, job[1]), jobs))
    missing = [ages for _, _, ages in ends]
    assert max(map(len, missing)) <= FLUSH_TRAPS
    assert max(age for ages in missing for age in [0, *ages]) <= FLUSH_SECONDS + SLACK
    # Not each: a process may have had no time to get as far as the file.
    assert any(recorded for _, recorded, _ in ends)


def test_what_a_killed_run_has_recorded_is_a_prefix_of_what_happened(image, tmp_path):
    check_kills(tmp_path, image(ENDLESS), 8, seed=9)


def test_nor_do_traps_that_come_slowly_wait_for_others(image, tmp_path):
    for seconds in (1.0, 1.3):
        _, _, ages = kill_while_recording(
            tmp_path / str(seconds), image(ENDLESS), seconds, SLOW_WITNESS
        )
        # Each takes the pause at least, so on a busy machine there are fewer in this time.
        assert len(ages) <= (FLUSH_SECONDS + SLACK) / PAUSE


@pytest.mark.slow
def test_and_so_it_is_at_any_moment(image, tmp_path):
    check_kills(tmp_path, image(ENDLESS), 200, seed=200)
