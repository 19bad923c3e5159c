"""Answers and outputs of any type, from a handler at the other end of a connection."""

import anyio
import pytest
from odd_objects import NO_VALUES, OUTPUTS, Flags, Level, Whole
from patience import HUNG
from remote_parts import carry, served

from vmibridge import BridgeHandler, BridgePacket, BridgeResponse, OutcomeKind
from vmibridge.cli.trap_line import trap_json
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio
MAGIC = 0x42494D56
NUMBERS = [(True, 1), (False, 0), (Level.HIGH, 3), (Flags.ONE, 1), (Whole(9), 9)]
LEFT_ALONE = None


class Gives(BridgeHandler[object]):
    """value1 says which kind of answer, the method code which one of it."""

    MAGIC = MAGIC
    REQUEST = 1

    async def handle(self, vmi, packet):
        place = packet.method
        if packet.value1 == 0:
            return BridgeResponse(list(NO_VALUES.values())[place])
        if packet.value1 == 1:
            return BridgeResponse(NUMBERS[place][0])
        return BridgeResponse(place).with_output(list(OUTPUTS.values())[place])


async def test_each_is_answered_over_a_connection_and_the_vm_goes_on(tmp_path):
    expected = [
        *[(0, place, LEFT_ALONE) for place in range(len(NO_VALUES))],
        *[(1, place, number) for place, (_, number) in enumerate(NUMBERS)],
        *[(2, place, place) for place in range(len(OUTPUTS))],
    ]
    answers, outcomes = [], []

    async def guest(vm):
        for kind, place, _ in expected:
            writes = await vm.call(BridgePacket(MAGIC, 1, place, kind))
            answers.append((kind, place, writes.rax))

    async def on_outcome(outcome):
        assert b"\n" not in trap_json(outcome)
        outcomes.append(outcome)

    url = f"unix:{tmp_path / 'x.sock'}"
    with anyio.fail_after(HUNG):
        async with served(url, Gives(), on_outcome=on_outcome) as server:
            await carry(FakeGuest(guest), url)
            while server.vms:
                await anyio.sleep(0.001)
    assert answers == expected
    kinds = [outcome.kind for outcome in outcomes]
    refused = len(NO_VALUES)
    assert kinds[:refused] == [OutcomeKind.FAILED] * refused
    assert set(kinds[refused:]) == {OutcomeKind.HANDLED}
