"""One instruction of one vCPU, while the others stand still: as if it had no breakpoint.

The breakpoint is taken away, the vCPU steps, the breakpoint is set again. Under TCG a step ends
behind the exception that the instruction raises, a single step of the guest's own included.

QEMU reports the end of a step that has run nothing, too: when something kicks the vCPU between its
look for interrupts and its first instruction, as a timer does that is due just then, the translated
code returns at once, and every return is the end of a step (`cpu_tb_exec` in
`accel/tcg/cpu-exec.c`). A vCPU that is where it was therefore steps again.
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
_TRIES = 16
"""Steps that may have run nothing. A jump to itself looks alike, and has run as often then."""


class StepEnd(Enum):
    """How a step ended."""

    DONE = "done"
    PAUSED = "paused"
    """Another client has paused the VM, before the instruction or behind it."""
    INTERRUPTED = "interrupted"
    """It did not end by itself, or no try has run the instruction."""


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
        self,
        thread: str,
        at: int,
        before: Sequence[bytes],
        after: Sequence[bytes],
        last: bytes = b"",
    ) -> StepEnd:
        """Run the instruction at RIP `at` between some commands. Not for a task that is cancelled.

        `last` goes out behind `after` unless another client has paused the VM. Raises
        `ClientLostError`; `StubError` or `ReplyError` when a command is refused, also one of
        `before`, and then all of `after` was sent.
        """
        client = self._client
        step = encode(commands.step(thread))
        try:
            self._begin()
            replies = await client.ask_all(before, probe=True, tail=step)
            end = await self._end()
            tries = 1
            while end is StepEnd.DONE and not client.exited and await self._is_at(at):
                if tries == _TRIES:
                    end = StepEnd.INTERRUPTED
                    break
                tries += 1
                self._begin()
                client.post(step, 0, lambda _reply: None, runs=True, probe=True)
                end = await self._end()
        finally:
            self._arrived = None
        if client.exited:
            return StepEnd.DONE
        refused = [reply for reply in replies if reply != commands.OK]
        is_over = end is StepEnd.PAUSED or bool(refused)
        for reply in await client.ask_all(after, probe=True, tail=b"" if is_over else last):
            commands.check_ok(reply)
        if refused:
            raise StubError(f"a command before a step: {refused[0]!r}")
        return end

    def _begin(self) -> None:
        """From here on a stop is that of a step."""
        self._arrived, self._signal = anyio.Event(), 0

    async def _end(self) -> StepEnd:
        """Wait for the stop."""
        client, arrived = self._client, self._arrived
        assert arrived is not None, "a step has begun"
        interrupted = False
        await wait_listening(arrived, _STEP)
        if not arrived.is_set():
            interrupted = True
            client.send(commands.INTERRUPT)
            await wait_listening(arrived, _STOP)
        if not arrived.is_set():
            client.lose(f"the VM does not stop within {_STOP:g} s")
        if client.why_lost is not None:
            raise ClientLostError(client.why_lost)
        if interrupted:
            return StepEnd.INTERRUPTED
        return StepEnd.DONE if self._signal == commands.SIGTRAP else StepEnd.PAUSED

    async def _is_at(self, at: int) -> bool:
        """Whether the vCPU that has stepped is there."""
        registers, _ = self._client.layout.read(await self._client.read_registers())
        return registers.rip == at
