"""Disks for guests whose state is saved."""

import struct


def empty_disk(path, size=64 << 20, cluster=16):
    """A qcow2 image, for snapshots (QEMU, docs/interop/qcow2)."""
    count = 1 << cluster
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, cluster, size, 0, 1, 3 * count, count, 1, 0, 0),
        *(0, 0, 0, 4, 104),
    )
    table = struct.pack(">Q", 2 * count)
    counts = struct.pack(">4H", 1, 1, 1, 1)
    path.write_bytes(b"".join(part.ljust(count, b"\0") for part in (header, table, counts, b"")))
    return path
