"""`--quiet`, the output of images: failures, a line a minute, the summary, and no line a trap."""

import json
import os

import anyio
import pytest
from probe_guest import calls, counted
from waiting import until

from vmibridge import BridgePacket, Outcome, Registers, TrapEvent, TrapReason
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.cli import quiet_output
from vmibridge.cli.output import stream_writer
from vmibridge.cli.quiet_output import QuietWriter

PACKET = BridgePacket(0x42494D56, 0x100, 1)
FAILING = "".join(["mov r12d, 40\nagain:\n", calls(3, tail=""), "dec r12d\njnz again\nhlt"])


def run(vmibridge, image, handlers, code, *options, **more):
    spec = f"unicorn:{image(code)}"
    done = vmibridge(
        *("run", "--backend", spec, "--handlers", handlers, "--log-level", "error", *options),
        **more,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_shows_no_trap_that_was_answered(vmibridge, image, handlers):
    assert run(vmibridge, image, handlers, counted(300), "--quiet") == ["300 traps: 300 handled"]


def test_it_shows_failures_but_no_flood_of_them(vmibridge, image, handlers):
    *failures, summary = run(vmibridge, image, handlers, FAILING, "--quiet")
    assert summary == "40 traps: 40 failed"
    assert len(failures) == quiet_output._MAX_FAILURES
    assert all("RuntimeError: told to" in line for line in failures)


def test_in_json_the_same(vmibridge, image, handlers):
    *failures, last = run(vmibridge, image, handlers, FAILING, "--quiet", "--json")
    assert {json.loads(line)["outcome"] for line in failures} == {"failed"}
    assert json.loads(last)["summary"]["failed"] == 40


@pytest.mark.parametrize(
    ("variable", "options", "shown"),
    [("false", [], 1), ("0", [], 1), ("true", [], 7), ("false", ["--outcomes"], 7)],
    ids=str,
)
def test_an_image_asks_for_it_by_a_variable(
    vmibridge, image, handlers, monkeypatch, variable, options, shown
):
    monkeypatch.setenv("VMIBRIDGE_OUTCOMES", variable)
    assert len(run(vmibridge, image, handlers, counted(5), *options, env=None)) == shown


def outcome(kind, seq):
    event = TrapEvent(seq, TrapReason.VMCALL, Registers())
    return Outcome(kind, PACKET, event=event, error="told to")


@pytest.mark.anyio
@pytest.mark.parametrize("as_json", [False, True])
async def test_a_minute_has_a_line(tmp_path, monkeypatch, as_json):
    turn = anyio.Event()

    async def minute(seconds):
        nonlocal turn
        assert seconds == 60
        await turn.wait()
        turn = anyio.Event()

    monkeypatch.setattr(quiet_output, "sleep", minute)
    file = tmp_path / "out"
    with file.open("wb", buffering=0) as out:
        lines = stream_writer(out.fileno(), as_json=as_json)
        async with QuietWriter(lines, as_json=as_json) as writer:
            for seq in range(1, 31):
                kind = OutcomeKind.HANDLED if seq > 15 else OutcomeKind.TIMEOUT
                await writer.show(outcome(kind, seq))
            turn.set()
            await until(lambda: len(file.read_text().splitlines()) == 11)
            await writer.show(outcome(OutcomeKind.HANDLED, 31))
            turn.set()
            await until(lambda: len(file.read_text().splitlines()) == 12)
    first, second = file.read_text().splitlines()[-2:]
    if as_json:
        counts = json.loads(first)["minute"]
        assert {name: count for name, count in counts.items() if count} == {
            "handled": 15,
            "timeout": 15,
            "total": 30,
            "so_far": 30,
            "hidden": 5,
        }
        assert json.loads(second)["minute"]["so_far"] == 31
    else:
        told = "a minute: 30 traps: 15 handled, 15 timeout; 30 traps so far; 5 failures not shown"
        assert first == told
        assert second == "a minute: 1 trap: 1 handled; 31 traps so far"


@pytest.mark.anyio
async def test_a_reader_that_has_gone_ends_the_run(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(quiet_output, "_MINUTE", 0.001)
    try:
        async with QuietWriter(stream_writer(write, as_json=True), as_json=True) as writer:
            await until(lambda: writer._gone)
            with pytest.raises(BrokenPipeError):
                await writer.show(outcome(OutcomeKind.HANDLED, 1))
    finally:
        os.close(write)
