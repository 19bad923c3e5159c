"""What a trap asks, and whether it is ours to answer: the same for engine, transport and recording.

- Reading never raises here. A trap may carry no request (`UnsupportedTrapError`: port I/O, an
  MSR), and one out of a file or from a peer may have registers that no machine has (`ValueError`:
  a negative one). Neither has an answer, so both are `None`.
- A trap that is not ours runs as if vmibridge were not there. So the engine,
  and an agent without its server, decide that by the same test.
"""

from typing import Literal, TypeAlias

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import is_guest_request, read_packet
from vmibridge.errors import UnsupportedTrapError
from vmibridge.vm.trap import TrapEvent, TrapFilter, TrapReason

RetryKey: TypeAlias = tuple[int, int, int, int, int]
"""Made by `retry_key`."""

NativeReason: TypeAlias = Literal["no request", "another magic", "no signature"]
"""Why a trap is not ours: it carries no request that can be read, one with a magic that no
handler has, or a hypercall of the guest's own, without the signature of Xen's guest request."""


_HYPERCALLS = frozenset((TrapReason.VMCALL, TrapReason.VMMCALL))


def request_in(event: TrapEvent) -> BridgePacket | None:
    """The request that a trap carries; `None`: there is none that can be read."""
    try:
        return read_packet(event)
    except (UnsupportedTrapError, ValueError):
        return None


def own_request(
    event: TrapEvent, traps: TrapFilter, *, other_hypercalls: bool
) -> BridgePacket | None:
    """The request of a trap that a handler, or the fallback, answers; `None`: it runs natively.

    `traps` is what the backend was armed with: it may be coarser than that, as one that can stop
    at every CPUID or at none. `other_hypercalls` is the backend's attribute: the guest has
    hypercalls of its own, whose registers may have a magic by chance, so the signature of Xen's
    guest request is needed, too. CPUID and a call by a device are no hypercalls, and
    have no signature.
    """
    # On the path of every trap: one function, without calls that could be saved.
    try:
        packet = read_packet(event)
    except (UnsupportedTrapError, ValueError):
        return None
    if not traps.wants(event.reason, packet.magic):
        return None
    if other_hypercalls and event.reason in _HYPERCALLS and not is_guest_request(event):
        return None
    return packet


def why_native(event: TrapEvent, traps: TrapFilter) -> NativeReason:
    """Why `own_request` has found none in this trap, given the same filter.

    Apart from it, since that is on the path of every trap.
    """
    packet = request_in(event)
    if packet is None:
        return "no request"
    return "no signature" if traps.wants(event.reason, packet.magic) else "another magic"


def retry_key(event: TrapEvent, packet: BridgePacket) -> RetryKey:
    """Which requests may be a retry of this one, as far as routing goes: to the server, or to the
    handlers, that told the guest to wait.

    With the ring: what was begun for a program may not go on with a kernel's rights. Without the
    values: which of them make another request is for the handler to say (`retry_values`), and the
    engine that gets the trap decides by a finer key.
    """
    return event.caller, event.ring, packet.magic, packet.request, packet.method
