"""What ends a run before its guest does."""

import pytest

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

OTHER_MAGIC = 0xFEDC_BA98
CALL, OUTPUT, EXIT = (BridgePacket(STANDARD_MAGIC, 1, code) for code in (1, 2, 0xFFFF))
NO_EXIT = BridgePacket(OTHER_MAGIC, 1, 0xFFFF)
UNMATCHED = BridgePacket(STANDARD_MAGIC, 7, 0xFFFF)


class Standard(BridgeHandler[str]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 1

    async def handle(self, vmi, packet):
        response = BridgeResponse(0)
        return response.with_output("done") if packet.method == OUTPUT.method else response


class Other(Standard):
    MAGIC = OTHER_MAGIC


async def methods(until, *calls):
    """The requests and methods of the run's outcomes."""

    async def guest(vm):
        for call in calls:
            await vm.call(call)

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Bridge(Standard(), Other()))
        return [(o.packet.request, o.packet.method) async for o in server.run(until)]


@pytest.mark.parametrize(
    ("until", "count"),
    [
        (None, 6),
        (1, 1),
        (3, 3),
        (100, 6),
        ("output", 4),
        ("exit", 5),
        (lambda outcome: outcome.packet == NO_EXIT, 2),
    ],
)
async def test_the_run_ends_with(until, count):
    calls = (CALL, NO_EXIT, UNMATCHED, OUTPUT, EXIT, CALL)
    expected = [(call.request, call.method) for call in calls[:count]]
    assert await methods(until, *calls) == expected


@pytest.mark.parametrize("until", [0, -1, True, "end", 2.5])
async def test_what_is_no_end_is_refused(until):
    with pytest.raises(ValueError, match="until is"):
        await methods(until)
