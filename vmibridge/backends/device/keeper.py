"""A process that outlives this one, if this one is killed, and then ends a connection to QEMU.

A process that is killed with something unread resets its connections, and QEMU 11.1.3 aborts at
that: the end of the host would be that of the VM. So another process has the socket, too. It does
nothing until this one has gone; see `last_words`. It is started beside the connection: without it
all works but that.
"""

import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.backends.device.slots import GENERATION_AT, PAGE, STATE_AT, slot_offset

__all__ = ["keep"]

log: logging.Logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("last_words.py")


async def keep(connected: int, memory: int, slots: int) -> None:
    """Have a process keep the connection, and the memory of the slots, until this is cancelled.

    Both descriptors have to stay open until it has ended.
    """
    started: list[subprocess.Popen[bytes]] = []
    pipe: list[int] = []
    try:
        try:
            pipe += os.pipe()
            # Also if this is cancelled meanwhile, it is known what was started.
            await in_own_thread(_start, started, pipe[0], connected, memory, slots)
        except OSError as error:
            log.warning("QEMU may abort if this process is killed: no keeper: %s", error)
        await anyio.sleep_forever()
    finally:
        if pipe:
            os.close(pipe[0])
            with suppress(OSError):
                os.write(pipe[1], b"\0")
            os.close(pipe[1])
        with anyio.CancelScope(shield=True):
            for process in started:
                await in_own_thread(process.wait)


def _start(
    started: list["subprocess.Popen[bytes]"], pipe: int, connected: int, memory: int, slots: int
) -> None:
    numbers = (pipe, connected, memory, GENERATION_AT, slot_offset(0) + STATE_AT, 2 * PAGE, slots)
    started.append(
        # A session of its own: what is sent to the group of this process is not for it.
        subprocess.Popen(  # noqa: S603 - this Python, and a file of this package
            [sys.executable, "-I", "-S", str(_PROGRAM), *map(str, numbers)],
            pass_fds=(pipe, connected, memory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
