"""The fault soak: the memory of the guest, of which some works, and some does not."""

import anyio
from soak_kinds import BROKEN, DELAY, DELAYED, HUGE, MEMORY, STUCK
from soak_lanes import Lane
from soak_ledger import Ledger

from vmibridge import GuestMemoryError
from vmibridge.errors import BackendError
from vmibridge.vm.backend import Backend


class FaultyMemory(Backend):
    """The part of the guest that is asked for memory; checks that the vCPU stands still."""

    lanes: list[Lane]
    _ledger: Ledger
    _memory: bytearray
    _huge: bytes

    async def read_physical(self, event, address, size):
        self._check_that_it_stands_still(event)
        if address == BROKEN:
            raise BackendError("the VM does not say")
        if address == STUCK:
            await anyio.sleep_forever()
        if address == HUGE:
            return self._huge
        if DELAYED <= address < DELAYED + MEMORY:
            await anyio.sleep(DELAY)
            self._check_that_it_stands_still(event)
            address -= DELAYED
        if address + size > MEMORY:
            raise GuestMemoryError(address, "not mapped")
        return bytes(self._memory[address : address + size])

    async def write_physical(self, event, address, data):
        self._check_that_it_stands_still(event)
        if address + len(data) > MEMORY:
            raise GuestMemoryError(address, "not mapped")
        self._memory[address : address + len(data)] = data

    def _check_that_it_stands_still(self, event) -> None:
        opened = self.lanes[event.vcpu].open
        if not opened or opened[0].seq != event.seq or opened[0].answered:
            self._ledger.wrong(f"memory is accessed for trap {event.seq}, which is not at hand")
