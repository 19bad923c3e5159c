"""The short form of the fault soak, on each loop; `make soak` runs the long one."""

import json
import sys

import fault_soak
import pytest
from children import run
from soak_handlers import Faults
from soak_kinds import KINDS, Kind
from soak_run import LOOPS, Soak

from vmibridge import BridgeResponse

TRAPS = [4_000, pytest.param(20_000, marks=pytest.mark.slow)]
LANES = 64
SEED = 1

# The same lines, many thousand times: other tests show that they are covered.
pytestmark = pytest.mark.no_cover


@pytest.mark.anyio
@pytest.mark.parametrize("traps", TRAPS)
async def test_all_is_as_it_has_to_be(traps):
    report = await Soak(traps, LANES, SEED).run()
    assert report.first_wrongs == []
    assert report.wrongs == 0
    assert sum(report.planned.values()) >= traps
    assert report.traps >= sum(report.planned.values()) + report.retries


@pytest.mark.anyio
async def test_one_lane_does():
    report = await Soak(500, 1, SEED).run()
    assert report.first_wrongs == []


@pytest.mark.anyio
async def test_the_seed_fixes_what_is_sent():
    first, again, other = [(await Soak(60, 8, seed).run()).planned for seed in (1, 1, 2)]
    assert first == again
    assert first != other


@pytest.mark.anyio
async def test_what_is_wrong_is_found(monkeypatch):
    async def answer(self, vmi, packet):
        return BridgeResponse(value1=packet.value1 + packet.value2 % 2)

    monkeypatch.setattr(Faults, "answer", answer)
    report = await Soak(100, 2, SEED).run()
    assert report.wrongs > 0
    assert "ANSWER got wrong" in report.first_wrongs[0]


def test_each_kind_is_in_the_table():
    assert set(KINDS) == set(Kind)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_command_prints_its_report(loop):
    command = [sys.executable, fault_soak.__file__, "--traps", "200", "--lanes", "4"]
    done = run([*command, "--loop", loop, "--json"])
    report = json.loads(done.stdout)
    assert (done.returncode, report["first_wrongs"]) == (0, [])
    assert (report["loop"], report["lanes"]) == (loop, 4)
