"""What QEMU's device `ivshmem-doorbell` wants to hear from its server, sans-I/O.

Numbers are 64 bits, signed, little-endian, each a message of its own; some carry a file descriptor.
Source: QEMU, docs/specs/ivshmem-spec.rst, "Interrupts" and "Messages".

| message | with the descriptor of |
|---|---|
| the version of this protocol, 0 | |
| the id of the guest | |
| -1 | the memory |
| `HOST`, once a vector | an eventfd: the guest rings it by `HOST << 16 \\| vector` at `DOORBELL` |
| the id of the guest, once a vector | an eventfd: the guest's MSI-X vector |

The doorbell's page of a slot is plain memory here. A guest that gives a call up writes its number
there, where vfio-user takes it, and rings.

That is all: the device sends nothing, and it needs the connection for nothing more. QEMU refuses
more vectors than its option `vectors` has; it asks for none that were not sent.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["GUEST", "HOST", "Message", "greeting"]

HOST: Final = 1
"""Our id as a peer of the guest."""
GUEST: Final = 0
"""The id of the guest, its register IVPosition."""
_VERSION: Final = 0
_MEMORY: Final = -1
_NUMBER: Final = struct.Struct("<q")


class Message(NamedTuple):
    """Bytes to send in one piece, and the descriptor to send with them."""

    data: bytes
    descriptor: int | None = None


def greeting(memory: int, doorbells: Sequence[int], interrupts: Sequence[int]) -> list[Message]:
    """All that a new device is sent, in its order.

    `memory` is the descriptor of the device's memory; `doorbells` are eventfds, by vector, that the
    guest rings, and `interrupts` those of its vectors.
    """
    return [
        Message(_NUMBER.pack(_VERSION)),
        Message(_NUMBER.pack(GUEST)),
        Message(_NUMBER.pack(_MEMORY), memory),
        *(Message(_NUMBER.pack(HOST), each) for each in doorbells),
        *(Message(_NUMBER.pack(GUEST), each) for each in interrupts),
    ]
