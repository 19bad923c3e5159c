"""What a handler gets beside the packet: the trap, and the guest's memory.

A request that outlives its soft deadline loses its trap, and gets another one when the
guest sends it again: `event` is then the new one. Its memory waits in between.
"""

from vmibridge.vm.memory import GuestMemory, PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["BridgeContext"]


class BridgeContext:
    """The guest at one request. It ends with the final answer to it."""

    __slots__ = ("_closed", "_memory", "_physical", "event")

    def __init__(self, event: TrapEvent, physical: PhysicalMemory) -> None:
        self.event: TrapEvent = event
        """The trap; after a soft deadline the one that was answered WAIT, until the retry."""
        self._physical = physical
        self._closed = False
        self._memory: GuestMemory | None = None

    @property
    def memory(self) -> GuestMemory:
        """Guest memory by virtual and physical address."""
        if self._memory is None:
            self._memory = GuestMemory(self._physical, self.event)
            if self._closed:
                self._memory.close()
        return self._memory

    @property
    def vm(self) -> str:
        """The name of the VM."""
        return self.event.vm

    @property
    def vcpu(self) -> int:
        """The number of the vCPU, from 0."""
        return self.event.vcpu

    def park(self) -> None:
        """The guest runs on for now: accesses to its memory wait for `attach`."""
        self.memory.park()

    def attach(self, event: TrapEvent) -> None:
        """Go on with the trap of a retry."""
        self.event = event
        self.memory.attach(event)

    def close(self) -> None:
        """Cut the handler off from the guest, which runs again."""
        # Most handlers never look at memory, and then it is never made.
        self._closed = True
        if self._memory is not None:
            self._memory.close()
