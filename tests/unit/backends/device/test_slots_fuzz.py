"""Slots that a guest writes at random, a million times, and while they are read."""

import subprocess
import sys

import pytest
from fuzzing import fuzzing

from vmibridge.backends.device import slots
from vmibridge.backends.device.mailbox import Mailbox
from vmibridge.backends.device.slots import CALL, Slots, memory_size, slot_offset

COUNT = 2
ANSWER = (0x1111, None, 0x3333, None)
MASKS = {64: (1 << 64) - 1, 32: (1 << 32) - 1}


def check(call: slots.Call, slot: int) -> None:
    assert call.slot == slot
    assert all(0 <= value <= MASKS[call.width] for value in (*call.values, call.space))
    assert call.paging in (0x00, 0x10, 0x20, 0x30)


@pytest.mark.parametrize("rounds", [1000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_each_call_that_is_taken_is_answered_once_whatever_was_written(rounds: int) -> None:
    memory = bytearray(memory_size(COUNT))
    device = Slots(memoryview(memory), COUNT)
    opened: dict[int, slots.Call] = {}
    answered = [0] * COUNT
    taken = 0
    with fuzzing() as random:
        for _ in range(rounds):
            slot = random.randrange(COUNT)
            at = slot_offset(slot)
            match random.randrange(4):
                case 0:
                    memory[random.randrange(len(memory))] = random.randrange(256)
                case 1:
                    memory[at + random.randrange(CALL.size)] ^= 1 << random.randrange(8)
                case 2:
                    field = at + random.randrange(CALL.size - 8)
                    memory[field : field + 8] = random.randbytes(8)
                case _:
                    number = random.choice((0, 1, 0xFFFF_FFFF, answered[slot], answered[slot] + 1))
                    CALL.pack_into(
                        memory, at, slots.MAGIC, 7, 2, *random.randbytes(4), 1,
                        random.getrandbits(32), random.getrandbits(64), number & 0xFFFF_FFFF, 0,
                    )  # fmt: skip
            call = device.take(slot)
            if call is not None:
                taken += 1
                assert slot not in opened
                assert call.number != answered[slot]
                check(call, slot)
                opened[slot] = call
            elif slot not in opened:
                assert device.state(slot) != slots.STATE_CALLED
            if slot in opened and random.random() < 0.7:
                call = opened.pop(slot)
                answered[slot] = call.number
                if random.random() < 0.5:
                    assert device.hold(call)
                if random.random() < 0.8:
                    assert device.answer(call, ANSWER)
                    assert device.state(slot) == slots.STATE_ANSWERED
                    told = CALL.unpack_from(memory, at)
                    assert told[3:7] == (0x1111, call.values[1], 0x3333, call.values[3])
                    assert told[11] == call.number
                else:
                    assert device.decline(call)
                    assert device.state(slot) == slots.STATE_UNMATCHED
                assert not device.answer(call, ANSWER)
                assert not device.hold(call)
            assert {each.slot: each for each in device.open_calls} == opened
            if random.random() < 0.001:
                assert device.reset() == list(opened.values())
                opened.clear()
                answered = [0] * COUNT
    assert taken > rounds / 10


REWRITE = """
import os, sys
memory, at, *calls = sys.argv[1:]
memory, at, calls = int(memory), int(at), [bytes.fromhex(call) for call in calls]
while True:
    for call in calls:
        os.pwrite(memory, call, at)
"""
"""Writes calls over each other, without an end."""


@pytest.mark.parametrize("rounds", [100, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_slot_that_is_rewritten_while_it_is_read_is_taken_as_it_was_copied(rounds: int) -> None:
    """The guest is another process."""
    calls = [
        CALL.pack(slots.MAGIC + odd, odd, odd, *[odd] * 4, 1, 2 * odd, odd, 1 + odd, 0).hex()
        for odd in (0, 1)
    ]
    with Mailbox(1) as mailbox:
        command = [sys.executable, "-I", "-S", "-c", REWRITE, str(mailbox.descriptor)]
        command += [str(slot_offset(0)), *calls]
        with subprocess.Popen(command, pass_fds=[mailbox.descriptor]) as writer:
            try:
                take_and_answer(mailbox.slots, rounds)
            finally:
                writer.kill()


def take_and_answer(device: Slots, rounds: int) -> None:
    taken = 0
    while taken < rounds:
        call = device.take(0)
        if call is None:
            continue
        taken += 1
        kept = call.magic, call.values, call.flags, call.space, call.number
        assert call.magic - slots.MAGIC in (0, 1)
        assert {call.request, call.method, *call.values, call.space} <= {0, 1}
        assert call.flags in (0, 2)
        assert call.number in (1, 2)
        assert device.take(0) is None, "it is open"
        assert device.answer(call, ANSWER)
        assert kept == (call.magic, call.values, call.flags, call.space, call.number)
