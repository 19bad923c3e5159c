"""Guest memory whose accesses taps see."""

from vmibridge.engine.taps import Taps
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["TappedMemory"]


class TappedMemory:
    """Physical memory whose accesses taps see."""

    __slots__ = ("_physical", "_reading", "_taps")

    def __init__(self, physical: PhysicalMemory, taps: Taps) -> None:
        self._physical = physical
        self._taps = taps
        self._reading = taps.reading

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises what the memory behind it raises."""
        self._reading.add(event.seq)
        try:
            data = await self._physical.read_physical(event, address, size)
        except GuestMemoryError as error:
            self._taps.read(event, address, size, None, error.reason)
            raise
        finally:
            self._reading.discard(event.seq)
        if self._taps.read(event, address, size, data, None):
            await self._taps.room()
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or nothing. Raises what the memory behind it raises."""
        self._reading.add(event.seq)
        try:
            await self._physical.write_physical(event, address, data)
        except GuestMemoryError as error:
            self._taps.wrote(event, address, data, error.reason)
            raise
        finally:
            self._reading.discard(event.seq)
        if self._taps.wrote(event, address, data, None):
            await self._taps.room()
