"""The exit of a guest, the time of the host, and random bytes."""

from itertools import pairwise

import msgspec
import pytest

from vmibridge import (
    STANDARD_MAGIC,
    BridgeContext,
    BridgePacket,
    GuestExit,
    OutcomeKind,
    Registers,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
)
from vmibridge.bridge.context import Source
from vmibridge.handlers.clock import Clock
from vmibridge.handlers.exit import Exit
from vmibridge.handlers.random import Random
from vmibridge.testing import FakeBackend, FakeMemory, FakeRoom, drive

ADDRESS = 0x1000
MASK32 = (1 << 32) - 1


def context(seq=1, started=0.0, seed=0):
    event = TrapEvent(seq, TrapReason.VMCALL, Registers())
    return BridgeContext(event, FakeBackend(), Source(10**18, seed), started)


# --- exit ------------------------------------------------------------------------------


def exit_packet(*values):
    return BridgePacket(STANDARD_MAGIC, 0x0111, 0xFFFF, *values)


@pytest.mark.anyio
@pytest.mark.parametrize("status", [0, 1, 255, 256, MASK32])
async def test_an_exit_is_the_output_and_the_guest_gets_success(status):
    outcome = await drive(Exit(), exit_packet(status, ADDRESS), {ADDRESS: b"all is well\0"})
    assert outcome.output == GuestExit(status, "all is well")
    assert outcome.response.values[:2] == (Status(0xFF).encode(), 0)


@pytest.mark.anyio
async def test_an_exit_needs_no_reason():
    assert (await drive(Exit(), exit_packet(3))).output == GuestExit(3)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("values", "code"),
    [
        ((MASK32 + 1, 0), 1),
        ((0, 0xDEAD_0000), 2),
        ((0, ADDRESS + 2000), 2),  # longer than 1024 bytes
        ((0, ADDRESS + 1000), 2),  # no UTF-8
    ],
)
async def test_an_exit_that_is_wrong_is_none(values, code):
    memory = {ADDRESS: b"ok\0".ljust(1000, b"\0") + b"\xff\0".ljust(1000, b"\0") + b"a" * 1025}
    outcome = await drive(Exit(), exit_packet(*values), memory)
    status = Status.decode(outcome.response.value1)
    assert (status.kind, status.code) == (StatusKind.INVALID_PARAMETERS, code)
    assert outcome.output is None


@pytest.mark.anyio
async def test_a_32_bit_guest_exits_in_registers():
    memory = {ADDRESS: b"done\0"}
    event = TrapEvent(1, TrapReason.VMCALL, Registers(), length=3, width=32)
    outcome = await drive(Exit(), exit_packet(7, ADDRESS), memory, event=event)
    assert outcome.output == GuestExit(7, "done")


@pytest.mark.parametrize(("status", "process"), [(0, 0), (255, 255), (256, 255), (MASK32, 255)])
def test_the_status_of_a_process_is_never_0_for_another_one(status, process):
    assert GuestExit(status).exit_status == process


@pytest.mark.parametrize(("status", "error"), [(-1, ValueError), (MASK32 + 1, ValueError)])
def test_a_status_has_32_bits(status, error):
    with pytest.raises(error, match="the status of a guest has 32 bits"):
        GuestExit(status)
    with pytest.raises(TypeError, match="whole number"):
        GuestExit(1.0)


# --- clock -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_clock_tells_when_the_request_came():
    clock = Clock()
    assert await clock.real(context(started=1.5)) == 10**18 + 1_500_000_000
    packet = BridgePacket(STANDARD_MAGIC, 0x0114, 1)
    outcome = await drive(clock, packet)
    assert outcome.response.values[:2] == (Status(1).encode(), outcome.output)


@pytest.mark.anyio
async def test_a_monotonic_clock_never_goes_back_whatever_order_requests_are_answered_in():
    clock = Clock()
    told = [await clock.monotonic(context(started=at)) for at in (3.0, 1.0, 2.0, 4.0)]
    assert all(first <= second for first, second in pairwise(told))
    assert told[-1] == await clock.real(context(started=4.0))


# --- random ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_random_bytes_are_those_of_the_request():
    handler, rooms = Random(), [FakeRoom(64) for _ in range(4)]
    for room, at in zip(rooms, ((1, 0), (1, 0), (2, 0), (1, 1)), strict=True):
        assert await handler.fill(context(seq=at[0], seed=at[1]), room) == 64
    assert rooms[0].data == rooms[1].data, "a replay gives them again"
    assert len({room.data for room in rooms}) == 3


@pytest.mark.anyio
async def test_a_request_gives_no_more_than_the_limit():
    handler, room = Random(Random.Settings(limit=10)), FakeRoom(64)
    assert await handler.fill(context(), room) == 10
    assert room.data[10:] == bytes(54)


@pytest.mark.anyio
@pytest.mark.parametrize(("address", "size"), [(ADDRESS, (1 << 20) + 1), (0xDEAD_0000, 8)])
async def test_a_buffer_that_is_wrong_is_not_filled(address, size):
    packet = BridgePacket(STANDARD_MAGIC, 0x0115, 1, address, size)
    outcome = await drive(Random(), packet, FakeMemory({ADDRESS: bytes(64)}))
    assert outcome.kind is OutcomeKind.HANDLED
    assert Status.decode(outcome.response.value1).kind == StatusKind.INVALID_PARAMETERS


@pytest.mark.parametrize("limit", [0, -1, (1 << 20) + 1])
def test_a_limit_that_is_out_of_range_is_refused(limit):
    with pytest.raises(msgspec.ValidationError, match="limit is 1 to"):
        msgspec.convert({"limit": limit}, Random.Settings)
