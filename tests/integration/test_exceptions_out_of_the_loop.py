"""An exception that leaves the event loop, as that of a signal handler, ends the program."""

import sys

import pytest
from children import run

pytest.importorskip("unicorn")

PROGRAM = """
import os, signal, threading
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
    anyio.run(main)
except Other:
    print("ended")
"""


def test_asyncio_ends_and_the_vcpus_are_stopped(tmp_path):
    (tmp_path / "spins.bin").write_bytes(b"\xeb\xfe")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run([sys.executable, "program.py"], cwd=tmp_path)
    assert done.stdout == "ended\n"
    assert done.returncode == 0
