"""Who connects while a QEMU is served: hung up on, and a second QEMU is logged."""

import logging
import socket
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup

from vmibridge.aio import sockets
from vmibridge.backends.device.stream import MessageStream
from vmibridge.backends.device.vfio_user import refusal

__all__ = ["TurnedAway"]

log: logging.Logger = logging.getLogger(__name__)

_SILENT: Final = 1.0
"""Seconds after which what is connected and says nothing is a QEMU, as with ivshmem."""
_MAX: Final = 8
"""How many are waited for at a time; others are hung up on without a word."""


class TurnedAway:
    """Those of one listener. A check of health has hung up before it is taken for a QEMU."""

    def __init__(self, vm: str, path: Path) -> None:
        self._vm, self._path = vm, path
        self._waiting = 0

    def take(self, connected: socket.socket, tasks: TaskGroup) -> None:
        """Own this socket, in a task of the group."""
        if self._waiting >= _MAX:
            connected.close()
            return
        self._waiting += 1
        tasks.start_soon(self._turn_away, connected)

    async def _turn_away(self, connected: socket.socket) -> None:
        stream = MessageStream(connected, 0)
        try:
            with anyio.move_on_after(_SILENT):
                await sockets.send(connected, refusal(await sockets.receive(connected, 4096)))
            log.warning(
                "vm %s: turned away another QEMU: one at a time is served at unix:%s",
                self._vm,
                self._path,
            )
        except (anyio.EndOfStream, OSError):
            pass
        finally:
            self._waiting -= 1
            stream.close()
