"""Guest memory whose accesses taps see."""

from vmibridge.engine.vm_taps import Taps
from vmibridge.errors import GuestMemoryError
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["TappedMemory"]


class TappedMemory:
    """Physical memory whose accesses taps see."""

    __slots__ = ("_physical", "_taps")

    def __init__(self, physical: PhysicalMemory, taps: Taps) -> None:
        self._physical = physical
        self._taps = taps

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes. Raises what the memory behind it raises."""
        taps = self._taps
        own = taps.stepping
        if own is not None:
            taps.reading.add(own)
        try:
            data = await self._physical.read_physical(event, address, size)
            if taps.read(event, address, size, data, None):
                await taps.room()
        except GuestMemoryError as error:
            taps.read(event, address, size, None, error.reason)
            raise
        finally:
            if own is not None:
                taps.reading.discard(own)
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or nothing. Raises what the memory behind it raises."""
        taps = self._taps
        own = taps.stepping
        if own is not None:
            taps.reading.add(own)
        try:
            await self._physical.write_physical(event, address, data)
            if taps.wrote(event, address, data, None):
                await taps.room()
        except GuestMemoryError as error:
            taps.wrote(event, address, data, error.reason)
            raise
        finally:
            if own is not None:
                taps.reading.discard(own)
