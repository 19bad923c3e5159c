"""The program of a process that has imported what `vmibridge` needs, and forks for each command.

    python fork_server.py CONTROL

CONTROL is the number of a socket of type SEQPACKET. A request is one message: the three standard
streams as descriptors, and JSON: `arguments`, `directory` and `environment`. There are two answers,
in no order: the child's process id, when it leads a session, and an empty object, when it has its
new parent.

A child is forked twice. Its first parent has ended by the second answer, so it belongs to the
nearest process above that adopts orphans: that of the tests, which waits for it like for any other
of its children. From there on it does what `python -m vmibridge` does, with a session,
streams, a directory and an environment of its own, and ends as an interpreter ends.

Nothing else may run in this process: a child of a process with threads may hang.
"""

import gc
import io
import json
import os
import pkgutil
import runpy
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

MAX_REQUEST = 1 << 17
"""Bytes of a request. The environment is most of it."""


LEFT_OUT = (
    "vmibridge.__main__",  # is run
    "vmibridge.handlers",  # are loaded as those of users are
    "vmibridge.recording.export.parquet",  # pyarrow starts a thread
)


def import_all() -> None:
    """The modules of vmibridge, and those of others that they import when they need them."""
    import vmibridge

    for found in pkgutil.walk_packages(vmibridge.__path__, "vmibridge.", onerror=lambda _: None):
        if not found.name.startswith(LEFT_OUT):
            import_module(found.name)
    for name in ("coverage", "rich.live", "rich.table", "trio", "uvloop"):
        with suppress(ModuleNotFoundError):
            import_module(name)


def next_child(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """In a child: what it is to run, and its streams. In the server: None, at its end."""
    while True:
        data, streams, _, _ = socket.recv_fds(control, MAX_REQUEST, 3)
        if not data:
            return None
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            os.setsid()  # first: whoever knows the number may kill the session
            control.send(json.dumps({"pid": os.getpid()}).encode())
            control.close()
            return json.loads(data), streams
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)
        control.send(b"{}")


def become(request: dict[str, Any], streams: list[int]) -> None:
    """What a new process has from `Popen`, and what its interpreter makes of that."""
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    sys.stdin = sys.__stdin__ = opened(0, "rb", sys.stdin)
    sys.stdout = sys.__stdout__ = opened(1, "wb", sys.stdout)
    sys.stderr = sys.__stderr__ = opened(2, "wb", sys.stderr)
    sys.argv = ["vmibridge", *request["arguments"]]
    sys.path[0] = request["directory"]
    if any(name.startswith("COVERAGE_PROCESS_") for name in os.environ):
        import_module("coverage").process_startup()


def opened(number: int, mode: str, like: TextIO) -> TextIO:
    """A standard stream, with the encoding and the buffering of the one before."""
    unbuffered = like.write_through  # by PYTHONUNBUFFERED
    return io.TextIOWrapper(
        open(number, mode, 0 if unbuffered and number else -1, closefd=False),
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
        write_through=unbuffered,
    )


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    # The pages of what is there now stay those of the server.
    gc.collect()
    gc.freeze()
    threads = [path.name for path in Path("/proc/self/task").iterdir()]
    assert threads == [str(os.getpid())], "a module has started a thread"
    modules = {name.partition(".")[0] for name in sys.modules}
    control.send(json.dumps({"modules": sorted(modules)}).encode())
    child = next_child(control)
    if child is not None:
        become(*child)
        runpy.run_module("vmibridge", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
