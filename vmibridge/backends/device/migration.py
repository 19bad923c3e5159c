"""What makes QEMU refuse to migrate or to save a guest that has the device.

`vfio-user-pci` (QEMU 11.1) takes part in neither, and does not say so: after `-incoming` or
`loadvm` the guest's calls go nowhere. But QEMU refuses both while it has an image open whose
format does not migrate, as VDI, and names the block node in its message (`vdi_open` in QEMU's
block/vdi.c). So an image that no device uses is opened read-only, and the name of its node says
what to do.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

__all__ = [
    "BLOCKER_NAME",
    "blocker_arguments",
    "blocker_properties",
    "write_blocker",
]

BLOCKER_NAME: Final = "unplug-vmibridge-first"
"""The node, which QEMU names when it refuses. Names of nodes have at most 31 characters."""
_SECTOR: Final = 512
_BLOCK: Final = 1 << 20
_UNALLOCATED: Final = 0xFFFF_FFFF


def write_blocker(path: Path) -> None:
    """Write an image of one block that is not allocated: 1 KiB. Raises `OSError`.

    Layout: QEMU, block/vdi.c, `VdiHeader`, version 1.1.
    """
    image = bytearray(2 * _SECTOR)
    text = b"<<< vmibridge: an image without data >>>\n"
    image[: len(text)] = text
    # Signature, version, size of the header from 0x48 on, type 1 (dynamic).
    struct.pack_into("<IIII", image, 0x40, 0xBEDA_107F, 0x0001_0001, 0x190, 1)
    # Where the map of blocks begins, and where data would.
    struct.pack_into("<II", image, 0x154, _SECTOR, 2 * _SECTOR)
    struct.pack_into("<I", image, 0x168, _SECTOR)
    # Bytes of the disk, bytes of a block, extra bytes of a block, blocks, blocks allocated.
    struct.pack_into("<QIIII", image, 0x170, _BLOCK, _BLOCK, 0, 1, 0)
    struct.pack_into("<I", image, _SECTOR, _UNALLOCATED)
    path.write_bytes(image)


def blocker_properties(path: Path) -> Mapping[str, str | bool | dict[str, str]]:
    """Of `-blockdev` and `blockdev-add`, for an image that `write_blocker` wrote."""
    return {
        "driver": "vdi",
        "node-name": BLOCKER_NAME,
        "read-only": True,
        "file": {"driver": "file", "filename": str(path.absolute())},
    }


def blocker_arguments(path: Path) -> list[str]:
    """For QEMU's command line."""
    return ["-blockdev", msgspec.json.encode(blocker_properties(path)).decode()]
