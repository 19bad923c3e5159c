"""The short form of the fault soak, on each loop; `make soak` runs the long one."""

import pytest
from fault_soak import KINDS, Kind, Soak

pytestmark = pytest.mark.anyio

TRAPS = 20_000
LANES = 64
SEED = 1


async def test_all_is_as_it_has_to_be():
    report = await Soak(TRAPS, LANES, SEED).run()
    assert report.first_wrongs == []
    assert report.wrongs == 0
    assert sum(report.planned.values()) >= TRAPS
    assert report.traps >= sum(report.planned.values()) + report.retries


async def test_each_kind_is_sent_as_often_as_its_share_says():
    first, again = [(await Soak(2_000, 8, SEED).run()).planned for _ in range(2)]
    assert first == again


async def test_all_on_one_lane():
    report = await Soak(500, 1, SEED).run()
    assert report.first_wrongs == []


def test_each_kind_is_in_the_table():
    assert set(KINDS) == set(Kind)
