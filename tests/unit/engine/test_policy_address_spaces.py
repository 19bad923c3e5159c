"""The policy and address spaces that a guest makes up: bounded in memory and time."""

import pytest
from policy_parts import SPACE_BYTES, TOO_MANY, let_through, trap

from vmibridge.engine.access_policy import (
    Guard,
    Policy,
    Quota,
    Rate,
    _Buckets,
)
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

# --- address spaces that a guest makes up -------------------------------------------


def table_of(guard: Guard) -> int:
    """How many address spaces are kept."""
    assert guard._spaces is not None
    assert len(guard._heap) == len(guard._spaces)
    return len(guard._spaces)


def test_an_address_space_too_many_is_denied_until_another_has_its_quota_back():
    policy = Policy(address_space=Quota(Rate(burst=2, rate=1)), max_address_spaces=2)
    guard = Guard(policy)
    assert guard.denies(trap(0x1000), 0.0) is None
    assert guard.denies(trap(0x2000), 0.5) is None
    assert guard.denies(trap(0x3000), 0.5) == TOO_MANY
    assert guard.denies(trap(0x1000), 0.5) is None, "one that is kept goes on"
    assert guard.denies(trap(0x3000), 1.25) == TOO_MANY, "both are still in use"
    assert guard.denies(trap(0x3000), 1.5) is None
    assert guard.denies(trap(0x2000), 1.5) == TOO_MANY, "it made room, and has to wait now"
    assert guard.denies(trap(0x1000), 1.5) is None


def test_an_address_space_too_many_is_charged_to_nobody():
    policy = Policy(
        vm=Quota(Rate(burst=2)), address_space=Quota(Rate(burst=2)), max_address_spaces=1
    )
    guard = Guard(policy)
    assert guard.denies(trap(0x1000), 0.0) is None
    assert [guard.denies(trap(0x2000), 0.0) for _ in range(9)] == [TOO_MANY] * 9
    assert guard.denies(trap(0x1000), 0.0) is None


def test_a_debt_of_bytes_is_not_forgotten():
    policy = Policy(
        address_space=Quota(Rate(burst=9, rate=9), Rate(burst=10, rate=1)), max_address_spaces=1
    )
    guard = Guard(policy)
    assert guard.denies(trap(0x1000), 0.0) is None
    guard.charge(trap(0x1000), 30, 0.0)
    assert guard.denies(trap(0x2000), 29.0) == TOO_MANY
    assert guard.denies(trap(0x1000), 20.0) == SPACE_BYTES
    assert guard.denies(trap(0x2000), 30.0) is None


def test_bytes_that_come_when_their_address_space_is_forgotten_are_charged_all_the_same():
    policy = Policy(address_space=Quota(bytes=Rate(burst=10, rate=1)), max_address_spaces=1)
    guard = Guard(policy)
    assert guard.denies(trap(0x1000), 0.0) is None
    assert guard.denies(trap(0x2000), 0.0) is None
    guard.charge(trap(0x2000), 15, 0.0)
    guard.charge(trap(0x1000), 25, 0.0)
    assert table_of(guard) == 2
    assert guard.denies(trap(0x1000), 14.0) == SPACE_BYTES
    assert guard.denies(trap(0x3000), 20.0) == TOO_MANY
    assert guard.denies(trap(0x3000), 25.0) is None
    assert table_of(guard) == 1


def test_no_table_is_kept_where_address_spaces_have_no_quota():
    guard = Guard(Policy(vm=Quota(Rate(1e6), Rate(1e6)), max_address_spaces=1))
    for number in range(1000):
        assert guard.denies(trap(number << 12), 0.0) is None
        guard.charge(trap(number << 12), 8, 0.0)
    assert guard._spaces is None


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("quota", "pause", "count"),
    [
        pytest.param(Quota(Rate(2)), 1e-6, 10, id="none is ever free again"),
        pytest.param(Quota(Rate(2, 1)), 1 / 4096, 10, id="one is free at each trap"),
        pytest.param(Quota(Rate(2, 1)), 1 / 40960, 2, id="one is free now and then"),
        pytest.param(Quota(Rate(2, 1e9)), 1e-6, 2, id="all are free at once"),
        pytest.param(Quota(bytes=Rate(2, 1)), 1e-6, 2, id="none uses what it has"),
    ],
)
@pytest.mark.parametrize("unit", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_million_address_spaces_are_bounded_in_memory_and_time(
    quota, pause, count, unit, monkeypatch
):
    count *= unit
    looks, full_at = 0, _Buckets.full_at

    def counted(*of):
        nonlocal looks
        looks += 1
        return full_at(*of)

    monkeypatch.setattr(_Buckets, "full_at", counted)
    guard = Guard(Policy(address_space=quota, max_address_spaces=4096))
    now = 0.0
    for number in range(count):
        now += pause
        event = TrapEvent(number, TrapReason.VMCALL, Registers(cr3=number << 12))
        assert guard.denies(event, now) in (None, TOO_MANY)
        if not number & 0xFFFF:
            assert table_of(guard) <= 4096
    assert table_of(guard) <= 4096
    # Not at each of the 4096 at each trap, which would take minutes.
    assert looks <= 2 * count


def test_a_guest_that_keeps_its_address_spaces_busy_pays_for_each_look_at_them(monkeypatch):
    # The worst for the heap: all were charged since it was last looked at, and none is free.
    looks, full_at = [], _Buckets.full_at
    monkeypatch.setattr(_Buckets, "full_at", lambda *of: looks.append(of) or full_at(*of))
    most, now, traps = 256, 0.0, 0
    guard = Guard(Policy(address_space=Quota(Rate(1e6, rate=1)), max_address_spaces=most))
    for _ in range(50):
        for number in range(1, most + 1):
            traps += let_through(guard, now, number << 12, most=2)
        now += 1.5
        for number in range(most + 1, 2 * most):
            assert guard.denies(trap(number << 12), now) == TOO_MANY
    assert traps == 50 * most * 2
    assert len(looks) <= traps
