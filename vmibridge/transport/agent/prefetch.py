"""Guest memory that travels with a trap, because its handler is known to read it.

The server tells which of a request's values is an address, and how much is read there
(`GuestRead`). The agent reads it as the handler would, page tables included; what it touched
goes along by physical address. What cannot be read is left to the handler to find out.
"""

from collections.abc import Iterable

from vmibridge.bridge.contract import GuestRead
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.errors import GuestMemoryError
from vmibridge.transport.wire import MAX_PREFETCHED_PER_TRAP, WireRead, guest_read
from vmibridge.vm.backend import Backend
from vmibridge.vm.memory import GuestMemory
from vmibridge.vm.trap import TrapEvent

_MAX_PIECES = 256


class Prefetch:
    """The declared reads of one server. Raises `WireError` for an invalid one."""

    def __init__(self, backend: Backend, reads: Iterable[WireRead]) -> None:
        self._backend = backend
        self._reads: dict[tuple[int | None, int], list[GuestRead]] = {}
        for each in reads:
            key = (each.magic, each.request)
            self._reads.setdefault(key, []).append(guest_read(each))

    @property
    def wanted(self) -> bool:
        """Whether any trap takes memory along."""
        return bool(self._reads)

    def wants(self, event: TrapEvent) -> bool:
        """Whether this one does."""
        return bool(self._of(event)[1])

    def _of(self, event: TrapEvent) -> tuple[BridgePacket | None, list[GuestRead]]:
        packet = request_in(event)
        if packet is None:
            return None, []
        found = self._reads.get((packet.magic, packet.request)) or self._reads.get(
            (None, packet.request), []
        )
        return packet, [each for each in found if each.method in (None, packet.method)]

    async def read(self, event: TrapEvent) -> tuple[tuple[int, bytes], ...]:
        """The pieces for a trap: physical address and bytes."""
        packet, reads = self._of(event)
        seen = _Seen(self._backend)
        if packet is not None:
            memory = GuestMemory(seen, event)
            for each in reads:
                size = each.size
                if each.size_in is not None:
                    size = min(size, packet.values[each.size_in - 1])
                try:
                    await memory.read(packet.values[each.address - 1], size)
                except GuestMemoryError:
                    # The handler asks for it again, and gets the error.
                    continue
        return tuple(seen.pieces.items())


class _Seen:
    """Physical memory that keeps what was read."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.pieces: dict[int, bytes] = {}
        self._left = MAX_PREFETCHED_PER_TRAP

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        data = await self._backend.read_physical(event, address, size)
        if size > self._left or len(self.pieces) >= _MAX_PIECES:
            raise GuestMemoryError(address, "more than may travel with a trap")
        self._left -= size
        if len(self.pieces.get(address, b"")) < size:
            self.pieces[address] = bytes(data)
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        raise GuestMemoryError(address, "nothing is written before a handler asks for it")
