"""Call slots: how a guest puts a call into memory that it shares with the host, and is answered.

Sans-I/O: this is layout, states and numbers over any writable buffer. Who rings, and how the answer
is announced, is the carrier's.

The device's memory, in pages of 4096 bytes; all integers are little-endian:

| page | what | traps |
|---|---|---|
| 0 | header, which the guest only reads | never |
| 1 | the spaces of slots, which the guest's kernel writes (`Space`) | never |
| 2 + 2n | the doorbell of slot n | with vfio-user; with ivshmem it is of no use |
| 3 + 2n | slot n | never |

The header: see `HEADER`. A slot (`CALL` is its first 64 bytes):

| offset | bytes | field |
|---|---|---|
| 0 | 4 | magic |
| 4 | 2 | request |
| 6 | 2 | method |
| 8 | 32 | value1 to value4; those that an answer has are written over |
| 40 | 4 | state, below |
| 44 | 4 | flags, `FLAG_*`; in an answer also which values it has |
| 48 | 8 | space: what addresses are in, below |
| 56 | 4 | number of the call: any other than that of the slot's last answered call |
| 60 | 4 | number of the answered call |
| 64 | 4032 | payload, for a caller that knows no addresses |

States: the guest writes `STATE_CALLED`, then rings; the host writes the others.

| state | meaning |
|---|---|
| 0 `STATE_IDLE` | no call yet |
| 1 `STATE_CALLED` | the guest calls |
| 2 `STATE_ANSWERED` | the answer is in value1 to value4 |
| 3 `STATE_TAKEN` | the host has taken the call; look again, or wait for the interrupt |
| 4 `STATE_UNMATCHED` | no answer: the call is of no handler, or the server has stopped |

Space: 0, addresses are physical; 1 (`SPACE_SLOT`), they are offsets in this slot; else the root of
the caller's page tables (CR3). What of it is believed is for the backend to decide.

Invariants
----------

- A guest may write at any time. So the host copies the 64 bytes of a call once and decides by the
  copy; it keeps on its own side which slots are busy, and which number was answered last.
- A number is taken once: to ring again for it, while it is answered or after, changes nothing.
- The state is the last that is written of an answer, in one store.
- Nothing here allocates by what a guest says.
"""

import struct
from collections.abc import Sequence
from typing import Final

import msgspec

__all__ = [
    "DOORBELL_CALL",
    "DOORBELL_CANCEL",
    "Call",
    "Limits",
    "Slots",
    "Space",
    "doorbell_offset",
    "memory_size",
    "shared_areas",
    "slot_of_doorbell",
    "slot_offset",
]

PAGE: Final = 4096
MAGIC: Final = 0x42494D56
"""`VMIB` at offset 0 of the header."""
VERSION: Final = 1
MAX_SLOTS: Final = 256
"""As many as page 1 has spaces for."""

HEADER: Final = struct.Struct("<16I")
"""Magic, version, slots, bytes of a slot; the offsets of the first doorbell and of the first slot,
the bytes from one to the next, the offset of the payload in a slot; the generation, which changes
with each reset and each server, and is 0 when the server has stopped; the microseconds that a
doorbell may be held, the milliseconds after which QEMU gives an access up (0: unknown), the
interrupts; how many slots from 0 are the kernel's; three that are 0."""
GENERATION_AT: Final = 32
SPACE: Final = struct.Struct("<QII")
"""An entry of page 1, at 16 times the slot: root, flags with the paging mode, and 4 bytes for the
kernel's own use."""

CALL: Final = struct.Struct("<IHH4QIIQII")
VALUES_AT: Final = 8
STATE_AT: Final = 40
FLAGS_AT: Final = 44
SPACE_AT: Final = 48
NUMBER_AT: Final = 56
ANSWERED_AT: Final = 60
PAYLOAD_AT: Final = 64
PAYLOAD_SIZE: Final = PAGE - PAYLOAD_AT

STATE_IDLE: Final = 0
STATE_CALLED: Final = 1
STATE_ANSWERED: Final = 2
STATE_TAKEN: Final = 3
STATE_UNMATCHED: Final = 4

FLAG_32BIT: Final = 1 << 0
"""The caller's values and addresses have 32 bits."""
FLAG_INTERRUPT: Final = 1 << 1
"""The caller wants an interrupt when an answer comes that its doorbell did not wait for."""
FLAG_PAGING: Final = 3 << 4
"""The paging mode of the space: `PAGING_*`."""
FLAG_ANSWERED: Final = 0xF << 8
"""In an answer, bits 8 to 11: it has value1 to value4."""
_ANSWERED_BIT: Final = 8

PAGING_4_LEVELS: Final = 0 << 4
PAGING_5_LEVELS: Final = 1 << 4
PAGING_PAE: Final = 2 << 4
PAGING_32BIT: Final = 3 << 4

SPACE_PHYSICAL: Final = 0
SPACE_SLOT: Final = 1

DOORBELL_CALL: Final = 0
"""In a doorbell's page: a write of any value calls; a read gives the slot's state."""
DOORBELL_CANCEL: Final = 4
"""A write of a call's number cancels that call, if it is the one that is open."""

_MASK32: Final = 0xFFFF_FFFF
_MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
_VALUES = struct.Struct("<4Q")


def doorbell_offset(slot: int) -> int:
    """Where the doorbell of a slot is in the device's memory."""
    return (2 + 2 * slot) * PAGE


def slot_offset(slot: int) -> int:
    """Where a slot is in the device's memory."""
    return (3 + 2 * slot) * PAGE


def slot_of_doorbell(offset: int, slots: int) -> tuple[int, int] | None:
    """The slot whose doorbell page this offset is in, and the offset there; `None`: in none."""
    page, within = divmod(offset, PAGE)
    if page % 2 or not 2 <= page < 2 + 2 * slots:
        return None
    return page // 2 - 1, within


def memory_size(slots: int) -> int:
    """Bytes of the device's memory, a power of two as a BAR has it. Raises `ValueError`."""
    if not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"{slots} slots: there are 1 to {MAX_SLOTS}")
    return 1 << ((2 + 2 * slots) * PAGE - 1).bit_length()


def shared_areas(slots: int) -> tuple[tuple[int, int], ...]:
    """Offset and size of what of it never traps, in their order."""
    return ((0, 2 * PAGE), *((slot_offset(slot), PAGE) for slot in range(slots)))


class Limits(msgspec.Struct, frozen=True):
    """What the header says of the carrier."""

    hold_us: int = 0
    """Microseconds that the doorbell waits for an answer, at most."""
    timeout_ms: int = 0
    """Milliseconds after which QEMU gives an access up; 0: not known, or there are none."""
    vectors: int = 0
    """Interrupts; a slot has that of its number modulo these."""
    kernel_slots: int = 0
    """Slots, from 0, that the guest's kernel vouches for."""


class Space(msgspec.Struct, frozen=True):
    """An address space: the root of its page tables, and how they are walked."""

    root: int
    paging: int
    """One of `PAGING_*`."""


class Call(msgspec.Struct, frozen=True, gc=False):
    """A call, as it stood in its slot when it was taken."""

    slot: int
    number: int
    magic: int
    request: int
    method: int
    values: tuple[int, int, int, int]
    """With `FLAG_32BIT` their low 32 bits."""
    flags: int
    space: int

    @property
    def width(self) -> int:
        """The bits of values and addresses."""
        return 32 if self.flags & FLAG_32BIT else 64

    @property
    def paging(self) -> int:
        """One of `PAGING_*`; for a space that is a root."""
        return self.flags & FLAG_PAGING

    @property
    def wants_interrupt(self) -> bool:
        """Whether a late answer is to be announced."""
        return bool(self.flags & FLAG_INTERRUPT)


class Slots:
    """All slots of one device, over its memory. Raises `ValueError` for a size that does not fit.

    What `memory` holds before is wiped. Not safe for threads: its caller has a lock, or one thread.
    """

    def __init__(
        self,
        memory: memoryview,
        count: int,
        limits: Limits | None = None,
        *,
        generation: int = 1,
    ) -> None:
        if memory.nbytes < memory_size(count):
            raise ValueError(f"{memory.nbytes} bytes are too few for {count} slots")
        self.count = count
        self.limits: Limits = limits or Limits()
        self.generation: int = generation & _MASK32
        """Changes with each reset; a driver that sees another one begins anew."""
        self.repeated: int = 0
        """Rings for a call that was taken before."""
        self.ignored: int = 0
        """Rings of a slot without a call in it."""
        self._memory = memory.cast("B")
        # One store of 32 bits each, which a vCPU sees whole; that of `struct` is byte by byte.
        self._words = self._memory.cast("I")
        self._open: dict[int, Call] = {}
        self._answered = [0] * count
        self._wipe()

    def release(self) -> None:
        """Let go of the memory, so that it can be unmapped; nothing else may be called then."""
        self._words.release()
        self._memory.release()

    def reset(self) -> list[Call]:
        """The guest was reset: wipe everything. Returns the calls that were open.

        Those are not open any more, so nothing that is left of them reaches the slots.
        """
        abandoned = list(self._open.values())
        self._open.clear()
        self._answered = [0] * self.count
        self.generation = self.generation + 1 & _MASK32 or 1
        self._wipe()
        return abandoned

    def _wipe(self) -> None:
        self._memory[: 2 * PAGE] = bytes(2 * PAGE)
        for slot in range(self.count):
            at = slot_offset(slot)
            self._memory[at : at + PAGE] = bytes(PAGE)
        limits = self.limits
        HEADER.pack_into(
            self._memory,
            0,
            *(MAGIC, VERSION, self.count, PAGE),
            *(doorbell_offset(0), slot_offset(0), 2 * PAGE, PAYLOAD_AT),
            *(self.generation, limits.hold_us, limits.timeout_ms, limits.vectors),
            *(limits.kernel_slots, 0, 0, 0),
        )

    def take(self, slot: int) -> Call | None:
        """The call of a slot whose doorbell rang, which is open from here on.

        `None`, and the ring is counted: the slot is busy, its call was answered before, or there is
        no call in it. Raises `IndexError` for a slot that is not there.
        """
        if not 0 <= slot < self.count:
            raise IndexError(f"there is no slot {slot}")
        at = slot_offset(slot)
        copy = bytes(self._memory[at : at + CALL.size])
        magic, request, method, *values, state, flags, space, number, _ = CALL.unpack(copy)
        if slot in self._open or (state != STATE_CALLED and number == self._answered[slot]):
            self.repeated += 1
            return None
        if state != STATE_CALLED:
            self.ignored += 1
            return None
        if number == self._answered[slot]:
            # The caller waits for an answer to it, and there is none.
            self.repeated += 1
            self._store(at + STATE_AT, STATE_UNMATCHED)
            return None
        if flags & FLAG_32BIT:
            values = [value & _MASK32 for value in values]
            space &= _MASK32
        value1, value2, value3, value4 = values
        call = Call(
            slot, number, magic, request, method, (value1, value2, value3, value4), flags, space
        )
        self._open[slot] = call
        return call

    def open_call(self, slot: int) -> Call | None:
        """The call that a slot waits for; `None`: for none."""
        return self._open.get(slot)

    def end(self) -> None:
        """The server stops: whoever still waits gets no answer. The generation of none is 0."""
        self._open.clear()
        for slot in range(self.count):
            if self.state(slot) in (STATE_CALLED, STATE_TAKEN):
                self._store(slot_offset(slot) + STATE_AT, STATE_UNMATCHED)
        self._store(GENERATION_AT, 0)

    @property
    def open_calls(self) -> list[Call]:
        """All calls that were taken and not answered."""
        return list(self._open.values())

    def hold(self, call: Call) -> bool:
        """The answer comes later than the doorbell waits: say so. `False`: the call is not open."""
        if self._open.get(call.slot) is not call:
            return False
        self._store(slot_offset(call.slot) + STATE_AT, STATE_TAKEN)
        return True

    def answer(self, call: Call, values: Sequence[int | None]) -> bool:
        """Write an answer: of value1 to value4 those that are not `None`.

        `False`, and nothing is written: the call is not open, because of a reset.
        """
        if self._open.get(call.slot) is not call:
            return False
        at = slot_offset(call.slot)
        mask = _MASK32 if call.flags & FLAG_32BIT else _MASK64
        holds = 0
        # Absent values stay as they were asked, whatever was written over them since.
        written = list(call.values)
        for index, value in enumerate(values):
            if value is not None:
                written[index] = value & mask
                holds |= 1 << (_ANSWERED_BIT + index)
        _VALUES.pack_into(self._memory, at + VALUES_AT, *written)
        self._store(at + FLAGS_AT, call.flags & ~FLAG_ANSWERED | holds)
        self._end(call, STATE_ANSWERED)
        return True

    def decline(self, call: Call) -> bool:
        """The call gets no answer, as if nobody were there. `False`: it is not open."""
        if self._open.get(call.slot) is not call:
            return False
        self._store(slot_offset(call.slot) + FLAGS_AT, call.flags & ~FLAG_ANSWERED)
        self._end(call, STATE_UNMATCHED)
        return True

    def _end(self, call: Call, state: int) -> None:
        at = slot_offset(call.slot)
        del self._open[call.slot]
        self._answered[call.slot] = call.number
        self._store(at + ANSWERED_AT, call.number)
        self._store(at + STATE_AT, state)

    def state(self, slot: int) -> int:
        """What a read of the doorbell gives: the state in the slot, which the guest may have
        written."""
        return self._words[(slot_offset(slot) + STATE_AT) // 4]

    def space_of(self, slot: int) -> Space | None:
        """The space that the guest's kernel has entered for a slot in page 1; `None`: none."""
        root, flags, _ = SPACE.unpack_from(self._memory, PAGE + slot * SPACE.size)
        return Space(root, flags & FLAG_PAGING) if root else None

    def read_payload(self, slot: int, offset: int, size: int) -> bytes:
        """Bytes of the payload, by their offset in the slot. Raises `ValueError` outside of it."""
        at = self._payload(slot, offset, size)
        return bytes(self._memory[at : at + size])

    def write_payload(self, slot: int, offset: int, data: bytes) -> None:
        """Write all of `data` there. Raises `ValueError` outside of the payload."""
        at = self._payload(slot, offset, len(data))
        self._memory[at : at + len(data)] = data

    @staticmethod
    def _payload(slot: int, offset: int, size: int) -> int:
        if size < 0 or not PAYLOAD_AT <= offset <= PAGE - size:
            raise ValueError(f"{size} bytes are not in the payload of a slot")
        return slot_offset(slot) + offset

    def _store(self, offset: int, value: int) -> None:
        self._words[offset // 4] = value
