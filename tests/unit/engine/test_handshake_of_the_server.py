"""What the server tells a guest of itself, and to whom."""

import math

import pytest

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE4,
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Policy,
    Quota,
    Rate,
    method,
)
from vmibridge.engine.handshake import NO_END, VERSION, Feature, Host, Limit
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio


class Plain(BridgeHandler[None]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 0x100

    @method(1)
    async def answer(self, vmi, packet):
        return BridgeResponse(value1=1)


class Patient(Plain):
    may_wait = True


class Gated(Plain):
    soft_timeout = 0.25
    timeout = 30.0

    @method(2, soft_timeout=0.5, timeout=90.0)
    async def longer(self, vmi, packet):
        return None


class Endless(Plain):
    soft_timeout = math.inf
    timeout = math.inf


def ask(name, **values):
    code = next(code for code, each in Host.methods.items() if each.name == name)
    return BridgePacket(STANDARD_MAGIC, 0x0000, code, **values)


async def tell(handler, *packets, **options):
    answers = []

    async def guest(vm):
        answers.extend([await vm.call(packet) for packet in packets])

    async with FakeGuest(guest) as vm:
        async for _ in BridgeServer(vm, Bridge(handler), **options).run():
            pass
    return answers


@pytest.mark.parametrize(
    ("handler", "options", "features", "deadlines"),
    [
        (Plain, {}, 0, (0, 5_000)),
        (Plain, {"timeout": 2.5, "soft_timeout": 0.2}, 0, (0, 2_500)),
        (Patient, {"timeout": 2.5, "soft_timeout": 0.2}, Feature.WAIT, (200, 2_500)),
        (Patient, {"timeout": 1.0, "soft_timeout": 2.0}, 0, (0, 1_000)),
        (Gated, {}, Feature.WAIT, (500, 90_000)),
        (Gated, {"soft_timeout": 1.0}, Feature.WAIT, (500, 90_000)),
        (Endless, {"soft_timeout": 1.0}, 0, (0, NO_END)),
        (Plain, {"policy": Policy()}, Feature.POLICY, (0, 5_000)),
        (
            Plain,
            {"policy": Policy(vm=Quota(requests=Rate(burst=9)))},
            Feature.POLICY | Feature.QUOTA,
            (0, 5_000),
        ),
    ],
)
async def test_features_and_deadlines_are_those_of_the_requests_that_there_are(
    handler, options, features, deadlines
):
    version, told = await tell(handler(), ask("version"), ask("deadlines"), **options)
    assert (version.rax, version.rbx, version.rdx) == (VERSION, features, STANDARD_VERIFY_VALUE4)
    assert (told.rax, told.rbx) == deadlines


async def test_limits_are_those_of_the_server():
    asked = [ask("limits", value1=limit) for limit in Limit]
    told = await tell(Plain(), *asked, in_flight=7, result_timeout=1.5)
    assert [answer.rax for answer in told] == [16 << 20, 7, 1500]


async def test_it_can_be_turned_off():
    (answer,) = await tell(Plain(), ask("version"), handshake=False)
    assert answer.values == (None,) * 4


async def test_a_bridge_of_another_magic_does_not_speak_it():
    class Other(Plain):
        MAGIC = 0x1234_5678

    assert await tell(Other(), ask("version")) == [None]


async def test_a_handler_of_ones_own_stands_before_it():
    class Own(Plain):
        REQUEST = 0x0000

    (answer,) = await tell(Own(), ask("version"))
    assert answer.values == (1, None, None, None)
