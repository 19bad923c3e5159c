"""What the policy denies never reaches a handler, is answered, and is counted."""

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
)
from vmibridge.engine.access_policy import AddressRange, Policy, Quota, Rate
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
CALL, READ = (BridgePacket(MAGIC, 1, code, value1=0x2000, value2=100) for code in (1, 2))


class Probe(BridgeHandler[None]):
    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747

    def __init__(self):
        self.calls = 0

    @method(1)
    async def answer(self, vmi, packet):
        self.calls += 1
        return BridgeResponse(value1=1)

    @method(2)
    async def read(self, vmi, packet):
        self.calls += 1
        return BridgeResponse(value1=len(await vmi.memory.read(packet.value1, packet.value2)))


async def ask(policy, *calls, **options):
    """The answers to calls, given as a packet and how it is made; the handler; the outcomes."""
    probe, answers = Probe(), []

    async def guest(vm):
        for packet, how in calls:
            answers.append(await vm.call(packet, **how))

    async with FakeGuest(guest, memory={0x2000: bytes(0x2000)}) as vm:
        server = BridgeServer(vm, Bridge(probe), policy=policy, **options)
        outcomes = [outcome async for outcome in server.run()]
    denied = server.summary.outcomes[OutcomeKind.DENIED]
    assert denied == sum(outcome.kind is OutcomeKind.DENIED for outcome in outcomes)
    assert denied + probe.calls == len(calls)
    return answers, outcomes


DENIALS = [
    pytest.param(Policy(rings=frozenset({0})), {"ring": 3}, "ring 3 is not allowed", id="ring"),
    pytest.param(
        Policy(address_spaces=frozenset({0x1000})),
        {"address_space": 0x5000},
        "address space 0x5000 is not allowed",
        id="address space",
    ),
    pytest.param(
        Policy(instructions=(AddressRange(0x4000, 0x4FFF),)),
        {"ip": 0x5000},
        "instruction at 0x5000 is not allowed",
        id="instruction",
    ),
]


@pytest.mark.parametrize(("policy", "how", "why"), DENIALS)
async def test_a_denied_trap_runs_as_if_no_host_were_there(policy, how, why):
    answers, outcomes = await ask(policy, (CALL, how))
    assert answers == [None]
    (outcome,) = outcomes
    assert (outcome.kind, outcome.error, outcome.response) == (OutcomeKind.DENIED, why, None)
    assert (outcome.handler, outcome.packet) == (None, CALL)


async def test_or_is_stepped_over():
    policy = Policy(rings=frozenset({0}), denied="skip")
    answers, _ = await ask(policy, (CALL, {"ring": 3}), fallback=BridgeResponse(0xBAD))
    assert answers[0].rip == 0x1003
    assert answers[0].values == (None,) * 4


async def test_or_gets_the_configured_reply_without_stamps():
    policy = Policy(rings=frozenset({0}), denied=BridgeResponse(value1=0xD0))
    answers, outcomes = await ask(policy, (CALL, {"ring": 3}), (CALL, {"ring": 0}))
    assert [answer.values for answer in answers] == [
        (0xD0, None, None, None),
        (1, None, None, 0x5747),
    ]
    assert outcomes[0].response == BridgeResponse(value1=0xD0)


async def test_a_policy_that_allows_all_changes_nothing():
    answers, _ = await ask(Policy(), (CALL, {"ring": 3, "address_space": 0x1000}))
    assert answers[0].rax == 1


async def test_requests_over_the_quota_of_the_vm_are_denied():
    policy = Policy(vm=Quota(requests=Rate(burst=2)), denied="skip")
    answers, outcomes = await ask(policy, *[(CALL, {"vcpu": n % 2}) for n in range(4)])
    assert [answer.rax for answer in answers] == [1, 1, None, None]
    assert outcomes[-1].error == "over the request quota of the VM"


async def test_each_address_space_has_a_quota_of_its_own():
    policy = Policy(address_space=Quota(requests=Rate(burst=1)), denied="skip")
    calls = [(CALL, {"address_space": root}) for root in (0x1000, 0x2000, 0x1000)]
    answers, _ = await ask(policy, *calls)
    assert [answer.rax for answer in answers] == [1, 1, None]


async def test_bytes_that_a_handler_moves_are_charged_to_the_next_traps():
    policy = Policy(vm=Quota(bytes=Rate(burst=150)), denied="skip")
    answers, outcomes = await ask(policy, (READ, {}), (READ, {}), (READ, {}))
    assert [answer.rax for answer in answers] == [100, 100, None]
    assert outcomes[-1].error == "over the byte quota of the VM"


async def test_two_vms_have_quotas_of_their_own():
    policy = Policy(vm=Quota(requests=Rate(burst=1)), denied="skip")
    answers = []

    async def guest(vm):
        answers.append((await vm.call(CALL)).rax)

    async with FakeGuest(guest, vm="a") as a, FakeGuest(guest, vm="b") as b:
        async for _ in BridgeServer([a, b], lambda vm: Probe(), policy=policy).run():
            pass
    assert answers == [1, 1]


async def test_what_is_not_ours_is_not_denied_but_runs_natively():
    probe = Probe()

    async def guest(vm):
        assert await vm.call(BridgePacket(0x9999, 1, 1), ring=3) is None

    policy = Policy(rings=frozenset({0}), denied=BridgeResponse(1))
    async with FakeGuest(guest) as vm:
        server = BridgeServer(vm, Bridge(probe), policy=policy)
        assert [outcome async for outcome in server.run()] == []
    assert (server.summary.native, server.summary.total) == (1, 0)


async def test_a_retry_is_a_request_like_others_to_the_policy():
    """Else a guest could ask as often as it likes by asking again."""

    class Slow(Probe):
        @method(1, soft_timeout=0.005)
        async def answer(self, vmi, packet):
            await anyio.sleep_forever()

    answers = []

    async def guest(vm):
        for _ in range(3):
            answers.append((await vm.call(CALL)).rax)

    policy = Policy(vm=Quota(requests=Rate(burst=2)), denied="skip")
    async with FakeGuest(guest) as vm:
        async for _ in BridgeServer(vm, Slow(), policy=policy).run():
            pass
    assert answers == [Gate.WAIT, Gate.WAIT, None]
