"""What others do to the VM by QMP, as far as the stub shows it.

| they | while | the stub |
|---|---|---|
| `stop` | it runs | a stop with SIGINT; since 8.1 no further one until it is permitted |
| `cont` | it is paused | nothing; at the next breakpoint a stop, if that is permitted |
| `cont` | it is at a breakpoint | meets it again; a command that comes before is dropped |
| `stop` | it is at a breakpoint | nothing at all: QEMU does nothing |
| `system_reset`, `loadvm` | it is at a breakpoint | nothing; the registers are other ones |

So a look asks for the status and the registers, behind a probe that says whether the look has
paused the VM.
"""

from enum import Enum

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import GdbClient
from vmibridge.backends.qemu.gdb.commands import ReplyError, StubError
from vmibridge.backends.qemu.gdb.monitor import STATUS

_TRIES = 10


class Standing(Enum):
    """Why the VM stands still."""

    TRAPPED = "trapped"
    PAUSED = "paused"
    """By another client."""


class Others:
    """What is known of them in one run."""

    def __init__(self, client: GdbClient) -> None:
        self.stops = 0
        """How many the stub has reported."""
        self.is_looking: bool = False
        """A pause that is reported now is that of a look."""
        self.has_paused = False
        """They have let a VM go on that was at a breakpoint, and then paused it."""
        self._client = client

    async def look(self) -> tuple[Standing, bytes]:
        """Why the VM stands still, and the registers of the vCPU that was stopped.

        Raises `ClientLostError`.
        """
        client, ours, registers, status = self._client, False, b"", ""
        self.is_looking = True
        try:
            for _ in range(_TRIES):
                before = client.interfered
                registers = await client.read_registers()
                if client.interfered != before:
                    ours = True
                    continue
                status = await self._status()
                if client.interfered == before:
                    break
                ours = True
        finally:
            self.is_looking = False
        # A VM that was reset is at its begin, and goes on with the answer.
        theirs = "paused" in status and "(" not in status and not ours
        return Standing.PAUSED if theirs else Standing.TRAPPED, registers

    async def _status(self, last: bytes = b"") -> str:
        try:
            return await self._client.monitor(STATUS, last)
        except (StubError, ReplyError):
            return ""

    async def leave_paused(self) -> bool:
        """They have paused the VM: permit the next stop. Whether the VM has to be let go on.

        That is so if they had let it go on already. Raises `ClientLostError`.
        """
        client = self._client
        self.is_looking = True
        try:
            stops, before = self.stops, client.interfered
            status = await self._status(commands.PERMIT)
            if client.interfered != before:
                return True
            # A breakpoint was met without a permission to tell it: it is met again.
            return "debug" in status and self.stops == stops
        finally:
            self.is_looking = False
