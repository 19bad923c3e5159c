"""What QEMU is given to have the device: arguments, `device_add`, and a domain of libvirt.

Guest memory has to be a memfd that is shared: then it is read here, and not through QEMU. With
ivshmem, which hands no memory over, it is a file that both know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

import msgspec

__all__ = [
    "DEVICE_NAME",
    "device_arguments",
    "device_properties",
    "ivshmem_arguments",
    "libvirt_domain",
]

DEVICE_NAME: Final = "vmibridge"
"""The id of the device in QEMU."""
_RAM: Final = "vmibridge-ram"

Property = str | int | dict[str, str]


def device_properties(socket: Path, timeout: float) -> Mapping[str, Property]:
    """Of `-device` and `device_add`; `timeout` in seconds is what the host has to know, too."""
    return {
        "driver": "vfio-user-pci",
        "id": DEVICE_NAME,
        # The device has no ROM.
        "rombar": 0,
        "x-msg-timeout": round(timeout * 1000),
        "socket": {"type": "unix", "path": str(socket.absolute())},
    }


def device_arguments(socket: Path, timeout: float, memory: int | None) -> list[str]:
    """For QEMU's command line; `memory`: bytes of the guest's, `None`: its backend is given.

    Only as JSON may an option have a value with parts.
    """
    properties = msgspec.json.encode(device_properties(socket, timeout)).decode()
    arguments = ["-device", properties]
    if memory is not None:
        ram = f"memory-backend-memfd,id={_RAM},size={memory},share=on"
        arguments = ["-object", ram, "-machine", f"memory-backend={_RAM}", *arguments]
    return arguments


def ivshmem_arguments(socket: Path, slots: int, memory: tuple[int, Path] | None) -> list[str]:
    """For QEMU's command line, with `ivshmem-doorbell`; `memory`: bytes of the guest's, and the
    file that it is in, `None`: the host reaches none."""
    chardev = f"{DEVICE_NAME}-slots"
    arguments = [
        *("-chardev", f"socket,id={chardev},path={_escaped(socket)}"),
        *("-device", f"ivshmem-doorbell,id={DEVICE_NAME},chardev={chardev},vectors={slots}"),
    ]
    if memory is not None:
        size, file = memory
        ram = f"memory-backend-file,id={_RAM},size={size},mem-path={_escaped(file)},share=on"
        arguments = ["-object", ram, "-machine", f"memory-backend={_RAM}", *arguments]
    return arguments


def _escaped(path: Path) -> str:
    """As a value among QEMU's options, where a comma is doubled."""
    return str(path.absolute()).replace(",", ",,")


def libvirt_domain(socket: Path, timeout: float) -> str:
    """What a domain of libvirt needs: the lines of its XML that are not there without."""
    properties = msgspec.json.encode(device_properties(socket, timeout)).decode()
    return f"""\
<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <memoryBacking>
    <source type="memfd"/>
    <access mode="shared"/>
  </memoryBacking>
  <qemu:commandline>
    <qemu:arg value="-device"/>
    <qemu:arg value={quoteattr(properties)}/>
  </qemu:commandline>
</domain>
"""
