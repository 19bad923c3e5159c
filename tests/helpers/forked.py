"""Commands of `vmibridge` as processes that need not import it first: see `fork_server.py`.

Such a process is a child like others, with signals, pipes and an exit status, for a tenth
of the CPU. What a test shows of the start of an interpreter needs a `Child`, and gets one:
see `ForkServer.may_fork`.
"""

import inspect
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from children import Child, Command

PROGRAM = Path(__file__).with_name("fork_server.py")
BEGINNING = [sys.executable, "-m", "vmibridge"]
OF_CHILDREN = {"cwd", "env", "seconds", "stdin", "stdout", "stderr", "text"}
"""The options of `Child` that a process of the fork server knows, too."""

_ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
"""The ends of the pipes that `Popen` has made."""

# What an interpreter reads when it starts.
_OF_STARTS = ("PYTHON", "LC_", "LANG", "MALLOC_", "LD_")


class ForkServer:
    """Starts commands. To be made by `fork_server`."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._environment = _at_start(os.environ)
        self._modules = set(self.receive()["modules"])

    def start(self, command: Command, **options: Any) -> Child:
        """`Child(COMMAND, ...)`, from the fork server where it makes no difference."""
        if self.may_fork(command, **options):
            return ForkedChild(command, server=self, **options)
        return Child(command, **options)

    def may_fork(self, command: Command, **options: Any) -> bool:
        """Not if it is another program, if its interpreter would start in another way, and if
        its directory has a module of the name of one that the server has imported."""
        if list(command[:3]) != BEGINNING or not options.keys() <= OF_CHILDREN:
            return False
        if _at_start(options.get("env") or os.environ) != self._environment:
            return False
        return not any(path.stem in self._modules for path in Path(_directory(options)).iterdir())

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The process id of a child of this process."""
        socket.send_fds(self._control, [json.dumps(request).encode()], streams)
        # From the child and from the server, in no order.
        return (self.receive() | self.receive())["pid"]

    def receive(self) -> dict[str, Any]:
        message = self._control.recv(1 << 16)
        assert message, "the fork server has ended"
        return json.loads(message)


class ForkedChild(Child):
    """A `Child` that a fork server forks."""

    def __init__(self, command: Command, *, server: ForkServer, **options: Any) -> None:
        self._server = server
        self._request = {
            "arguments": list(map(os.fspath, command[len(BEGINNING) :])),
            "directory": str(_directory(options)),
            "environment": dict(options.get("env") or os.environ),
        }
        super().__init__(command, **options)

    def _execute_child(self, *arguments: Any) -> None:
        """What `Popen` starts a process by, with the pipes that it has made. Nothing public
        does."""
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        theirs = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [number if end < 0 else end for number, end in enumerate(theirs)]
        try:
            self.pid = self._server.fork(self._request, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(given[name] for name in _ENDS))


def _directory(options: dict[str, Any]) -> Path:
    return Path(options.get("cwd") or Path.cwd()).absolute()


def _at_start(environment: Any) -> dict[str, str]:
    return {name: text for name, text in environment.items() if name.startswith(_OF_STARTS)}


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A fork server, which ends with the block. Coverage is gathered in its children alone."""
    a_day = 86_400  # on a disturbed machine all tests take hours
    environment = {n: text for n, text in os.environ.items() if not n.startswith("COVERAGE_")}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        Child(
            [sys.executable, PROGRAM, str(theirs.fileno())],
            seconds=a_day, env=environment, pass_fds=[theirs.fileno()], stdout=None, stderr=None,
        ) as process,
    ):  # fmt: skip
        theirs.close()
        yield ForkServer(ours)
        ours.close()
        process.wait()
