"""The PCI device that a guest finds: its config space.

One 32-bit memory BAR and MSI. Not MSI-X: QEMU 11.1.3 aborts when a device with MSI-X is unplugged.

QEMU answers the guest's sizing of the BAR and keeps MSI itself. Here stands what the device has,
and what a guest may write into it (PCI Local Bus Specification 3.0, sections 6.1 and 6.8).
"""

import struct
from typing import Final

__all__ = ["CONFIG_SIZE", "DEVICE_ID", "MAX_VECTORS", "VENDOR_ID", "ConfigSpace"]

VENDOR_ID: Final = 0x1234
"""The range of QEMU's own test devices."""
DEVICE_ID: Final = 0x564D
"""`VM`."""
CONFIG_SIZE: Final = 256
MAX_VECTORS: Final = 8
"""As many descriptors as come with one message."""

_CLASS: Final = 0x0880
"""A system peripheral of no other kind."""
_CAPABILITIES, _STATUS_CAPABILITIES = 0x34, 0x10
_COMMAND_BITS = 0x0407
"""I/O, memory, bus master, no INTx."""
_INTERRUPT_LINE = 0x3C
_MSI, _MSI_ID, _MSI_64BIT = 0x40, 5, 1 << 7


class ConfigSpace:
    """Config space of a device with so many interrupts, a power of two up to `MAX_VECTORS`."""

    def __init__(self, vectors: int) -> None:
        if vectors not in (1, 2, 4, 8):
            raise ValueError(f"{vectors} interrupts: MSI has 1, 2, 4 or {MAX_VECTORS} here")
        self.vectors = vectors
        self._writable = bytearray(CONFIG_SIZE)
        struct.pack_into("<H", self._writable, 4, _COMMAND_BITS)
        self._writable[_INTERRUPT_LINE] = 0xFF
        # Enable, and how many are enabled; the address and the data.
        struct.pack_into("<H", self._writable, _MSI + 2, 0x71)
        self._writable[_MSI + 4 : _MSI + 14] = b"\xfc" + b"\xff" * 9
        self._bytes = bytearray(CONFIG_SIZE)
        self.reset()

    def reset(self) -> None:
        """As it is when the machine is switched on."""
        self._bytes[:] = bytes(CONFIG_SIZE)
        ids = (VENDOR_ID, DEVICE_ID, 0, _STATUS_CAPABILITIES, 0, 0, _CLASS)
        struct.pack_into("<HHHHBBH", self._bytes, 0, *ids)
        struct.pack_into("<HH", self._bytes, 0x2C, VENDOR_ID, DEVICE_ID)
        self._bytes[_CAPABILITIES] = _MSI
        control = _MSI_64BIT | (self.vectors.bit_length() - 1) << 1
        struct.pack_into("<BBH", self._bytes, _MSI, _MSI_ID, 0, control)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes; the caller has checked that they are there."""
        return bytes(self._bytes[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Write the bits that are writable, as far as the space goes."""
        for at, new in enumerate(data[: max(0, CONFIG_SIZE - offset)], offset):
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask & 0xFF | new & mask
