"""`vmibridge run --answers`: a guest is answered from a recording, and no handler runs."""

import pytest

HANDLERS = """
from vmibridge import StandardHandler, U32, method

class Counts(StandardHandler[int]):
    REQUEST = 0x100
    count = 0

    @method(1)
    async def add(self) -> U32:
        self.count += 1
        return self.count
"""

GUEST = """
    mov ebp, {times}
again:
    mov ecx, 0x42494d56
    mov edx, 0x10100
    vmcall
    dec ebp
    jnz again
    hlt
"""


@pytest.fixture
def run(tmp_path, image, vmibridge):
    """The guest asks so often; once with handlers, which is recorded."""

    def asked(times, *options):
        spec = f"unicorn:{image(GUEST.format(times=times))}"
        return vmibridge("run", "--backend", spec, *options)

    (tmp_path / "counts.py").write_text(HANDLERS)
    recorded = asked(2, "--handlers", "counts.py", "--record", "run.mcap")
    assert recorded.returncode == 0, recorded.stderr
    (tmp_path / "counts.py").unlink()
    return asked


@pytest.mark.parametrize("loop", [[], ["--async-backend", "trio"]], ids=str)
def test_the_guest_gets_what_it_got_then(run, loop):
    done = run(2, "--answers", "run.mcap", *loop)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:3]] == ["1", "2"]
    assert "run.mcap: 2 requests were answered from it, and 0 not in it" in done.stderr


@pytest.mark.parametrize(
    ("missing", "status", "outcome"),
    [([], 1, "rejected"), (["--missing", "refuse"], 0, "rejected")],
)
def test_what_is_not_in_it_is_told(run, missing, status, outcome):
    done = run(3, "--answers", "run.mcap", *missing)
    assert done.returncode == status
    assert outcome in done.stdout.splitlines()[3]
    assert "not in run.mcap: 42494d56/0100/0001 (0x0, 0x0, 0x0, 0x0): asked more" in done.stderr
    assert ("1 request was not in the recording" in done.stderr) == bool(status)


def test_the_recording_may_be_piped(tmp_path, image, vmibridge, run):
    spec = f"unicorn:{image(GUEST.format(times=2))}"
    with (tmp_path / "run.mcap").open() as recording:
        done = vmibridge("run", "--backend", spec, "--answers", "-", stdin=recording)
    assert done.returncode == 0, done.stderr
    assert "-: 2 requests were answered from it" in done.stderr


def test_what_is_cut_is_told_before_the_guest_runs(tmp_path, run):
    (tmp_path / "cut.mcap").write_bytes((tmp_path / "run.mcap").read_bytes()[:-200])
    done = run(2, "--answers", "cut.mcap")
    assert done.returncode == 0, done.stderr
    assert "is truncated" in done.stderr.splitlines()[0]
    assert done.stderr.startswith("WARNING")


def test_settings_of_handlers_are_not_used(tmp_path, run):
    (tmp_path / "own.toml").write_text("[handlers.counts]\nfrom = 3\n")
    done = run(2, "--answers", "run.mcap", "--config", "own.toml")
    assert done.returncode == 0, done.stderr
    assert "own.toml: [handlers.counts] is not used: the recording answers" in done.stderr


def test_a_guest_that_exits_does_so_again(image, vmibridge):
    code = """
    mov ecx, 0x42494d56
    mov edx, 0xffff0111
    mov r8d, 7
    xor r9d, r9d
    vmcall
    jmp $
    """
    line = ["run", "--backend", f"unicorn:{image(code)}"]
    recorded = vmibridge(*line, "--handlers", "vmibridge.handlers.exit", "--record", "exit.mcap")
    assert recorded.returncode == 7, recorded.stderr
    again = vmibridge(*line, "--answers", "exit.mcap")
    assert again.returncode == 7, again.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "give --handlers that answer, or a recording with --answers"),
        (["--missing", "native"], "--missing is about a recording: give --answers FILE, too"),
        (["--answers", "run.mcap", "--handlers", "x.py"], "--handlers do not go with it"),
        (["--answers", "run.mcap", "--reload"], "--reload is about handlers"),
        (["--answers", "none.mcap"], "none.mcap: No such file or directory"),
    ],
)
def test_options_that_do_not_go_together(run, options, why):
    done = run(1, *options)
    assert done.returncode == 2
    assert why in done.stderr
