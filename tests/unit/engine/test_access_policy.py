"""The policy: who may ask, how often and how much, and what makes no sense."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from policy_parts import SPACE_BYTES, TOO_MANY, VM_BYTES, let_through, trap

from vmibridge import BridgeResponse
from vmibridge.engine.access_policy import (
    AddressRange,
    Guard,
    Policy,
    Quota,
    Rate,
)

laws = settings(max_examples=examples(200))

TOP = (1 << 64) - 1
VM_REQUESTS = "over the request quota of the VM"


SPACE_REQUESTS = "over the request quota of the address space"


# --- who may ask --------------------------------------------------------------------


def test_the_default_denies_nothing():
    guard = Guard(Policy())
    for event in (trap(), trap(0, ring=0, ip=0), trap(TOP, ring=1, ip=TOP)):
        assert guard.denies(event, 0.0) is None
    assert let_through(guard, 0.0) == 1000
    assert not guard.meters_bytes
    assert not Policy().has_quota


def test_rings():
    guard = Guard(Policy(rings=frozenset({0, 3})))
    told = [guard.denies(trap(ring=ring), 0.0) for ring in range(4)]
    assert told == [None, "ring 1 is not allowed", "ring 2 is not allowed", None]


def test_address_spaces_are_known_by_their_root_whatever_else_cr3_holds():
    guard = Guard(Policy(address_spaces=frozenset({0x1000, 0x7000})))
    assert guard.denies(trap(0x1000), 0.0) is None
    assert guard.denies(trap(1 << 63 | 0x7005), 0.0) is None
    assert guard.denies(trap(0x2000), 0.0) == "address space 0x2000 is not allowed"


def test_instructions_are_allowed_from_the_first_to_the_last_address_of_a_range():
    ranges = (AddressRange(0x401000, 0x401FFF), AddressRange(0xFFFF_8000_0000_0000, TOP))
    guard = Guard(Policy(instructions=ranges))
    for ip in (0x401000, 0x401FFF, 0xFFFF_8000_0000_0000, TOP):
        assert guard.denies(trap(ip=ip), 0.0) is None
    for ip in (0, 0x400FFF, 0x402000, 0xFFFF_7FFF_FFFF_FFFF):
        assert guard.denies(trap(ip=ip), 0.0) == f"instruction at {ip:#x} is not allowed"


def test_an_empty_list_allows_none():
    assert Guard(Policy(address_spaces=frozenset())).denies(trap(), 0.0) is not None
    assert Guard(Policy(instructions=())).denies(trap(), 0.0) is not None


addresses = st.integers(0, 40) | st.integers(TOP - 20, TOP)
ranges_of_all_kinds = st.lists(
    st.tuples(addresses, addresses).map(lambda ends: AddressRange(min(ends), max(ends)))
)


@laws
@given(ranges_of_all_kinds, addresses)
def test_an_instruction_is_allowed_if_any_range_holds_it(ranges, ip):
    denied = Guard(Policy(instructions=tuple(ranges))).denies(trap(ip=ip), 0.0)
    assert (denied is None) == any(part.start <= ip <= part.end for part in ranges)


class Counted(int):
    """An address that counts how often it is compared."""

    compared = 0

    def _compare(name):
        def compare(self, other):
            Counted.compared += 1
            return getattr(int(self), name)(other)

        return compare

    __lt__, __le__, __gt__, __ge__ = map(_compare, ("__lt__", "__le__", "__gt__", "__ge__"))


def test_many_ranges_cost_what_few_do(monkeypatch):
    monkeypatch.setattr(Counted, "compared", 0)
    ranges = tuple(AddressRange(n * 0x1000, n * 0x1000 + 0x7FF) for n in range(10_000))
    guard = Guard(Policy(instructions=ranges))
    for number in range(0, 10_000, 100):
        assert guard.denies(trap(ip=Counted(number * 0x1000)), 0.0) is None
        assert guard.denies(trap(ip=Counted(number * 0x1000 + 0x800)), 0.0) is not None
    # By halves, not a look at each: 2 ** 14 are more than there are.
    assert 200 <= Counted.compared <= 200 * 16


# --- how often ----------------------------------------------------------------------


def test_a_burst_then_what_flows_back():
    guard = Guard(Policy(vm=Quota(Rate(burst=3, rate=2))))
    assert let_through(guard, 100.0) == 3
    assert guard.denies(trap(), 100.25) == VM_REQUESTS
    assert let_through(guard, 100.5) == 1
    assert let_through(guard, 101.5) == 2
    assert let_through(guard, 1000.0) == 3, "a bucket does not hold more than its burst"


def test_without_a_rate_the_burst_is_for_the_whole_run():
    guard = Guard(Policy(vm=Quota(Rate(burst=3)), address_space=Quota(Rate(burst=2))))
    assert let_through(guard, 0.0, 0x1000) == 2
    assert guard.denies(trap(0x1000), 1e9) == SPACE_REQUESTS
    assert let_through(guard, 1e9, 0x2000) == 1
    assert guard.denies(trap(0x2000), 1e12) == VM_REQUESTS


def test_an_address_space_does_not_use_up_the_quota_of_another():
    guard = Guard(Policy(address_space=Quota(Rate(burst=2, rate=1))))
    assert let_through(guard, 0.0, 0x1000) == 2
    assert let_through(guard, 0.0, 0x2000) == 2
    assert guard.denies(trap(0x1000 | 5), 0.0) == SPACE_REQUESTS, "a PCID makes no other"


def test_each_vm_has_a_quota_of_its_own():
    policy = Policy(vm=Quota(Rate(burst=2)))
    assert [let_through(Guard(policy), 0.0) for _ in range(2)] == [2, 2]


def test_a_fraction_of_a_token_is_kept_until_it_is_whole():
    guard = Guard(Policy(vm=Quota(Rate(burst=1.5, rate=0.5))))
    assert let_through(guard, 0.0) == 1
    assert let_through(guard, 1.0) == 1
    assert let_through(guard, 2.0) == 0
    assert let_through(guard, 3.0) == 1


@laws
@given(
    st.floats(1, 20),
    st.floats(0, 50),
    st.lists(st.floats(0, 1) | st.just(0.0), min_size=1, max_size=60),
)
def test_no_window_lets_through_more_than_the_burst_and_what_flowed_back(burst, rate, pauses):
    quota = Quota(Rate(burst, rate))
    for policy in (Policy(vm=quota), Policy(address_space=quota)):
        guard, now, passed = Guard(policy), 1000.0, []
        for pause in pauses:
            now += pause
            if guard.denies(trap(), now) is None:
                passed.append(now)
        for first, begin in enumerate(passed):
            for count, end in enumerate(passed[first:], 1):
                assert count <= burst + rate * (end - begin) + 1e-6


# --- how many bytes -----------------------------------------------------------------


def test_bytes_may_overdraw_and_the_debt_is_paid_before_the_next_trap():
    guard = Guard(Policy(vm=Quota(bytes=Rate(burst=100, rate=50))))
    assert guard.meters_bytes
    assert guard.denies(trap(), 0.0) is None
    guard.charge(trap(), 300, 0.0)
    assert guard.denies(trap(), 3.5) == VM_BYTES
    assert guard.denies(trap(), 4.0) == VM_BYTES, "nothing left is not enough"
    assert guard.denies(trap(), 4.5) is None


def test_bytes_without_a_rate_are_for_the_whole_run():
    guard = Guard(Policy(address_space=Quota(bytes=Rate(burst=100))))
    guard.charge(trap(0x1000), 99, 0.0)
    assert guard.denies(trap(0x1000), 0.0) is None
    guard.charge(trap(0x1000), 1, 0.0)
    assert guard.denies(trap(0x1000), 1e12) == SPACE_BYTES
    assert guard.denies(trap(0x2000), 0.0) is None


def test_a_bucket_of_bytes_does_not_hold_more_than_its_burst():
    guard = Guard(Policy(vm=Quota(bytes=Rate(burst=100, rate=50))))
    guard.charge(trap(), 10, 0.0)
    guard.charge(trap(), 100, 1000.0)
    assert guard.denies(trap(), 1000.0) == VM_BYTES


def test_a_slow_rate_is_not_lost_beside_a_large_bucket():
    # Each trap is worth a thousandth of a byte: too little to change what the bucket holds.
    guard = Guard(Policy(vm=Quota(bytes=Rate(burst=1e15, rate=1000))))
    guard.charge(trap(), 10**6, 0.0)
    assert all(guard.denies(trap(), step * 1e-6) is None for step in range(10_000))
    guard.charge(trap(), 10**15 - 10**6 + 5, 0.01)
    assert guard.denies(trap(), 0.01) is None
    guard.charge(trap(), 5, 0.01)
    assert guard.denies(trap(), 0.01) == VM_BYTES


@pytest.mark.parametrize(
    ("policy", "metered"),
    [
        (Policy(vm=Quota(bytes=Rate(1))), True),
        (Policy(address_space=Quota(bytes=Rate(1))), True),
        (Policy(vm=Quota(bytes=Rate(1)), address_space=Quota(bytes=Rate(1))), True),
        (Policy(vm=Quota(Rate(1)), address_space=Quota(Rate(1))), False),
    ],
)
def test_bytes_are_metered_where_a_quota_is_set(policy, metered):
    assert Guard(policy).meters_bytes is metered
    assert policy.has_quota


# --- a denied trap ------------------------------------------------------------------


def test_a_trap_that_a_rule_denies_is_charged_to_nobody():
    one = Quota(Rate(burst=1))
    guard = Guard(
        Policy(
            rings=frozenset({3}),
            address_spaces=frozenset({0x1000}),
            instructions=(AddressRange(0x401000, 0x401000),),
            vm=one,
            address_space=one,
        )
    )
    for event in (trap(ring=0), trap(0x2000), trap(ip=0)):
        assert "is not allowed" in guard.denies(event, 0.0)
    assert guard.denies(trap(), 0.0) is None
    assert guard.denies(trap(), 0.0) == VM_REQUESTS


def test_a_trap_over_the_quota_of_its_address_space_is_not_charged_to_the_vm():
    guard = Guard(Policy(vm=Quota(Rate(burst=3)), address_space=Quota(Rate(burst=2))))
    assert let_through(guard, 0.0, 0x1000) == 2
    assert [guard.denies(trap(0x1000), 0.0) for _ in range(5)] == [SPACE_REQUESTS] * 5
    assert guard.denies(trap(0x2000), 0.0) is None


def test_a_trap_over_the_quota_of_the_vm_is_not_charged_to_its_address_space():
    guard = Guard(Policy(vm=Quota(Rate(burst=1, rate=1)), address_space=Quota(Rate(burst=2))))
    assert guard.denies(trap(), 0.0) is None
    assert [guard.denies(trap(), 0.0) for _ in range(5)] == [VM_REQUESTS] * 5
    assert guard.denies(trap(), 1.0) is None


# All numbers are exact in binary, so the model below and the guard must agree in each case.
bursts = st.integers(1, 6)
rates = st.builds(Rate, burst=bursts, rate=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0]))
quotas = st.builds(Quota, requests=st.none() | rates, bytes=st.none() | rates)
pauses = st.integers(0, 64).map(lambda count: count / 16) | st.just(0.0)
roots = st.integers(1, 6).map(lambda number: number << 12)
steps = st.lists(st.tuples(pauses, roots, st.integers(0, 12)), max_size=60)


class Model:
    """The rules as they are written: exact numbers, all that ever was is kept."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.used: dict[tuple[object, str], tuple[Fraction, Fraction]] = {}

    def left(self, of: object, kind: str, now: float) -> Fraction | None:
        rate = getattr(self.policy.vm if of == "vm" else self.policy.address_space, kind)
        if rate is None:
            return None
        level, at = self.used.get((of, kind), (Fraction(rate.burst), Fraction(now)))
        return min(Fraction(rate.burst), level + Fraction(rate.rate) * (Fraction(now) - at))

    def take(self, of: object, kind: str, count: int, now: float) -> None:
        left = self.left(of, kind, now)
        if left is not None:
            self.used[of, kind] = (left - count, Fraction(now))

    def in_use(self, root: int, now: float) -> bool:
        quota = self.policy.address_space
        return any(
            rate is not None and self.left(root, kind, now) < rate.burst
            for kind, rate in (("requests", quota.requests), ("bytes", quota.bytes))
        )

    def denies(self, root: int, now: float) -> str | None:
        others = {of for of, _ in self.used} - {"vm", root}
        full = sum(self.in_use(other, now) for other in others) >= self.policy.max_address_spaces
        for of, name in (("vm", "the VM"), (root, "the address space")):
            if of == root and not self.in_use(root, now) and full:
                return TOO_MANY
            requests, size = self.left(of, "requests", now), self.left(of, "bytes", now)
            if requests is not None and requests < 1:
                return f"over the request quota of {name}"
            if size is not None and size <= 0:
                return f"over the byte quota of {name}"
        for of in ("vm", root):
            self.take(of, "requests", 1, now)
        return None


@laws
@given(quotas, quotas, st.integers(1, 6), steps)
def test_a_guard_decides_as_the_rules_say(vm, address_space, most, steps):
    policy = Policy(vm=vm, address_space=address_space, max_address_spaces=most)
    guard, model, now = Guard(policy), Model(policy), 0.0
    for pause, root, size in steps:
        now += pause
        denied = guard.denies(trap(root), now)
        assert denied == model.denies(root, now)
        if denied is None:
            guard.charge(trap(root), size, now)
            for of in ("vm", root):
                model.take(of, "bytes", size, now)


@laws
@given(quotas, quotas, st.integers(1, 4), steps)
def test_what_was_denied_might_as_well_not_have_been(vm, address_space, most, steps):
    policy = Policy(vm=vm, address_space=address_space, max_address_spaces=most)
    seeing, spared, now = Guard(policy), Guard(policy), 0.0
    for pause, root, size in steps:
        now += pause
        if seeing.denies(trap(root), now) is None:
            assert spared.denies(trap(root), now) is None
            for guard in (seeing, spared):
                guard.charge(trap(root), size, now)
    for root in range(0x1000, 0x8000, 0x1000):
        told = [[guard.denies(trap(root), now) for _ in range(8)] for guard in (seeing, spared)]
        assert told[0] == told[1]


@laws
@given(quotas, steps, st.data())
def test_nothing_is_lost_by_what_is_forgotten(address_space, steps, data):
    # The handlers' bytes come at any time after their trap: also when it was forgotten.
    narrow = Policy(address_space=address_space, max_address_spaces=2)
    guard, model, now = Guard(narrow), Model(Policy(address_space=address_space)), 0.0
    waiting: list[int] = []
    for pause, root, size in steps:
        now += pause
        denied = guard.denies(trap(root), now)
        if denied != TOO_MANY:
            assert denied == model.denies(root, now)
        if denied is None:
            waiting.append(root)
        if waiting and data.draw(st.booleans()):
            charged = waiting.pop(0)
            guard.charge(trap(charged), size, now)
            model.take(charged, "bytes", size, now)


# --- what makes no sense ------------------------------------------------------------

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Rate(0), "burst must be a finite number above 0, got 0"),
        (lambda: Rate(-1.5), "burst must be a finite number above 0, got -1.5"),
        (lambda: Rate(inf), "burst must be a finite number above 0, got inf"),
        (lambda: Rate(nan), "burst must be a finite number above 0, got nan"),
        (lambda: Rate(1, -1), "rate must be a finite number, 0 or more, got -1"),
        (lambda: Rate(1, inf), "rate must be a finite number, 0 or more, got inf"),
        (lambda: Rate(1, nan), "rate must be a finite number, 0 or more, got nan"),
        (lambda: Quota(Rate(0.5)), "requests.burst is at least one request, got 0.5"),
        (lambda: AddressRange(2, 1), "goes up from start to end, .* got 0x2 to 0x1"),
        (lambda: AddressRange(-1, 1), "addresses of 64 bits, got -0x1 to 0x1"),
        (lambda: AddressRange(0, 1 << 64), "addresses of 64 bits, got 0x0 to 0x10000000000000000"),
        (lambda: Policy(rings=frozenset()), "rings must have 1 or more, got 0"),
        (lambda: Policy(rings=frozenset({3, 4})), "rings must each be 0 to 3, got 4"),
        (lambda: Policy(rings=frozenset({-1})), "rings must each be 0 to 3, got -1"),
        (
            lambda: Policy(address_spaces=frozenset({0x1005})),
            "address_spaces must each be a page-table root .*, got 0x1005",
        ),
        (lambda: Policy(address_spaces=frozenset({1 << 52})), "a page-table root of 52 bits"),
        (
            lambda: Policy(address_spaces=frozenset({-32})),
            "a page-table root of 52 bits, the low 5 clear, got -0x20",
        ),
        (lambda: Policy(max_address_spaces=0), "max_address_spaces must be 1 or more, got 0"),
        (lambda: Policy(denied="drop"), "denied is 'native', 'skip' or a response, got 'drop'"),
        (lambda: Policy(denied=None), "denied is 'native', 'skip' or a response, got None"),
    ],
)
def test_what_makes_no_sense_is_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_what_is_at_the_bounds_makes_sense():
    assert AddressRange(TOP, TOP) == AddressRange(start=TOP, end=TOP)
    assert Quota(Rate(1), Rate(0.5)).bytes == Rate(burst=0.5, rate=0.0)
    Policy(address_spaces=frozenset({0, 0x20, (1 << 52) - 32}), max_address_spaces=1)
    for denied in ("native", "skip", BridgeResponse(), BridgeResponse(value1=1)):
        assert Policy(denied=denied).denied == denied
