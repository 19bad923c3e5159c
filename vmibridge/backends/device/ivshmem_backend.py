"""Guests of QEMU that call through its device `ivshmem-doorbell`, which QEMUs have had for long.

    ivshmem:unix:/run/vmibridge.sock?slots=64&kernel=0&memory=FILE&mode=0o600&stay=false

- It is the server of that device: it listens, and a QEMU gets memory with slots in it, and two
  eventfds for each, its doorbell and its interrupt. One QEMU at a time.
- Lanes, spaces and answers are those of `DeviceBackend`. But no vCPU and no lock of QEMU's waits
  for anything here: the guest polls its slot, or waits for the interrupt if it asked for one.
- QEMU's memory is reached if it is a file that `memory` names (`memory-backend-file,share=on`).
- A reset of the machine is not seen. A guest sees that the host has stopped, not that it has died.
"""

import logging
import socket
from pathlib import Path
from typing import Annotated, Self

import anyio
import msgspec

from vmibridge.backends.device.backend import DeviceBackend, DeviceOptions
from vmibridge.backends.device.ivshmem_connection import IvshmemConnection
from vmibridge.backends.device.memory import GuestRanges
from vmibridge.backends.device.memory_file import FileRanges
from vmibridge.backends.device.slots import MAX_SLOTS
from vmibridge.errors import BackendError
from vmibridge.vm.spec import parse_options

log: logging.Logger = logging.getLogger(__name__)

__all__ = ["IvshmemBackend", "IvshmemOptions"]


class IvshmemOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an `ivshmem:` spec."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)] = 64
    """Calls that may be open at the same time; the device has as many `vectors`."""
    kernel: Annotated[int, msgspec.Meta(ge=0, le=MAX_SLOTS)] = 0
    """Slots, from 0, that only the guest's kernel can reach."""
    memory: str | None = None
    """The file that QEMU has the guest's memory in, shared."""
    mode: int = 0o600
    """Who may connect: the mode of the socket's file."""
    stay: bool = False
    """Whether the run goes on when QEMU has gone."""


class IvshmemBackend(DeviceBackend):
    """One QEMU with the device. Raises `BackendSpecError` if an option is out of range."""

    scheme = "ivshmem"

    def __init__(self, path: Path, options: IvshmemOptions | None = None, vm: str = "vm") -> None:
        given = options or IvshmemOptions()
        same = DeviceOptions(
            slots=given.slots, kernel=given.kernel, hold=0, mode=given.mode, stay=given.stay
        )
        super().__init__(path, same, vm)
        self._memory = given.memory

    @classmethod
    def from_spec(cls, where: str, options: str, vm: str) -> Self:
        """From the parts of `ivshmem:WHERE?OPTIONS`. Raises `BackendSpecError`."""
        path = cls._path_of(where)
        numbers = {"slots": "a number of slots", "kernel": "a number of slots"}
        given = parse_options(f"{cls.scheme}:{where}", options, IvshmemOptions, numbers)
        return cls(path, given, vm)

    async def open(self) -> None:
        """Listen. Raises `BackendError` also if there is no folder for the file of guest memory,
        which QEMU makes, and which is opened when a guest has rung."""
        if self._memory is not None:
            folder = anyio.Path(self._memory).parent
            if not await folder.is_dir():
                raise BackendError(
                    f"{self.scheme}:unix:{self.path}: memory={self._memory}: there is no folder"
                    f" {folder}"
                )
        await super().open()

    def _connect(self, connected: socket.socket) -> IvshmemConnection:
        given = self.options
        return IvshmemConnection(
            connected, given.slots, given.kernel, self._find_memory, self._take, self._abandon
        )

    def _find_memory(self) -> GuestRanges:
        if self._memory is not None:
            try:
                return FileRanges(self._memory)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                log.warning(
                    "vm %s: guest memory cannot be reached: %s: %s", self.vm, self._memory, why
                )
        return GuestRanges()
