"""What a handler gets beside the packet: the trap, and the guest's memory."""

from vmibridge.event import TrapEvent
from vmibridge.memory import GuestMemory, PhysicalMemory


class BridgeContext:
    """The guest at one trap. It ends with the answer to that trap."""

    __slots__ = ("_memory", "_physical", "event")

    def __init__(self, event: TrapEvent, physical: PhysicalMemory) -> None:
        self.event = event
        self._physical = physical
        self._memory: GuestMemory | None = None

    @property
    def memory(self) -> GuestMemory:
        """Guest memory by virtual and physical address."""
        if self._memory is None:
            self._memory = GuestMemory(self._physical, self.event)
        return self._memory

    @property
    def vm(self) -> str:
        """The name of the VM."""
        return self.event.vm

    @property
    def vcpu(self) -> int:
        """The number of the vCPU, from 0."""
        return self.event.vcpu

    def close(self) -> None:
        """Cut the handler off from the guest, which runs again."""
        self.memory.close()
