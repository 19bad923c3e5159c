"""`vmibridge replay` says so where it does not go on."""

import pytest
from determinism_parts import Counts, ask, record

from vmibridge import Bridge
from vmibridge.cli import main, replay_run
from vmibridge.cli.replay_result import ReplayPrinter

SOURCE = """
import math, os
import anyio
from determinism_parts import Counts
from vmibridge import method

class Waits(Counts):
    name = "counts"

    @method(2, timeout=math.inf)
    async def later(self, vmi, packet):
        while not os.path.exists({flag!r}):
            await {wait}
        return self.answer()
"""


@pytest.mark.parametrize("wait", ["anyio.sleep(1)", "anyio.to_thread.run_sync(os.sched_yield)"])
def test_an_answer_that_does_not_come_is_named(tmp_path, monkeypatch, capsys, wait):
    async def guest(vm):
        await vm.call(ask(1))
        await vm.call(ask(2, 5))

    flag, source, path = tmp_path / "goes-on", tmp_path / "waits.py", tmp_path / "run.mcap"
    source.write_text(SOURCE.format(flag=str(flag), wait=wait))
    record(path, {"vm": guest}, lambda _: Bridge(Counts()))
    monkeypatch.setattr(replay_run, "STILL", 0.05)
    notes = ReplayPrinter.notes

    def tell(printer, lines):
        told = list(lines)
        notes(printer, told)
        if any("has waited for 0.05 s for the answer to trap 2 of vm vm" in each for each in told):
            flag.touch()

    monkeypatch.setattr(ReplayPrinter, "notes", tell)
    assert main(["replay", str(path), "--handlers", str(source)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}: 2 requests compared, 0 different\n"
    assert err.count("--break 2 shows it") == 1
