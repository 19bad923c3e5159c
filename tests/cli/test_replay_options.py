"""`vmibridge replay`: several recordings, what is compared, and what comes of it."""

import json
from typing import NamedTuple
from xml.etree import ElementTree

import anyio
import msgspec
import pytest
from children import run as run_child
from probe_guest import command

from vmibridge import Bridge, BridgePacket, BridgeServer
from vmibridge.cli import main
from vmibridge.config import Config, load_handlers
from vmibridge.recording import Recorder, RecordingReader
from vmibridge.recording.messages import SESSION
from vmibridge.testing import FakeGuest

SOURCE = """
import msgspec
from vmibridge import BridgeHandler, BridgeResponse, method

class Probe(BridgeHandler[dict[str, int]]):
    MAGIC = 0x12345678
    REQUEST = 0x0100

    class Settings(msgspec.Struct):
        step: int = 1

    def __init__(self, settings):
        self.step = settings.step
        self.count = 0

    @method(1)
    async def sum(self, vmi, packet):
        self.count += self.step
        return BridgeResponse(self.count).with_output({"n": self.count, "id": id(self)})

    @method(2)
    async def five(self, vmi, packet):
        return BridgeResponse(5)
"""
WRONG = SOURCE.replace("self.count += self.step", "self.count += self.step + (self.count == 2)")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def write_source(folder):
    folder.mkdir()
    path = folder / "probe_options.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def source(tmp_path):
    """The handlers that are recorded."""
    return write_source(tmp_path / "then")


@pytest.fixture
def now(tmp_path):
    """The handlers that are replayed: in another folder, as this process reads each file once."""
    return write_source(tmp_path / "now")


@pytest.fixture
def record(tmp_path, source):
    """`record(NAME)` records ten requests of a VM, in a folder."""

    def record(name="runs/a.mcap", vms=("vm",), calls=(1, 2) * 5, config=""):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)

        async def guest(vm):
            for code in calls:
                await vm.call(BridgePacket(0x12345678, 0x0100, code))

        def bridge(_vm):
            return Bridge(*load_handlers([str(source)], Config("", config)))

        async def main():
            async with Recorder(path) as recorder:
                for vm in vms:
                    async with FakeGuest(guest, vm=vm) as backend:
                        async for _ in BridgeServer([backend], bridge, taps=[recorder]).run():
                            pass

        anyio.run(main)
        return path

    return record


@pytest.fixture
def replay(now, capsys):
    """The command in this process."""

    def replay(*arguments):
        given = ["replay", *arguments, "--handlers", now, "--ignore", "output.id"]
        status = main([str(each) for each in given])
        return Done(status, *capsys.readouterr())

    return replay


def test_folders_and_files_are_replayed_in_one_call_each_with_new_handlers(
    record, replay, tmp_path
):
    a, b, c = record("runs/a.mcap"), record("runs/b.mcap"), record("more/c.mcap")
    (tmp_path / "runs" / "notes.txt").write_text("no recording")
    done = replay(tmp_path / "runs", c, a)
    assert (done.returncode, done.stderr) == (0, "")
    told = [line for line in done.stdout.splitlines() if not line.startswith("ignored")]
    assert told == [
        *(f"{path}: 10 requests compared, 0 different" for path in (a, b, c)),
        "3 recordings: 30 requests compared, 0 different",
    ]


@pytest.mark.parametrize(("text", "status", "different"), [(SOURCE, 2, 0), (WRONG, 1, 3)])
def test_one_that_cannot_be_read_does_not_hide_the_others(
    record, replay, now, tmp_path, text, status, different
):
    good = record()
    bad = tmp_path / "bad.mcap"
    bad.write_bytes(b"no recording")
    now.write_text(text)
    done = replay(bad, good)
    assert done.returncode == status
    assert "bad.mcap: is not an MCAP file" in done.stderr
    told = "2 recordings, of which 1 cannot be replayed: 10 requests compared"
    assert f"{told}, {different} different" in done.stdout


def test_findings_are_told_the_first_in_front(record, replay, now):
    path = record()
    now.write_text(WRONG)
    done = replay(path)
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if not line.startswith("ignored")]
    assert told[-5:] == [
        "2 findings, the one that began first in front:",
        "  probe/sum value1: 3 requests, from trap 5 of vm vm: expected 0x3, got 0x4; +1 in each",
        "  probe/sum output.n: 3 requests, from trap 5 of vm vm: expected 3, got 4",
        "",
        f"{path}: 10 requests compared, 3 different",
    ]


def test_json_has_the_findings_with_the_counts(record, replay, now):
    a, b = record("runs/a.mcap"), record("runs/b.mcap")
    now.write_text(WRONG)
    done = replay(a, b, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    differences = [line for line in lines if "difference" in line]
    assert [(line["file"], line["difference"]["seq"]) for line in differences] == [
        (str(path), seq) for path in (a, b) for seq in (5, 7, 9)
    ]
    assert [line["file"]["path"] for line in lines if "path" in line.get("file", ())] == [
        str(a),
        str(b),
    ]
    last = lines[-1]["replay"]
    assert (last["compared"], last["different"], last["ignored"], last["same"]) == (20, 6, 4, False)
    assert [
        (each["method"], each["field"], each["count"], each["seq"]) for each in last["findings"]
    ] == [("sum", "value1", 3, 5), ("sum", "output.n", 3, 5)] * 2


@pytest.mark.parametrize(
    ("options", "compared", "different"),
    [
        (["--request", "0x100", "--method", "sum"], 5, 3),
        (["--from", "5", "--to", "6", "--vcpu", "0"], 2, 1),
        (["--limit", "4"], 4, 0),
        (["--fail-fast"], 5, 1),
        (["--since", "0", "--vm", "vm", "--outcome", "handled"], 10, 3),
    ],
)
def test_what_is_selected_is_compared(record, replay, now, options, compared, different):
    path = record()
    now.write_text(WRONG)
    done = replay(path, *options)
    assert done.returncode == (1 if different else 0)
    assert f"{path}: {compared} requests compared, {different} different" in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "nothing"], "there are methods 0x0001 (sum), 0x0002 (five)"),
        (["--from", "99"], "no trap matches from trap 99; there are traps 1 to 10"),
        (["--ignore", "value9"], "--ignore 'value9' is not a rule of what to ignore"),
        (["--rename", "vm"], "--rename 'vm': is not OLD=NEW"),
        (["--require", "0%"], "--require '0%': is not a share"),
        (["--accept"], "give -o FILE, too"),
        (["-o", "new.mcap"], "give -o FILE, too"),
        (["--vm", "other"], "no trap matches VM other; there are VMs vm"),
    ],
)
def test_what_compares_nothing_is_status_2_and_one_line(record, replay, options, told):
    done = replay(record(), *options)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_a_recording_is_told(replay, tmp_path):
    (tmp_path / "empty").mkdir()
    done = replay(tmp_path / "empty")
    assert done.returncode == 2
    assert "empty: there is not a recording in it (*.mcap)" in done.stderr


def test_a_share_that_is_required_is_told_when_it_is_not_reached(record, replay, tmp_path):
    one = record()
    assert replay(one, "--require", "100%").returncode == 0
    with_twice = tmp_path / "twice.mcap"
    with_twice.write_bytes(one.read_bytes() * 2)
    done = replay(with_twice, "--require", "50.1%")
    assert done.returncode == 1
    assert "50.0 % of 20 requests compared; 50.1 % are required" in done.stderr
    assert replay(with_twice, "--require", "50%").returncode == 0


def test_junit_has_a_suite_for_each_recording(record, replay, now, tmp_path):
    a, b = record("runs/a.mcap"), record("runs/b.mcap", calls=(2,))
    bad = tmp_path / "runs" / "c.mcap"
    bad.write_bytes(b"no recording")
    now.write_text(WRONG)
    report = tmp_path / "report.xml"
    report.write_text("of the run before")
    assert replay(tmp_path / "runs", "--junit", report).returncode == 1
    root = ElementTree.parse(report).getroot()
    assert root.attrib == {
        "name": "vmibridge replay", "tests": "4", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    assert [suite.get("name") for suite in root] == [str(a), str(b), str(bad)]
    cases = [
        (case.get("classname"), case.get("name"), [each.tag for each in case]) for case in root[0]
    ]
    assert cases == [
        ("probe", "sum", ["system-out", "failure"]),
        ("probe", "five", ["system-out"]),
    ]
    assert root[0][0][1].get("message").startswith("probe/sum value1: 3 requests, from trap 5")
    assert root[2][0][0].tag == "error"


def test_settings_of_then_that_are_missing_are_told(record, replay, tmp_path):
    path = record(config="[handlers.probe]\nstep = 2\n")
    done = replay(path)
    assert done.returncode == 1
    assert done.stderr == (
        "vmibridge: handler probe: its settings have changed since the recording: step was 2, is 1;"
        " give the configuration file of the recording with --config\n"
    )
    config = tmp_path / "c.toml"
    config.write_text('[handlers.probe]\nstep = 2\n[replay]\nignore = ["value1"]\n')
    done = replay(path, "--config", config)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_module_that_changed_is_told(record, replay, source, now):
    for path, step in ((source, 1), (now, 2)):
        path.write_text(f"import part_of_it\n{SOURCE}")
        path.with_name("part_of_it.py").write_text(f"STEP = {step}\n")
    done = replay(record())
    assert done.returncode == 0
    assert done.stderr == (
        "vmibridge: handler probe: a module that it imports has changed since the recording:"
        " part_of_it\n"
    )


def test_a_vm_may_have_another_name_now(record, replay):
    path = record(vms=("web", "db"))
    done = replay(path, "--rename", "web=front", "--vm", "web", "--ignore", "/value./", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["replay"]["compared"] == 10


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("gone=x", "--rename: there is no VM 'gone'; there are 'web', 'db'"),
        ("web=db", "--rename: both 'web' and 'db' would be called 'db'"),
    ],
)
def test_a_wrong_name_is_one_line(record, replay, pair, told):
    done = replay(record(vms=("web", "db")), "--rename", pair)
    assert (done.returncode, done.stderr) == (2, f"vmibridge: {told}\n")


def test_new_answers_with_another_name_are_for_that_name(record, replay, now, tmp_path):
    path, new = record(vms=("web",)), tmp_path / "new.mcap"
    now.write_text(WRONG)
    done = replay(path, "--accept", "--rename", "web=front", "-o", new)
    assert "are named as before: replay it with the same --rename" in done.stderr
    assert replay(new, "--rename", "web=front").returncode == 0


def test_a_new_recording_may_go_to_standard_output(record, replay, now, tmp_path):
    path = record()
    now.write_text(WRONG)
    line = '"$@" -o - > new.mcap'
    words = command("replay", str(path), "--handlers", str(now), "--accept")
    done = run_child(["bash", "-c", line, "sh", *words], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{path}: 10 requests compared" in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir() if each.name == "-") == []
    assert replay(tmp_path / "new.mcap").returncode == 0


def test_a_report_is_a_file(record, replay):
    done = replay(record(), "--junit", "-")
    assert (done.returncode, done.stderr) == (
        2,
        "vmibridge: --junit -: is to be the name of a file\n",
    )


def test_what_an_edited_recording_lacks_is_told(record, replay, vmibridge, tmp_path):
    path, part = record(), tmp_path / "part.mcap"
    assert vmibridge("edit", str(path), "--method", "2", "-o", part).returncode == 0
    done = replay(part)
    assert "vm vm: the recording says: missing before this: " in done.stderr


@pytest.mark.parametrize("is_shared", [False, True])
def test_vms_that_an_edited_recording_lacks_are_told_where_a_handler_is_shared(
    record, replay, now, vmibridge, tmp_path, is_shared
):
    path, part = record(vms=("web", "db")), tmp_path / "part.mcap"
    assert vmibridge("edit", str(path), "--vm", "db", "-o", part).returncode == 0
    if is_shared:
        now.write_text(SOURCE.replace("    REQUEST =", "    shared = True\n    REQUEST ="))
    done = replay(part)
    told = "vm db: the recording says: missing of this recording: VMs web, and what handlers that"
    assert (told in done.stderr) is is_shared


def test_answers_of_now_make_a_new_recording(record, replay, now, tmp_path):
    path, new = record(), tmp_path / "new.mcap"
    now.write_text(WRONG)
    done = replay(path, "--accept", "--method", "sum", "-o", new, "--junit", tmp_path / "x.xml")
    assert done.returncode == 0, done.stderr
    assert f"{new}: a new recording, with 3 new answers" in done.stderr
    assert ElementTree.parse(tmp_path / "x.xml").getroot().get("failures") == "0"
    done = replay(new, "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{new}: 10 requests compared, 0 different" in done.stdout
    assert replay(path, "--accept", "-o", new).returncode == 2
    with RecordingReader(new) as reader:
        ((_, session),) = reader.messages(SESSION)
    assert msgspec.json.decode(session.handlers[0].settings) == {"step": 1}


def test_it_stops_before_a_handler_with_the_answer_of_then(record, replay):
    path = record()
    done = replay(path, "--break", "5", "--break", "method == 2 and value1 == 0 and seq > 9")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "break before probe/sum: trap 5 of vm vm, vcpu 0",
        "  asked     magic 0x12345678 request 0x0100 method 0x0001",
        "  values    0x0 0x0 0x0 0x0",
        "  expected  handled: 0x3 . . .",
        done.stderr.splitlines()[4],
        "break before probe/five: trap 10 of vm vm, vcpu 0",
        "  asked     magic 0x12345678 request 0x0100 method 0x0002",
        "  values    0x0 0x0 0x0 0x0",
        "  expected  handled: 0x5 . . .",
    ]
    assert done.stderr.splitlines()[4].startswith('  output    {"id":')


def test_the_names_of_a_place_are_known_in_every_part_of_it(record, replay):
    done = replay(record(), "--break", "any(seq == each + 4 * method for each in (1, 99))")
    assert done.returncode == 0
    assert done.stderr.startswith("break before probe/sum: trap 5 of vm vm, vcpu 0\n")


def test_a_place_where_it_never_stopped_is_told(record, replay):
    done = replay(record(), "--break", "999", "--break", "method == 7")
    assert (done.returncode, done.stderr.splitlines()) == (
        0,
        [
            f"vmibridge: --break {text!r}: no handler was asked there"
            for text in ("999", "method == 7")
        ],
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--break", "x == 1"], "NameError: name 'x' is not defined; it may name seq, vm,"),
        (["--break", "1 +"], "is neither a number nor an expression"),
        (["--pdb"], "--pdb says what to do at a --break"),
    ],
)
def test_a_wrong_place_to_stop_is_one_line(record, replay, options, told):
    done = replay(record(), *options)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "compared", "different"),
    [("p 'count', self.count\nself.count = 7\nc\n", 10, 3), ("q\n", 4, 0)],
)
def test_in_pdb_it_stops_in_the_handler(
    record, vmibridge, now, tmp_path, typed, compared, different
):
    # In a process of its own: a debugger takes the place of what measures coverage.
    path, keys = record(), tmp_path / "keys"
    keys.write_text(typed)
    given = ("--handlers", now, "--ignore", "output.id", "--break", "5", "--pdb")
    with keys.open() as typing:
        done = vmibridge("replay", path, *given, stdin=typing)
    assert ("('count', 2)" in done.stderr) is ("'count'" in typed)
    assert "-> self.count += self.step" in done.stderr
    told = f"{path}: {compared} requests compared, {different} different"
    assert told in done.stdout, done.stderr


WAITS = """
import anyio
from vmibridge import BridgeHandler, BridgeResponse, method

class Probe(BridgeHandler[object]):
    MAGIC = 0x12345678
    REQUEST = 0x0100

    def __init__(self):
        self.count = 0

    @method(1)
    async def sum(self, vmi, packet):
        await anyio.sleep(0.001)
        self.count += 2
        await anyio.sleep(0.004)
        self.count += 1
        return BridgeResponse(self.count)

    @method(2)
    async def five(self, vmi, packet):
        return BridgeResponse(5)
"""
NEVER_THE_SAME = WAITS.replace(
    "self.count += 2", "self.count += id(object()) + __import__('time').time_ns()"
)


@pytest.mark.parametrize("loop", [[], ["--uvloop"], ["--async-backend", "trio"]])
def test_answers_of_handlers_that_wait_now_replay_the_same(record, replay, now, tmp_path, loop):
    path, new = record(), tmp_path / "new.mcap"
    now.write_text(WAITS)
    done = replay(path, *loop, "--accept", "-o", new)
    assert done.returncode == 0
    assert "different again" not in done.stderr
    assert replay(new, *loop).returncode == 0


@pytest.mark.parametrize("loop", [[], ["--uvloop"], ["--async-backend", "trio"]])
def test_a_new_recording_that_does_not_replay_the_same_is_told(record, replay, now, tmp_path, loop):
    path, new = record(), tmp_path / "new.mcap"
    now.write_text(NEVER_THE_SAME)
    done = replay(path, *loop, "--accept", "-o", new)
    assert done.returncode == 0
    assert f"{new}: replayed once more, " in done.stderr
    assert "of it are different again: trap 1 of vm vm" in done.stderr
    assert "(value1)" in done.stderr
    assert replay(new, *loop).returncode == 1
