"""`vmibridge serve` has what it loaded until SIGHUP, and no SIGHUP ends it, however early."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from probe_guest import calls, command

LOOPS = {"asyncio": [], "uvloop": ["--uvloop"], "trio": ["--async-backend", "trio"]}
every_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
LISTENS = "listening at unix:x.sock"
RELOADED = "handlers reloaded"

HANDLER = '''
import sys
from pathlib import Path
from time import sleep
import common
from vmibridge import BridgeHandler, BridgeResponse

print("imported", common.VALUE, file=sys.stderr, flush=True)
while Path("wait").exists():
    sleep(0.01)

class Says(BridgeHandler[int]):
    """What it was loaded with."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = VERIFY_VALUE4 = None
    async def handle(self, vmi, packet):
        return BridgeResponse(value1=common.VALUE).with_output(common.VALUE)
'''


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "h"
    path.mkdir()
    (path / "says.py").write_text(HANDLER)
    (path / "common.py").write_text("VALUE = 1")
    return path


@pytest.fixture
def serve(children, tmp_path, folder):
    def start(loop):
        arguments = ["serve", "--listen", "unix:x.sock", "--handlers", "h", *loop]
        return children.start(command(*arguments), cwd=tmp_path)

    return start


@pytest.fixture
def ask(vmibridge, image):
    """The outputs that a new VM gets."""
    guest = image(calls(1))

    def run(server, vm):
        spec = ["--backend", f"{vm}=unicorn:{guest}", "--connect", "unix:x.sock"]
        done = vmibridge("agent", *spec, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["summary"]["guest"][0]["registers"]["rax"]

    return run


def read_to(server, text):
    lines = []
    while text not in (line := server.stderr.readline()):
        assert line, f"it has ended: {server.told()}"
        lines.append(line)
    return lines


@every_loop
def test_a_new_vm_gets_what_was_loaded_whatever_became_of_the_files(serve, folder, ask, loop):
    with serve(loop) as server:
        read_to(server, LISTENS)
        assert ask(server, "one") == 1
        (folder / "common.py").write_text("VALUE = 2")
        (folder / "half.py").write_text("class B(Bri")
        assert ask(server, "two") == 1
        shutil.move(folder, folder.with_name("away"))
        assert ask(server, "three") == 1
        shutil.move(folder.with_name("away"), folder)
        server.send_signal(signal.SIGHUP)
        read_to(server, "stay as they are")
        assert ask(server, "four") == 1
        (folder / "half.py").unlink()
        server.send_signal(signal.SIGHUP)
        read_to(server, RELOADED)
        assert ask(server, "five") == 2


@every_loop
def test_hangups_before_it_is_ready_are_one_reload(serve, folder, ask, tmp_path, loop):
    (tmp_path / "wait").touch()
    with serve(loop) as server:
        read_to(server, "imported 1")
        (folder / "common.py").write_text("VALUE = 2")
        for _ in range(5):
            server.send_signal(signal.SIGHUP)
        (tmp_path / "wait").unlink()
        # Listening and reloading are in no order.
        lines = read_to(server, RELOADED)
        assert [line for line in lines if line.startswith("imported")] == ["imported 2\n"]
        if not any(LISTENS in line for line in lines):
            read_to(server, LISTENS)
        assert ask(server, "one") == 2
        server.send_signal(signal.SIGTERM)
        _, told = server.communicate()
        assert RELOADED not in told
        assert server.returncode == 143


@every_loop
def test_hangups_while_it_reloads_are_one_more(serve, folder, tmp_path, loop):
    with serve(loop) as server:
        read_to(server, LISTENS)
        (tmp_path / "wait").touch()
        (folder / "common.py").write_text("VALUE = 2")
        server.send_signal(signal.SIGHUP)
        read_to(server, "imported 2")
        for value in range(3, 90):
            (folder / "common.py").write_text(f"VALUE = {value}")
            server.send_signal(signal.SIGHUP)
        (tmp_path / "wait").unlink()
        for _ in range(2):
            read_to(server, RELOADED)
        server.send_signal(signal.SIGTERM)
        _, told = server.communicate()
        assert RELOADED not in told
        assert server.returncode == 143


@every_loop
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit", "BaseException", "Odd"])
def test_a_module_that_raises_anything_ends_no_server(serve, folder, ask, error, loop):
    odd = "class Odd(BaseException):\n    def __str__(self): raise SystemExit(9)\n"
    with serve(loop) as server:
        read_to(server, LISTENS)
        (folder / "common.py").write_text(f"{odd}raise {error}\n")
        server.send_signal(signal.SIGHUP)
        read_to(server, "stay as they are")
        assert ask(server, "one") == 1


def test_at_any_time_after_the_first_line_of_python_it_does_not_end_it(serve):
    """As early as can be told from outside: when Python handles the signal."""
    with serve([]) as server:
        while not handles(server.pid, signal.SIGHUP):
            assert server.poll() is None
            time.sleep(0.001)
        server.send_signal(signal.SIGHUP)
        read_to(server, RELOADED)


def handles(pid, number):
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = [line.split()[1] for line in status if line.startswith("SigCgt")]
    return int(caught, 16) >> (number - 1) & 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("REQUEST = '1'", "REQUEST is '1', not of type int"),
        ("REQUEST = 1; MAGIC = b'VMIB'", "MAGIC is b'VMIB', not of type int or None"),
        ("REQUEST = 1; Settings = dict", "Settings is <class 'dict'>, not a msgspec.Struct"),
        ("REQUEST = 1\n    def handle(self, vmi, packet): ...", "handle is not async"),
        ("raise BaseException('x')", "BaseException: x"),
        ("raise type('E', (BaseException,), {'__str__': exit})", "its str raised SystemExit"),
        ("import asyncio; asyncio.run(asyncio.sleep(0))", "runs an event loop while"),
    ],
)
@pytest.mark.parametrize("name", ["run", "serve", "handlers list"])
def test_a_module_that_is_wrong_is_one_line(vmibridge, image, tmp_path, body, told, name):
    (tmp_path / "wrong.py").write_text(
        "from vmibridge import BridgeHandler\nclass A(BridgeHandler[int]):\n"
        f"    async def handle(self, vmi, packet): ...\n    {body}\n"
    )
    arguments = {
        "run": ["--backend", f"unicorn:{image('hlt')}", "--handlers", "wrong.py"],
        "serve": ["--listen", "unix:x.sock", "--handlers", "wrong.py"],
        "handlers list": ["wrong.py"],
    }
    done = vmibridge(*name.split(), *arguments[name])
    (line,) = done.stderr.splitlines()
    assert line.startswith("vmibridge: wrong.py:")
    assert told in line
    assert done.returncode == 1
