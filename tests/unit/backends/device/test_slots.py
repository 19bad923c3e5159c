"""The call slot: layout, states and numbers, whatever a guest writes into it."""

import fcntl
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmibridge.backends.device import slots
from vmibridge.backends.device.mailbox import Mailbox
from vmibridge.backends.device.slots import CALL, Limits, Slots, Space, slot_offset

COUNT = 3


class Guest:
    """A guest's view of the memory."""

    def __init__(self, count: int = COUNT, limits: Limits | None = None) -> None:
        self.memory = bytearray(slots.memory_size(count))
        self.slots = Slots(memoryview(self.memory), count, limits)

    def fill(
        self, slot: int = 0, number: int = 1, *, state: int = 1, flags: int = 0, space: int = 0
    ) -> None:
        fields = (0x42494D56, 7, 2, 11, 12, 13, 14, state, flags, space, number, 0)
        CALL.pack_into(self.memory, slot_offset(slot), *fields)

    def word(self, offset: int, slot: int = 0) -> int:
        return struct.unpack_from("<I", self.memory, slot_offset(slot) + offset)[0]

    def values(self, slot: int = 0) -> tuple[int, ...]:
        return struct.unpack_from("<4Q", self.memory, slot_offset(slot) + 8)


def test_the_layout_is_that_of_the_table() -> None:
    offsets = [0]
    for field in ("I", "H", "H", "4Q", "I", "I", "Q", "I", "I"):
        offsets.append(offsets[-1] + struct.calcsize(f"<{field}"))
    named = (slots.VALUES_AT, slots.STATE_AT, slots.FLAGS_AT, slots.SPACE_AT, slots.NUMBER_AT)
    assert offsets == [0, 4, 6, *named, slots.ANSWERED_AT, slots.PAYLOAD_AT]
    assert slots.PAYLOAD_SIZE == 4032


def test_the_header_says_where_everything_is() -> None:
    limits = Limits(hold_us=2000, timeout_ms=5000, vectors=4, kernel_slots=2)
    guest = Guest(limits=limits)
    fields = struct.unpack_from("<16I", guest.memory)
    assert fields == (
        *(0x42494D56, 1, COUNT, 4096, 0x2000, 0x3000, 0x2000, 64),
        *(guest.slots.generation, 2000, 5000, 4, 2, 0, 0, 0),
    )


@pytest.mark.parametrize("count", [1, 3, 64, 256])
def test_the_memory_is_a_power_of_two_and_only_doorbells_trap(count: int) -> None:
    size, areas = slots.memory_size(count), slots.shared_areas(count)
    assert size & size - 1 == 0
    assert all(at % 4096 == 0 and at + length <= size for at, length in areas)
    mapped = {page for at, length in areas for page in range(at >> 12, at + length >> 12)}
    for slot in range(count):
        assert slots.slot_offset(slot) >> 12 in mapped
        assert slots.doorbell_offset(slot) >> 12 not in mapped
        assert slots.slot_of_doorbell(slots.doorbell_offset(slot) + 4, count) == (slot, 4)
        assert slots.slot_of_doorbell(slots.slot_offset(slot), count) is None
    assert slots.slot_of_doorbell(slots.doorbell_offset(count), count) is None
    assert slots.slot_of_doorbell(0, count) is None


@pytest.mark.parametrize("count", [0, 257, -1])
def test_a_number_of_slots_that_there_is_not_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"1 to 256"):
        slots.memory_size(count)


def test_a_call_is_answered_in_place_and_absent_values_stay() -> None:
    guest = Guest()
    guest.fill(1, 5, flags=slots.FLAG_INTERRUPT)
    call = guest.slots.take(1)
    assert call is not None
    assert (call.slot, call.number, call.magic, call.request, call.method) == (
        *(1, 5, 0x42494D56, 7, 2),
    )
    assert (call.values, call.width, call.wants_interrupt) == ((11, 12, 13, 14), 64, True)
    assert guest.slots.answer(call, (None, 22, None, 1 << 64 | 44))
    assert guest.values(1) == (11, 22, 13, 44)
    assert guest.word(slots.STATE_AT, 1) == slots.STATE_ANSWERED
    assert guest.word(slots.ANSWERED_AT, 1) == 5
    assert guest.word(slots.FLAGS_AT, 1) == slots.FLAG_INTERRUPT | 0b1010 << 8
    assert not guest.slots.answer(call, (1, 1, 1, 1)), "once"
    assert guest.values(1) == (11, 22, 13, 44)


def test_a_32_bit_call_has_32_bit_values() -> None:
    guest = Guest()
    guest.fill(flags=slots.FLAG_32BIT | slots.PAGING_PAE, space=0x5_0000_1000)
    struct.pack_into("<Q", guest.memory, slot_offset(0) + 8, 0x1_0000_0002)
    call = guest.slots.take(0)
    assert call is not None
    assert (call.width, call.values[0], call.space) == (32, 2, 0x1000)
    assert call.paging == slots.PAGING_PAE
    guest.slots.answer(call, (0x7_FFFF_FFFF, None, None, None))
    assert guest.values()[0] == 0xFFFF_FFFF


def test_what_a_guest_writes_after_its_ring_changes_nothing() -> None:
    guest = Guest()
    guest.fill(0, 1)
    call = guest.slots.take(0)
    assert call is not None
    guest.memory[slot_offset(0) : slot_offset(0) + 64] = b"\xff" * 64
    assert guest.slots.answer(call, (None, 2, None, None))
    assert guest.values() == (11, 2, 13, 14)
    assert guest.word(slots.STATE_AT) == slots.STATE_ANSWERED
    assert guest.word(slots.ANSWERED_AT) == 1


def test_a_number_is_taken_once() -> None:
    guest = Guest()
    guest.fill(0, 1)
    call = guest.slots.take(0)
    assert call is not None
    assert guest.slots.take(0) is None, "while it is open"
    guest.slots.answer(call, (1, None, None, None))
    assert guest.slots.take(0) is None, "after it was answered"
    assert guest.slots.repeated == 2
    assert guest.word(slots.STATE_AT) == slots.STATE_ANSWERED
    guest.fill(0, 1)
    assert guest.slots.take(0) is None, "asked anew with the number of before"
    assert guest.word(slots.STATE_AT) == slots.STATE_UNMATCHED, "its caller does not wait for ever"
    guest.fill(0, 2)
    assert guest.slots.take(0) is not None


def test_a_ring_without_a_call_is_counted_and_nothing_else() -> None:
    guest = Guest()
    before = bytes(guest.memory)
    assert guest.slots.take(0) is None
    for state in (2, 3, 4, 0xFFFF_FFFF):
        guest.fill(0, 9, state=state)
        assert guest.slots.take(0) is None
    guest.fill(0, 0, state=0)
    guest.memory[slot_offset(0) : slot_offset(0) + 64] = bytes(64)
    assert bytes(guest.memory) == before
    assert guest.slots.repeated + guest.slots.ignored == 5
    assert guest.slots.open_calls == []


@pytest.mark.parametrize("slot", [-1, COUNT, 1 << 40])
def test_a_slot_that_is_not_there_cannot_be_taken(slot: int) -> None:
    with pytest.raises(IndexError):
        Guest().slots.take(slot)


def test_a_held_call_shows_so_and_is_answered_later() -> None:
    guest = Guest()
    guest.fill()
    call = guest.slots.take(0)
    assert call is not None
    assert guest.slots.hold(call)
    assert guest.word(slots.STATE_AT) == guest.slots.state(0) == slots.STATE_TAKEN
    assert guest.slots.decline(call)
    assert guest.word(slots.STATE_AT) == slots.STATE_UNMATCHED
    assert guest.values() == (11, 12, 13, 14)
    assert not guest.slots.hold(call)
    assert guest.word(slots.STATE_AT) == slots.STATE_UNMATCHED


def test_a_reset_forgets_open_calls_and_their_answers_go_nowhere() -> None:
    guest = Guest()
    guest.fill(0, 1)
    call = guest.slots.take(0)
    assert call is not None
    generation = guest.slots.generation
    assert guest.slots.reset() == [call]
    assert guest.slots.generation != generation
    assert not guest.slots.answer(call, (1, 1, 1, 1))
    assert not guest.slots.decline(call)
    assert guest.values() == (0, 0, 0, 0)
    guest.fill(0, 1)
    assert guest.slots.take(0) is not None, "the guest of now counts from 1, too"


def test_spaces_are_those_of_the_page_of_the_kernel() -> None:
    guest = Guest()
    assert guest.slots.space_of(1) is None
    slots.SPACE.pack_into(guest.memory, 4096 + 16, 0x7000, slots.PAGING_5_LEVELS | 1, 0xABCD)
    assert guest.slots.space_of(1) == Space(0x7000, slots.PAGING_5_LEVELS)
    assert guest.slots.space_of(2) is None


def test_the_payload_is_that_of_its_slot_and_ends_with_its_page() -> None:
    guest = Guest()
    guest.slots.write_payload(1, 64, b"hello")
    assert guest.slots.read_payload(1, 65, 4) == b"ello"
    assert guest.slots.read_payload(1, 64, slots.PAYLOAD_SIZE).startswith(b"hello\0")
    assert guest.slots.read_payload(2, 64, 5) == bytes(5)
    for offset, size in ((63, 1), (4095, 2), (64, 4033), (-1, 1), (1 << 64, 1), (4097, 0)):
        with pytest.raises(ValueError, match="payload"):
            guest.slots.read_payload(1, offset, size)
    with pytest.raises(ValueError, match="payload"):
        guest.slots.write_payload(1, 0, b"header")


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Slots(memoryview(bytearray(4096)), 1)


def test_the_mailbox_cannot_be_cut_short_or_grown() -> None:
    with Mailbox(2) as mailbox:
        for size in (0, mailbox.size * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(mailbox.descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(mailbox.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        header = os.pread(mailbox.descriptor, 64, 0)
        assert struct.unpack_from("<9I", header)[8] == mailbox.slots.generation


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 1), st.binary(min_size=64, max_size=64)),
            st.tuples(st.just("call"), st.integers(0, 1), st.integers(0, 3)),
            st.tuples(st.just("ring"), st.integers(0, 1), st.none()),
            st.tuples(st.just("answer"), st.integers(0, 1), st.integers(0, 1 << 65)),
            st.tuples(st.just("hold"), st.integers(0, 1), st.none()),
            st.tuples(st.just("reset"), st.just(0), st.none()),
        ),
        max_size=40,
    )
)
def test_whatever_a_guest_does_each_taken_call_is_answered_once(steps: list[tuple]) -> None:
    guest = Guest(2)
    opened: dict[int, slots.Call] = {}
    answered: dict[int, int] = {}
    for kind, slot, what in steps:
        if kind == "write":
            guest.memory[slot_offset(slot) : slot_offset(slot) + 64] = what
        elif kind == "call":
            guest.fill(slot, what)
        elif kind == "ring":
            call = guest.slots.take(slot)
            if call is not None:
                assert slot not in opened
                assert call.number != answered.get(slot, 0)
                opened[slot] = call
        elif kind == "answer" and slot in opened:
            call = opened.pop(slot)
            answered[slot] = call.number
            assert guest.slots.answer(call, (what, None, None, None))
            assert guest.word(slots.STATE_AT, slot) == slots.STATE_ANSWERED
            assert not guest.slots.answer(call, (what, None, None, None))
        elif kind == "hold" and slot in opened:
            assert guest.slots.hold(opened[slot])
        elif kind == "reset":
            assert guest.slots.reset() == list(opened.values())
            opened.clear()
            answered.clear()
        assert {call.slot: call for call in guest.slots.open_calls} == opened
