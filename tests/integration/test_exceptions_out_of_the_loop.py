"""An exception that leaves the event loop, as that of a signal handler, ends the program."""

import sys

import pytest
from children import run

pytest.importorskip("unicorn")

PROGRAM = """
import os, signal, sys, threading
import anyio
from vmibridge import BridgeHandler, BridgeServer, open_backend

class Other(Exception):
    pass

def raises(*_):
    raise Other("from a signal handler")

class Nothing(BridgeHandler[None]):
    MAGIC = 0x42494D56
    REQUEST = 1
    async def handle(self, vmi, packet):
        return None

async def main():
    async with open_backend("unicorn:spins.bin") as vm:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        async for _ in BridgeServer(vm, Nothing()).run():
            pass

signal.signal(signal.SIGUSR1, raises)
try:
    anyio.run(main, backend_options={"use_uvloop": "uvloop" in sys.argv})
except Other:
    print("ended")
"""


SERVER = """
import os, signal, sys, threading
import anyio
from vmibridge.config import HandlerFactory
from vmibridge.transport import AgentServer

class Other(BaseException):
    pass

def raises(*_):
    raise Other("from a signal handler")

async def main():
    server = AgentServer(["unix:serve.sock"], HandlerFactory(["handlers.py"]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        await server.listening.wait()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()

signal.signal(signal.SIGUSR1, raises)
try:
    anyio.run(main, backend_options={"use_uvloop": "uvloop" in sys.argv})
except BaseExceptionGroup as group:
    # That of a task group, of which the server was one task.
    print("ended" if group.subgroup(Other) else "other")
except Other:
    print("ended")
"""

HANDLERS = """
from vmibridge import BridgeHandler

class Nothing(BridgeHandler[None]):
    MAGIC = 0x1234
    REQUEST = 1
    async def handle(self, vmi, packet):
        return None
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("program", [PROGRAM, SERVER], ids=["guest", "server"])
def test_it_ends_and_the_vcpus_are_stopped(tmp_path, program, loop):
    (tmp_path / "spins.bin").write_bytes(b"\xeb\xfe")
    (tmp_path / "handlers.py").write_text(HANDLERS)
    (tmp_path / "program.py").write_text(program)
    done = run([sys.executable, "program.py", loop], cwd=tmp_path)
    assert done.stdout == "ended\n"
    assert done.returncode == 0
