"""What a handler does beside its answer: it prints, and it holds up the loop."""

import json
import signal
import time

import pytest
from probe_guest import command
from recorded_session import reply, session, trap, write_file

LOOPS = [["--async-backend", "asyncio"], ["--async-backend", "trio"], ["--uvloop"]]
every_loop = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "trio", "uvloop"])

ONE_CALL = """
    mov ecx, 0x42494d56
    mov edx, 0x100
    vmcall
    hlt
"""

PRINTS = """
from vmibridge import BridgeHandler, BridgeResponse

print("while it is loaded")

class Prints(BridgeHandler[str]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100

    async def handle(self, vmi, packet):
        print("in a handler")
        return BridgeResponse(value1=1)
"""

BLOCKS = """
import sys
import time

from vmibridge import BridgeHandler

class Blocks(BridgeHandler[str]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100

    async def handle(self, vmi, packet):
        while True:
            time.sleep(1)
"""

TAKES_LONG = """
import sys
import time

print("loading", file=sys.stderr, flush=True)
while True:
    time.sleep(1)
"""

FAILS = """
from vmibridge import BridgeHandler

class Fails(BridgeHandler[str]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100

    async def handle(self, vmi, packet):
        return 1 / 0
"""


def test_what_it_prints_is_not_among_the_json(vmibridge, image, tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    backend = f"unicorn:{image(ONE_CALL)}"
    done = vmibridge("run", "--backend", backend, "--handlers", "prints.py", "--json")
    assert done.returncode == 0
    trap, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert trap["outcome"] == "handled"
    assert summary["summary"]["handled"] == 1
    assert "while it is loaded" in done.stderr
    assert "in a handler" in done.stderr


def test_where_it_failed_is_told_without_debug(vmibridge, image, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    backend = f"unicorn:{image(ONE_CALL)}"
    done = vmibridge("run", "--backend", backend, "--handlers", "fails.py")
    line = FAILS.splitlines().index("        return 1 / 0") + 1
    assert f"fails.py:{line}: ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr


@every_loop
def test_one_that_raises_keyboard_interrupt_ends_it_as_ctrl_c_does(
    vmibridge, image, tmp_path, loop
):
    (tmp_path / "fails.py").write_text(FAILS.replace("return 1 / 0", "raise KeyboardInterrupt"))
    line = ["run", "--backend", f"unicorn:{image(ONE_CALL)}", "--handlers", "fails.py", *loop]
    done = vmibridge(*line, "--record", "run.mcap")
    assert done.returncode == 128 + signal.SIGINT
    assert "handler fails failed on method" in done.stderr
    assert "run.mcap: 1 trap was recorded" in done.stderr
    assert "Traceback" not in done.stderr


@every_loop
def test_one_that_holds_up_the_loop_is_named_and_a_third_signal_ends_the_process(
    children, image, tmp_path, loop
):
    (tmp_path / "blocks.py").write_text(BLOCKS)
    line = command(
        *("run", "--backend", f"unicorn:{image(ONE_CALL)}", "--handlers", "blocks.py", *loop)
    )
    with children.start(line, cwd=tmp_path) as run:
        told = next(text for text in run.stderr if "holds up the event loop" in text)
        assert "handler blocks" in told
        assert "blocks.py:13" in told or "blocks.py:14" in told
        while run.poll() is None:
            run.send_signal(signal.SIGINT)
            time.sleep(0.02)
    assert run.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--backend", "unicorn:guest.bin", "--handlers"],
        ["replay", "run.mcap", "--handlers"],
        ["serve", "--listen", "unix:x.sock", "--handlers"],
        ["handlers", "list"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_ctrl_c_ends_a_module_that_takes_long_to_load(children, tmp_path, arguments):
    (tmp_path / "long.py").write_text(TAKES_LONG)
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    write_file(tmp_path / "run.mcap", [(1, session()), (2, trap(1)), (3, reply(1))])
    child = children.start(command(*arguments, "long.py"), cwd=tmp_path)
    assert child.stderr.readline() == "loading\n"
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert child.returncode == 130


def test_a_reader_of_the_list_may_leave(children, tmp_path):
    """0, as behind `head`."""
    child = children.start(command("handlers", "list", "vmibridge.handlers"), cwd=tmp_path)
    child.stdout.close()
    assert child.wait() == 0
    assert child.stderr.read() == ""


TYPED = """
import enum
from typing import Annotated
from vmibridge import GuestBytes, GuestInt, GuestRoom, GuestText, Room, StandardHandler, method
from vmibridge import I16, U32, BridgeContext

class Mode(enum.IntEnum):
    READ = 1
    WRITE = 2

class Typed(StandardHandler[int]):
    REQUEST = 0x0333

    @method(1)
    async def open(
        self,
        vmi: BridgeContext,
        name: Annotated[str, GuestText(64, "utf-16-le")] | None,
        mode: Annotated[Mode, GuestInt(8)],
        place: I16,
    ) -> U32:
        "Open it."

    @method(2)
    async def move(
        self, data: Annotated[bytes, GuestBytes(5)], into: Annotated[Room, GuestRoom(6)]
    ) -> None:
        "Move it."

    @method(3)
    async def plain(self, vmi, packet):
        "Takes the packet."
"""


def test_the_list_has_what_typed_methods_take(vmibridge, tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    table = vmibridge("handlers", "list", str(tmp_path / "typed.py")).stdout
    shown = " ".join(table.replace("│", " ").split())
    takes = "name: GuestText(64, utf-16-le) | None, mode: Mode(U8: READ=1, WRITE=2), place: I16"
    for line in (
        f"open({takes}) -> U32: Open it.",
        "move(data: GuestBytes(5), into: GuestRoom(6)) -> None: Move it.",
        "0x0003 plain: Takes the packet.",
    ):
        assert line in shown, shown
    told = json.loads(vmibridge("handlers", "list", str(tmp_path / "typed.py"), "--json").stdout)
    opened, moved, plain = told["methods"]
    name, mode, place = opened["parameters"]
    assert (name["name"], name["type"], name["words"], name["limit"]) == (
        "name",
        "GuestText",
        1,
        64,
    )
    assert (name["encoding"], name["optional"], name["bits"]) == ("utf-16-le", True, None)
    assert (mode["type"], mode["bits"], mode["members"]) == ("Mode", 8, {"READ": 1, "WRITE": 2})
    assert (place["type"], place["bits"], place["signed"]) == ("I16", 16, True)
    assert (opened["result"]["name"], opened["result"]["type"]) == ("result", "U32")
    assert [each["words"] for each in moved["parameters"]] == [2, 2]
    assert (moved["result"], plain["parameters"], plain["result"]) == (None, None, None)
