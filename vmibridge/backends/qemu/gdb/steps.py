"""One instruction of one vCPU, while the others stand still: as if it had no breakpoint.

The breakpoint is taken away, the vCPU steps, the breakpoint is set again. Under TCG a step ends
behind the exception that the instruction raises, a single step of the guest's own included.
"""

from collections.abc import Sequence
from enum import Enum

import anyio

from vmibridge.aio.listening import wait_listening
from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import ClientLostError, GdbClient
from vmibridge.backends.qemu.gdb.commands import Stop, StubError
from vmibridge.backends.qemu.gdb.packets import encode

_STEP = 2.0
"""Seconds until a step is interrupted: the vCPU of a VM that is reset in it may run nothing."""
_STOP = 10.0


class StepEnd(Enum):
    """How a step ended."""

    DONE = "done"
    PAUSED = "paused"
    """Another client has paused the VM, before the instruction or behind it."""
    INTERRUPTED = "interrupted"
    """It did not end by itself."""


class Stepper:
    """Does them, one at a time."""

    def __init__(self, client: GdbClient) -> None:
        self._client = client
        self._arrived: anyio.Event | None = None
        self._signal = 0

    @property
    def is_busy(self) -> bool:
        """Whether a step is going on."""
        return self._arrived is not None

    def take(self, stop: Stop) -> bool:
        """Whether a stop is that of a step."""
        if self._arrived is None:
            return False
        # QEMU 7.2 tells that a command has paused a VM that another client had let go on.
        if not self._client.owes:
            self._signal = stop.signal
            self._arrived.set()
        return True

    def lose(self) -> None:
        """No stop comes any more."""
        if self._arrived is not None:
            self._arrived.set()

    async def step(
        self, thread: str, before: Sequence[bytes], after: Sequence[bytes], last: bytes = b""
    ) -> StepEnd:
        """Run one instruction between some commands. Not for a task that is cancelled.

        `last` goes out behind `after` unless another client has paused the VM. Raises
        `ClientLostError`, and `StubError` when a command of `before` is refused, in which case
        `after` is done all the same.
        """
        client = self._client
        self._arrived = arrived = anyio.Event()
        self._signal = 0
        interrupted = False
        try:
            step = encode(commands.step(thread))
            replies = await client.ask_all(before, probe=True, tail=step)
            await wait_listening(arrived, _STEP)
            if not arrived.is_set():
                interrupted = True
                client.send(commands.INTERRUPT)
                await wait_listening(arrived, _STOP)
            if not arrived.is_set():
                client.lose(f"the VM does not stop within {_STOP:g} s")
            if client.why_lost is not None:
                raise ClientLostError(client.why_lost)
            if client.exited:
                return StepEnd.DONE
            paused = self._signal != commands.SIGTRAP and not interrupted
        finally:
            self._arrived = None
        refused = [reply for reply in replies if reply != commands.OK]
        for reply in await client.ask_all(
            after, probe=True, tail=b"" if paused or refused else last
        ):
            commands.check_ok(reply)
        if refused:
            raise StubError(f"a command before a step: {refused[0]!r}")
        return StepEnd.PAUSED if paused else StepEnd.INTERRUPTED if interrupted else StepEnd.DONE
