"""A QEMU that was started here: its process and its monitor.

    async with QemuProcess([path, *arguments]) as qemu:
        status = await qemu.wait()

The monitor is a socket pair, so it has no name that another could connect to. Leaving the
block takes QEMU down: `quit`, then SIGTERM, then SIGKILL, 5 seconds apart.
"""

import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Self

import anyio
from anyio.abc import Process

from vmibridge.aio.cancellation import UnwrappedExit
from vmibridge.backends.qemu.qmp import Qmp
from vmibridge.errors import BackendError, QmpError

log: logging.Logger = logging.getLogger(__name__)

_PATIENCE = 5.0


class QemuProcess(UnwrappedExit):
    """QEMU, with standard input, output and error of this process, or as given.

    Entering raises `BackendError` when it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.command = command
        self._environment = environment
        self._stdio = (stdin, stdout, stderr)
        self._process: Process
        self._stack = AsyncExitStack()
        self.qmp: Qmp | None = None
        """Its monitor; `None`: it ended before it had one."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            with theirs:
                await self._start(theirs.fileno())
            stack.push_async_callback(self._end)
            ours.setblocking(False)
            try:
                self.qmp = await stack.enter_async_context(Qmp(ours))
                stack.push_async_callback(self._quit_shielded)
            except QmpError as error:
                # One that ends at once has said why, on standard error.
                with anyio.move_on_after(_PATIENCE):
                    await self._process.wait()
                if self._process.returncode is None:
                    raise BackendError(f"{self.command[0]}: {error}") from error
            self._stack = stack.pop_all()
        return self

    async def _start(self, monitor: int) -> None:
        chardev = f"socket,id=vmibridge-monitor,fd={monitor}"
        command = [*self.command, "-chardev", chardev, "-qmp", "chardev:vmibridge-monitor"]
        stdin, stdout, stderr = self._stdio
        try:
            self._process = await anyio.open_process(
                command,
                env=self._environment,
                pass_fds=(monitor,),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        except OSError as error:
            raise BackendError(f"{self.command[0]}: {error.strerror}") from error

    @property
    def process(self) -> Process:
        """The process, for its streams and its number."""
        return self._process

    async def wait(self) -> int:
        """Its exit status, when it has ended; negative: the signal that ended it."""
        return await self._process.wait()

    async def quit(self) -> None:
        """Ask it to end, and wait for that, at most 5 seconds; a vCPU in a trap delays it."""
        with anyio.move_on_after(_PATIENCE):
            if self.qmp is not None:
                try:
                    await self.qmp.execute("quit")
                except QmpError as error:
                    log.debug("%s", error)
            await self._process.wait()

    async def _quit_shielded(self) -> None:
        with anyio.CancelScope(shield=True):
            if self._process.returncode is None:
                await self.quit()

    async def _end(self) -> None:
        with anyio.CancelScope(shield=True):
            for end in (self._process.terminate, self._process.kill):
                if self._process.returncode is not None:
                    break
                if self.qmp is not None:
                    log.warning("QEMU does not end: %s", end.__name__)
                end()
                with anyio.move_on_after(_PATIENCE):
                    await self._process.wait()
            await self._process.aclose()
