"""The plugin of pytest, in a folder of a user: marks, reports, updates, workers."""

import os
import sys
from textwrap import dedent

import pytest
from children import run
from replay_parts import everything, record

PLUGINS = ("-p", "vmibridge.pytest_plugin", "-p", "anyio", "-p", "no:cacheprovider")
HANDLERS = """
from vmibridge import Bridge, BridgeHandler, BridgeResponse, method

class Probe(BridgeHandler):
    MAGIC, REQUEST, VERIFY_VALUE4, name = 0x1234_5678, 1, 0x5747, "probe"
    MORE = 0

    def __init__(self):
        self.asked = []

    @method(1)
    async def add(self, vmi, packet):
        self.asked.append(packet.value1)
        now = packet.value1 + 1 + self.MORE
        return BridgeResponse(value1=now).with_output({"sum": now})

class Changed(Probe):
    MORE, name = 1, "probe"

class Needy(Probe):
    name = "probe"

    def __init__(self, table):
        super().__init__()

class Loud(Probe):
    name = "probe"

    async def handle(self, vmi, packet):
        print("the handler says", packet.value1)
        return await super().handle(vmi, packet)
"""
ADDS = 'requests=1, methods="add"'


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    made = tmp_path_factory.mktemp("recorded") / "run.mcap"
    record(made, everything)
    return made.read_bytes()


@pytest.fixture
def folder(tmp_path, recorded):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/run.mcap").write_bytes(recorded)
    (tmp_path / "tests/handlers.py").write_text(HANDLERS)
    return tmp_path


def run_pytest(folder, *arguments, test=None):
    if test is not None:
        text = f"import pytest\nfrom handlers import *\n\n{dedent(test)}"
        (folder / "tests/test_it.py").write_text(text)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    # The others that are installed here take most of the time of a start.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", *PLUGINS, *arguments]
    return run(command, cwd=folder, env=environment)


def outcome(done):
    """The last line, without its time."""
    return done.stdout.strip().splitlines()[-1].rpartition(" in ")[0]


def test_on_each_loop_it_is_played_in_steps_and_the_rest_is_played_after_it(folder):
    done = run_pytest(
        folder,
        test=f"""
        @pytest.fixture(params=["asyncio", ("asyncio", {{"use_uvloop": True}}), "trio"])
        def anyio_backend(request):
            return request.param

        @pytest.mark.anyio
        @pytest.mark.recording("run.mcap", Probe, {ADDS})
        async def test_steps(replay, anyio_backend_name):
            await replay.until(2)
            assert replay.handler(Probe).asked == [0, 1]

        @pytest.mark.anyio
        @pytest.mark.recording("run.mcap", Changed, {ADDS})
        async def test_changed(replay):
            await replay.until(1)

        @pytest.mark.recording("run.mcap", Probe, {ADDS})
        def test_without_a_loop(replay):
            assert replay.play().compared == 3
        """,
    )
    assert outcome(done) == "3 failed, 4 passed", done.stdout


def test_a_failing_replay_is_reported_as_the_command_does(folder):
    done = run_pytest(
        folder,
        test=f"""
        @pytest.mark.recording("run.mcap", Changed, {ADDS})
        def test_changed(replay):
            pass
        """,
    )
    assert outcome(done) == "1 failed", done.stdout
    for line in (
        "first difference: trap 1 of vm vm, vcpu 0, 0.000000 s into the recording",
        "  value1    expected  0x1",
        "            got       0x2",
        "  probe/add value1: 3 requests, from trap 1 of vm vm: expected 0x1, got 0x2; +1 in each",
        "run.mcap: 3 requests compared, 3 different",
        "handler probe: replay_parts.py has changed since the recording",
    ):
        assert line in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
    assert "pytest_plugin.py" not in done.stdout


def test_a_test_that_fails_by_itself_shows_the_report_too(folder):
    done = run_pytest(
        folder,
        test=f"""
        @pytest.mark.recording("run.mcap", Loud, {ADDS})
        def test_it(replay):
            replay.play()
            assert replay.difference is not None, "on purpose"
        """,
    )
    assert outcome(done) == "1 failed", done.stdout
    assert "AssertionError: on purpose" in done.stdout
    assert "the handler says 2" in done.stdout
    assert "run.mcap: 3 requests compared, 0 different" in done.stdout


def test_however_a_test_ends_by_itself_its_report_is_shown(folder):
    done = run_pytest(
        folder,
        "-rsx",
        test=f"""
        import anyio
        pytestmark = pytest.mark.recording("run.mcap", Changed, {ADDS})

        def test_fail(replay):
            replay.play()
            pytest.fail("by hand")

        def look_at(replay):
            replay.play()
            raise BaseExceptionGroup("of a task group", [SystemError("lost")])

        def test_group(replay):
            look_at(replay)

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
        async def test_in_a_task(replay):
            async def look():
                await replay.until(2)
                pytest.fail("in a task")

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(look)

        def test_skip(replay):
            pytest.skip("not today")

        def test_xfail(replay):
            pytest.xfail("known")

        @pytest.mark.xfail(reason="its answers have changed", strict=True)
        def test_marked_xfail(replay):
            pass
        """,
    )
    assert outcome(done) == "4 failed, 1 skipped, 2 xfailed", done.stdout
    assert done.stdout.count(" Captured replay call ") == 4, done.stdout
    assert done.stdout.count("run.mcap: 3 requests compared, 3 different") == 2
    assert done.stdout.count("run.mcap: 2 requests compared, 2 different") == 2


# At the start of a line: in CI pytest's summary has the whole of it once more.
WITHOUT = "a test with @pytest.mark.recording has the fixture `replay`"


def test_what_is_wrong_is_told_in_a_line(folder):
    wrong = {
        f'"none.mcap", Probe, {ADDS}': "none.mcap: ",
        '"run.mcap", Probe, requests=0x55': "no trap matches request 0x0055; there are requests",
        '"run.mcap", Probe, vms="web"': "has no VM 'web'",
        '"run.mcap", Probe, ignore="nonsense"': "is not a rule of what to ignore",
        '"run.mcap"': "a replay has at least one handler",
        "": "`replay` is of a test with @pytest.mark.recording",
        "5, Probe": "`replay` is of a test with @pytest.mark.recording",
        '"run.mcap", "b.mcap", lambda vm: Probe()': "'b.mcap' is no handler: a replay takes",
        '"run.mcap", lambda: Probe()': "is called with the name of a VM: too many positional",
        '"run.mcap", Needy': "Needy is called with no arguments: missing a required",
        '"run.mcap", lambda vm: 5': "made no handler for vm vm, but int",
        '"run.mcap", Probe, nosuch=1': "Replay() has no keyword 'nosuch'",
        '"run.mcap", Probe, timeout=-1.0': "timeout must be above 0 seconds, got -1.0",
        '"run.mcap", Probe, queue="5"': "queue: expected `int`, got `str`",
        '"run.mcap", Probe, order="wild"': "order is recorded or vcpu, not 'wild'",
        '"run.mcap", Probe, loop="uvloop"': "loop is asyncio or trio, not 'uvloop'",
        '"run.mcap", Probe, first="2"': "first: expected `int | None`, got `str`",
        '"run.mcap", Probe, rename={"web": "b"}': "rename: there is no VM 'web'; there are 'vm'",
        '"run.mcap", Probe, since="tomorrow"': "'tomorrow' is not a time",
    }
    tests = [
        f"@pytest.mark.recording({mark})\ndef test_{number}(replay): pass\n"
        for number, mark in enumerate(wrong)
    ]
    # These have the mark alone, and would compare nothing.
    asked = ("Probe", "Probe()", "lambda vm: Probe()", "Bridge(Probe())")
    alone = [
        f'@pytest.mark.recording("run.mcap", {each})\ndef test_alone_{number}(): pass\n'
        for number, each in enumerate(asked)
    ]
    done = run_pytest(folder, test="\n".join([*tests, *alone]))
    assert outcome(done) == f"1 failed, {len(wrong) - 1 + len(alone)} errors", done.stdout
    assert done.stdout.count(f"\n{WITHOUT}") == len(alone), done.stdout
    for why in wrong.values():
        assert why in done.stdout, done.stdout
    assert "The above exception" not in done.stdout
    assert "Traceback" not in done.stdout
    assert "pytest_plugin.py" not in done.stdout


def test_a_test_has_one_recording(folder):
    done = run_pytest(
        folder,
        test="""
        @pytest.mark.recording("run.mcap", Probe)
        @pytest.mark.recording("none.mcap", Probe)
        def test_two(replay):
            pass

        @pytest.mark.recording("none.mcap", Probe)
        class TestIt:
            @pytest.mark.recording("run.mcap", Probe)
            def test_of_its_class_too(self, replay):
                pass
        """,
    )
    assert outcome(done) == "2 errors", done.stdout
    assert done.stdout.count("\na test replays one recording, and this one has 2 marks") == 2
    assert "pytest_plugin.py" not in done.stdout


def test_handlers_of_fixtures_and_test_cases_of_unittest(folder):
    done = run_pytest(
        folder,
        test=f"""
        import unittest

        @pytest.fixture
        def replay_handlers(tmp_path):
            assert tmp_path.is_dir()
            return [Probe()]

        @pytest.mark.recording("run.mcap", {ADDS})
        def test_it(replay):
            pass

        class TestIt(unittest.TestCase):
            @pytest.fixture
            def replay_handlers(self):
                return [Changed()]

            @pytest.mark.recording("run.mcap", {ADDS})
            @pytest.mark.usefixtures("replay")
            def test_it(self):
                pass
        """,
    )
    assert outcome(done) == "1 failed, 1 passed", done.stdout
    assert "3 requests compared, 3 different" in done.stdout


class TestUpdate:
    CHANGED = f"""
    @pytest.mark.recording("run.mcap", Changed, {ADDS})
    def test_changed(replay):
        assert replay.play().different == 0
        assert replay.difference is None
    """

    def test_accepts_and_a_second_time_changes_nothing(self, folder, recorded):
        file = folder / "tests/run.mcap"
        assert outcome(run_pytest(folder, test=self.CHANGED)) == "1 failed"
        assert file.read_bytes() == recorded
        done = run_pytest(folder, "--recording-update")
        assert outcome(done) == "1 passed", done.stdout
        assert "tests/run.mcap: updated, with 3 answers of now" in done.stdout
        updated = file.read_bytes()
        assert updated != recorded
        assert outcome(run_pytest(folder)) == "1 passed"
        done = run_pytest(folder, "--recording-update")
        assert "none was updated" in done.stdout
        assert file.read_bytes() == updated
        assert sorted(each.name for each in file.parent.glob("*.mcap*")) == ["run.mcap"]

    def test_writes_nothing_for_a_test_that_fails(self, folder, recorded):
        done = run_pytest(
            folder,
            "--recording-update",
            test=f"""
            @pytest.mark.recording("run.mcap", Changed, {ADDS})
            def test_changed(replay):
                assert replay.handler(Changed).asked
            """,
        )
        assert outcome(done) == "1 failed", done.stdout
        assert (folder / "tests/run.mcap").read_bytes() == recorded

    def test_tells_which_tests_contradict_each_other(self, folder):
        done = run_pytest(
            folder,
            "--recording-update",
            test=f"""
            @pytest.mark.recording("run.mcap", Probe, {ADDS})
            def test_as_it_was(replay):
                pass

            @pytest.mark.recording("run.mcap", Changed, {ADDS}, last=1)
            def test_one_is_changed(replay):
                pass

            @pytest.mark.recording("run.mcap", Changed, {ADDS}, first=2)
            def test_others_are_changed(replay):
                pass
            """,
        )
        assert outcome(done) == "3 passed", done.stdout
        told = [line for line in done.stdout.splitlines() if "has other answers" in line]
        of = "tests/run.mcap: tests/test_it.py::"
        than = "than tests/test_it.py::test_as_it_was"
        assert [line.split(", which")[0] for line in told] == [
            f"{of}test_one_is_changed has other answers to 1 request {than}",
            f"{of}test_others_are_changed has other answers to 2 requests {than}",
        ]

    def test_workers_update_one_file_one_after_another(self, folder):
        """Each test accepts one request: what another worker has accepted is not lost."""
        (folder / "tests/conftest.py").write_text("import handlers\n")
        done = run_pytest(
            folder,
            *("--recording-update", "-p", "xdist", "-n", "3", "--dist", "load"),
            test="""
            @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
            @pytest.mark.parametrize("seq", [
                pytest.param(seq, marks=pytest.mark.recording(
                    "run.mcap", Changed, first=seq, last=seq))
                for seq in (1, 2, 3)
            ])
            @pytest.mark.anyio
            async def test_changed(replay, seq):
                await replay.run()
            """,
        )
        assert outcome(done) == "6 passed", done.stdout
        assert done.stdout.count("tests/run.mcap: updated, with 1 answer of now") == 3, done.stdout
        assert "has other answers" not in done.stdout
        assert outcome(run_pytest(folder, test=self.CHANGED)) == "1 passed"


class TestOthers:
    """Suites that do not use it."""

    def test_nothing_is_imported_for_them(self):
        code = (
            "import sys, vmibridge.pytest_plugin as plugin;"
            "print(*sorted(name for name in sys.modules if name.startswith('vmibridge')));"
            "assert not {'anyio', 'msgspec', 'mcap', 'trio'} & set(sys.modules)"
        )
        done = run([sys.executable, "-c", code])
        assert done.stdout == "vmibridge vmibridge.pytest_plugin\n", done.stderr

    def test_their_own_mark_and_fixture_are_left_alone(self, folder):
        done = run_pytest(
            folder,
            "--recording-update",
            test="""
            @pytest.fixture
            def replay():
                return "ours"

            @pytest.mark.recording("tape.wav")
            def test_mark():
                pass

            @pytest.mark.recording(lambda: None, "tape.wav")
            @pytest.mark.recording("tape.wav", "other.wav", 2)
            def test_marks():
                pass

            @pytest.mark.recording("tape.wav", speed=2)
            def test_fixture(replay):
                assert replay == "ours"
            """,
        )
        assert outcome(done) == "3 passed", done.stdout

    def test_the_mark_is_told(self, folder):
        assert "@pytest.mark.recording(path, *handlers" in run_pytest(folder, "--markers").stdout
