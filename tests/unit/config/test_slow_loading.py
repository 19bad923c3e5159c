"""A module that takes long to load is named while it does, wherever modules are loaded."""

import logging
import threading

import pytest

from vmibridge.config import load_handlers, reload_handlers, slow_loading

MODULE = """
import threading
from vmibridge import BridgeHandler

class Late(BridgeHandler[None]):
    REQUEST = 0x100

    async def handle(self, vmi, packet):
        return None

for thread in threading.enumerate():
    if hasattr(thread, "told"):
        thread.told.wait()
"""


class Told(logging.Handler):
    """Lets the module go on when two lines were logged, and what is wanted."""

    def __init__(self, event):
        super().__init__()
        self.lines = []
        self.wanted = ""
        self.event = event

    def emit(self, record):
        self.lines.append(record.getMessage())
        if len(self.lines) >= 2 and any(self.wanted in line for line in self.lines):
            self.event.set()


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(slow_loading, "_AFTER", 0.01)
    event, thread = threading.Event(), threading.current_thread()
    handler = Told(event)
    slow_loading.log.addHandler(handler)
    thread.told = event
    yield handler
    del thread.told
    slow_loading.log.removeHandler(handler)


@pytest.mark.parametrize("load", [load_handlers, reload_handlers])
@pytest.mark.parametrize("source", ["file", "dotted"])
def test_is_named_again_and_again_until_it_is_loaded(tmp_path, monkeypatch, told, load, source):
    (tmp_path / "late_one.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    name = str(tmp_path / "late_one.py") if source == "file" else "late_one"
    load([name])
    assert "vmibridge loading" not in {thread.name for thread in threading.enumerate()}
    assert told.lines[0].startswith(f"{name} takes long to load: at ")
    assert len(told.lines) >= 2


# Who traces a function, as coverage does, has lines of it.
@pytest.mark.no_cover
def test_and_where_python_is_between_two_lines(tmp_path, told):
    told.wanted = "no_line.py:1, for"
    code = MODULE.replace("thread.told.wait()", "wait(thread.told)")
    # Of an event, which would show its own line while it is asked.
    wait = "def wait(told):\n    while not told._flag and monotonic() < end: pass\n"
    wait += "from time import monotonic; end = monotonic() + 30\n"
    wait += "wait.__code__ = wait.__code__.replace(co_linetable=b'')\n"
    (tmp_path / "no_line.py").write_text(wait + code)
    load_handlers([str(tmp_path / "no_line.py")])
    assert any(f"{tmp_path / 'no_line.py'}:1, for" in line for line in told.lines)


def test_one_that_does_not_is_not(tmp_path, caplog):
    (tmp_path / "quick.py").write_text(MODULE)
    load_handlers([str(tmp_path / "quick.py")])
    assert caplog.messages == []
