"""Greet the guest: the smallest handler, to try a guest with and to copy from.

| any method | in | out |
|---|---|---|
| value1 | address of a name: UTF-8, at most 256 bytes, then a NUL | status |
| value2 | address of a buffer for the greeting, or 0 | length of the greeting in bytes |
| value3 | capacity of the buffer in bytes; 0 stands for 256 | |

The greeting goes into the buffer with a NUL behind it, which its length does not count.

| status | when |
|---|---|
| invalid parameters | a name that is empty, too long, no UTF-8 or not readable |
| | a buffer that is not writable |
| failed, native ERANGE | the buffer is too small: value2 is the capacity that it takes |

The native code is in the upper half of the status, which an x86 guest does not see.
"""

import errno

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    GuestMemoryError,
    Status,
    StatusKind,
)

MAX_NAME = 256
"""Bytes of a name, without its NUL."""
DEFAULT_CAPACITY = 256
"""Bytes of a buffer whose capacity is given as 0, as by every x86 VMCALL."""


class Hello(BridgeHandler[str]):
    """Answers every method with a greeting, which is also its output."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0001
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4
    may_wait = True
    wait = BridgeResponse(Status(kind=StatusKind.WAITING).encode())

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Greet by name; see the table of this module."""
        stage = packet.method & 0xFF
        invalid = Status(stage, StatusKind.INVALID_PARAMETERS).encode()
        try:
            name = (await vmi.memory.read_c_string(packet.value1, MAX_NAME)).decode()
            if not name:
                return BridgeResponse(invalid, 0)
            greeting = f"Hello, {name}!"
            data = greeting.encode()
            if packet.value2:
                if len(data) + 1 > (packet.value3 or DEFAULT_CAPACITY):
                    too_small = Status(stage, StatusKind.FAILED, native=errno.ERANGE)
                    return BridgeResponse(too_small.encode(), len(data) + 1)
                await vmi.memory.write(packet.value2, data + b"\0")
        except (GuestMemoryError, UnicodeDecodeError):
            return BridgeResponse(invalid, 0)
        return BridgeResponse(Status(stage).encode(), len(data), output=greeting)
