"""Modules made of handler files: they import each other, are pickled by name, and are read once."""

import asyncio
import importlib
import logging
import pickle
import subprocess
import sys
import textwrap

import anyio
import anyio.to_process
import pytest

from vmibridge import BridgePacket
from vmibridge.config import HandlerFactory, find_handlers, load_handlers, reload_handlers
from vmibridge.errors import HandlerLoadError
from vmibridge.recording.session import recorded_handler
from vmibridge.testing import drive

PLAIN = """
from vmibridge import BridgeHandler, BridgeResponse

def work(number):
    return number + {value}

class Plain(BridgeHandler[int]):
    REQUEST = 0x100
    async def handle(self, vmi, packet):
        return BridgeResponse(value1={value})
"""


@pytest.fixture
def folder(tmp_path):
    """Writes files of a folder; `folder.source` is what to load."""

    def write(name, text):
        path = tmp_path / "h" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    write.source = str(tmp_path / "h")
    write.path = tmp_path / "h"
    return write


def module_of(handler):
    return sys.modules[type(handler).__module__]


async def answered(handler):
    return (await drive(handler, BridgePacket(1, 0x100, 0))).response.value1


class TestImports:
    @pytest.mark.parametrize(
        "line",
        [
            "import common",
            "import common as c; common = c",
            "from . import common",
            "import common, os",
            "import os, common as other; common = other",
            "import lib.inner; common = lib.inner",
            "import lib.inner as common",
            "from lib import inner as common",
            "from lib.inner import VALUE; import common",
            "from .lib import inner as common",
            "if True:\n    try:\n        import common\n    except ImportError: raise",
            "import spaces.inner as common",
        ],
    )
    def test_a_file_imports_those_beside_it(self, folder, line):
        folder("common.py", "VALUE = 7")
        folder("lib/__init__.py", "import common")
        folder("lib/inner.py", "from . import common\nimport common as again\nVALUE = again.VALUE")
        folder("spaces/inner.py", "VALUE = 7")
        file = folder("plain.py", f"{line}\n{PLAIN.format(value='common.VALUE')}")
        for source in (file, folder.source):
            (handler,) = load_handlers([source])
            assert anyio.run(answered, handler) == 7

    def test_an_import_within_a_function_works_later(self, folder):
        folder("common.py", "VALUE = 7")
        text = PLAIN.format(value="self.late()") + "    def late(self):\n"
        file = folder("plain.py", text + "        import common\n        return common.VALUE\n")
        (handler,) = load_handlers([file])
        assert anyio.run(answered, handler) == 7

    def test_what_a_file_imports_is_one_module_for_all(self, folder):
        folder("common.py", "SEEN = []")
        for name in "ab":
            text = PLAIN.format(value=0).replace("0x100", str(ord(name)))
            folder(f"{name}.py", f"import common\ncommon.SEEN.append({name!r})\n{text}")
        handlers = load_handlers([folder.source])
        first, second = (module_of(handler).common for handler in handlers)
        assert first is second
        assert first.SEEN == ["a", "b"]

    def test_two_folders_with_files_of_the_same_names_do_not_meet(self, folder):
        for value, name in enumerate(("one", "two")):
            folder(f"{name}/common.py", f"VALUE = {value}")
            folder(f"{name}/plain.py", f"import common\n{PLAIN.format(value='common.VALUE')}")
        handlers = load_handlers([f"{folder.source}/one", f"{folder.source}/two"])
        assert [anyio.run(answered, handler) for handler in handlers] == [0, 1]
        assert "common" not in sys.modules

    @pytest.mark.parametrize("name", ["json", "vmibridge", "msgspec"])
    def test_names_of_others_stay_theirs(self, folder, name):
        """Of the standard library, vmibridge, and a library that a file has the name of."""
        if name != "msgspec":
            folder(f"{name}.py", "raise RuntimeError('this is not it')")
        own = f"{name}.py" if name == "msgspec" else "plain.py"
        file = folder(own, f"import {name} as found\n{PLAIN.format(value=0)}")
        (handler,) = load_handlers([file])
        assert module_of(handler).found is importlib.import_module(name)

    def test_what_the_path_leads_to_as_well_stays_one_module(self, folder, monkeypatch):
        folder("common_of_the_path.py", "")
        monkeypatch.syspath_prepend(folder.source)
        file = folder("plain.py", f"import common_of_the_path\n{PLAIN.format(value=0)}")
        (handler,) = load_handlers([file])
        found = module_of(handler).common_of_the_path
        assert found is sys.modules["common_of_the_path"]

    def test_the_first_file_of_a_package_is_run(self, folder):
        folder("__init__.py", "from . import common\nVALUE = common.VALUE")
        folder("common.py", "VALUE = 7")
        folder("plain.py", f"from . import VALUE\n{PLAIN.format(value='VALUE')}")
        (handler,) = load_handlers([folder.source])
        assert anyio.run(answered, handler) == 7

    def test_a_module_may_have_any_name(self, folder):
        for number, name in enumerate(("my-handlers.py", "a.b.py", "päth%2E.py", "with @3.py")):
            folder(name, PLAIN.format(value=0).replace("0x100", str(number)))
        assert len(load_handlers([folder.source])) == 4

    def test_no_bytecode_is_left(self, folder):
        folder("common.py", "")
        folder("plain.py", f"import common\n{PLAIN.format(value=0)}")
        load_handlers([folder.source])
        assert not list(folder.path.rglob("*.pyc"))

    def test_a_nested_expression_is_as_deep_as_python_takes(self, folder):
        file = folder("plain.py", f"{PLAIN.format(value=0)}\nDEEP = {' + '.join(['1'] * 2500)}")
        (handler,) = load_handlers([file])
        assert module_of(handler).DEEP == 2500

    def test_an_error_in_a_file_beside_it_is_told_with_its_line(self, folder):
        folder("common.py", "\n1 / 0")
        file = folder("plain.py", f"import common\n{PLAIN.format(value=0)}")
        with pytest.raises(HandlerLoadError, match=r"common\.py:2: ZeroDivisionError"):
            load_handlers([file])
        # Once it is mended, it is read again.
        folder("common.py", "VALUE = 7")
        assert len(load_handlers([file])) == 1


MAIN = """
import concurrent.futures, multiprocessing, sys
from vmibridge.config import load_handlers

if __name__ == "__main__":
    file, how = sys.argv[1:]
    (handler,) = load_handlers([file])
    work = sys.modules[type(handler).__module__].work
    context = multiprocessing.get_context(how)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        print(pool.submit(work, 1).result())
"""


@pytest.fixture
def work(folder):
    (handler,) = load_handlers([folder("plain.py", PLAIN.format(value=5))])
    return module_of(handler).work


class TestOtherProcesses:
    @pytest.mark.anyio
    async def test_anyio_runs_a_function_of_a_file(self, work):
        assert await anyio.to_process.run_sync(work, 1) == 6

    @pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
    def test_multiprocessing_runs_it(self, folder, tmp_path, how):
        # In a process of its own: it leaves processes that end with it.
        file = folder("plain.py", PLAIN.format(value=5))
        (tmp_path / "main.py").write_text(MAIN)
        command = [sys.executable, str(tmp_path / "main.py"), file, how]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout == b"6\n"

    def test_a_later_run_reads_a_pickle(self, work, tmp_path):
        (tmp_path / "pickle").write_bytes(pickle.dumps(work))
        code = f"import pickle; print(pickle.load(open({str(tmp_path / 'pickle')!r}, 'rb'))(1))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert done.stdout == b"6\n"


class TestReadOnce:
    def test_a_factory_reads_its_sources_once(self, folder):
        folder("plain.py", PLAIN.format(value=1))
        factory = HandlerFactory([folder.source])
        folder("plain.py", "class B(Bri")
        folder("other.py", "raise RuntimeError")
        (handler,) = factory("red").handlers
        for file in folder.path.iterdir():
            file.unlink()
        folder.path.rmdir()
        (other,) = factory("blue").handlers
        assert type(handler) is type(other)
        assert handler is not other

    def test_a_reload_reads_them_again_with_those_beside_them(self, folder):
        folder("common.py", "VALUE = 1")
        folder("plain.py", f"import common\n{PLAIN.format(value='common.VALUE')}")
        factories = [HandlerFactory([folder.source])]
        for value in range(2, 9):
            folder("common.py", f"VALUE = {value}")
            factories.append(reload_handlers([folder.source]))
        values = [anyio.run(answered, factory.make()[0]) for factory in factories]
        assert values == list(range(1, 9))
        # Those of before can be pickled, until they cannot be in use any more.
        assert pickle.loads(pickle.dumps(type(factories[-2].make()[0])))
        loaded = [
            name for name in sys.modules if name.endswith(".plain") and str(folder.path) in name
        ]
        assert len(loaded) == 5

    def test_a_reload_trusts_no_compiled_module(self, folder, monkeypatch):
        """Python would: each source has the size of the one before, and is of the same second."""
        monkeypatch.setattr(sys, "dont_write_bytecode", False)
        monkeypatch.syspath_prepend(folder.path)
        folder("shown_beside.py", "VALUE = 1")
        file = folder(
            "plain.py", f"import shown_beside\n{PLAIN.format(value='shown_beside.VALUE')}"
        )
        factories = [HandlerFactory([file])]
        for value in range(2, 5):
            folder("shown_beside.py", f"VALUE = {value}")
            factories.append(reload_handlers([file]))
        values = [anyio.run(answered, factory.make()[0]) for factory in factories]
        assert values == [1, 2, 3, 4]

    def test_a_reload_that_fails_leaves_what_was_there(self, folder):
        folder("common.py", "VALUE = 1")
        folder("plain.py", f"import common\n{PLAIN.format(value='common.VALUE')}")
        factory = HandlerFactory([folder.source])
        before = set(sys.modules)
        for broken in ("raise SystemExit", "raise BaseException", "class", "import nothing_here"):
            folder("common.py", broken)
            with pytest.raises(HandlerLoadError, match=r"common\.py:1: "):
                reload_handlers([folder.source])
            assert set(sys.modules) == before
        assert anyio.run(answered, factory.make()[0]) == 1
        (handler,) = load_handlers([folder.source])
        assert type(handler) is type(factory.make()[0])


class TestWhatIsOffered:
    def test_a_list_named_handlers_decides(self, folder):
        text = PLAIN.format(value=1) + "\nclass Other(Plain):\n    REQUEST = 1\n"
        file = folder("plain.py", f"{text}\nhandlers = [Other]\n")
        assert [handler.name for handler in load_handlers([file])] == ["other"]

    @pytest.mark.parametrize(
        ("said", "told"),
        [
            ("[Plain()]", "handlers has an object of Plain, which would serve every VM"),
            ("[Plain, 5]", "handlers has 5, not a handler"),
            ("{'a': Plain}", "handlers is of type dict"),
            ("'Plain'", "handlers is of type str"),
        ],
    )
    def test_one_that_is_no_list_of_classes_is_refused(self, folder, said, told):
        file = folder("plain.py", f"{PLAIN.format(value=1)}\nhandlers = {said}\n")
        with pytest.raises(HandlerLoadError, match=rf"plain\.py: {told}"):
            load_handlers([file])

    def test_an_object_that_says_shared_is_taken(self, folder):
        text = PLAIN.format(value=1).replace("REQUEST", "shared = True\n    REQUEST")
        factory = HandlerFactory([folder("plain.py", f"{text}\nhandlers = [Plain()]\n")])
        assert factory("red").handlers == factory("blue").handlers

    def test_an_async_function_is_refused(self, folder):
        file = folder("plain.py", "async def handlers():\n    return []\n")
        with pytest.raises(HandlerLoadError, match=r"TypeError: handlers\(\) is async"):
            load_handlers([file])

    def test_two_handlers_of_a_file_for_one_request_are_refused(self, folder):
        text = PLAIN.format(value=1) + "\nclass Other(Plain): pass\n"
        file = folder("plain.py", text)
        told = r"plain\.py: other is never asked: plain answers request 0x0100 before it"
        with pytest.raises(HandlerLoadError, match=told):
            load_handlers([file])

    def test_one_that_another_file_replaces_is_warned_of(self, folder, caplog):
        files = [folder(name, PLAIN.format(value=1)) for name in ("a.py", "b.py")]
        factory = HandlerFactory(files)
        for vm in ("red", "blue"):
            assert len(factory(vm).handlers) == 2
        (told,) = caplog.messages
        why = "plain answers request 0x0100 before it"
        assert told == f"{files[1]}: plain is never asked: {why}, in {files[0]}"

    @pytest.mark.parametrize(
        ("attributes", "forgotten"),
        [
            ("", True),
            ("VERIFY_VALUE3 = VERIFY_VALUE4 = 5", False),
            ("VERIFY_VALUE1 = 5", False),
            ("VERIFY_VALUE3 = VERIFY_VALUE4 = None", False),
        ],
    )
    def test_stamps_that_were_forgotten_are_warned_of(self, folder, caplog, attributes, forgotten):
        text = PLAIN.format(value=1).replace(
            "REQUEST", f"MAGIC = 0x42494D56; {attributes}\n    REQUEST"
        )
        HandlerFactory([folder("plain.py", text)])
        assert ("plain has the standard magic and no stamps: " in caplog.text) is forgotten
        assert len(caplog.messages) == forgotten

    def test_a_handler_without_a_request_is_warned_of(self, folder, caplog):
        base = PLAIN.format(value=1).replace("REQUEST", "REQEST")
        text = (
            base
            + "\nclass Other(BridgeHandler[None]):\n    REQUEST = 1\n    handle = Plain.handle\n"
        )
        HandlerFactory([folder("plain.py", text)])
        assert [told.partition(": ")[2] for told in caplog.messages] == [
            "Plain has no REQUEST, so it is not offered"
        ]

    def test_a_dataclass_is_made_with_its_settings(self, folder):
        text = """
            from dataclasses import dataclass
            import msgspec
            from vmibridge import BridgeHandler, BridgeResponse

            @dataclass
            class Plain(BridgeHandler[int]):
                REQUEST = 0x100
                class Settings(msgspec.Struct):
                    value: int = 7
                settings: Settings
                async def handle(self, vmi, packet):
                    return BridgeResponse(value1=self.settings.value)
        """
        (handler,) = load_handlers([folder("plain.py", text)])
        assert anyio.run(answered, handler) == 7


RAISES = """
class Odd(BaseException):
    def __str__(self):
        raise SystemExit
    __repr__ = __str__
"""


class TestWhatAModuleRaises:
    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("raise BaseException('x')", "1: BaseException: x"),
            ("raise GeneratorExit", "1: GeneratorExit"),
            ("raise StopIteration", "1: StopIteration"),
            ("import asyncio; raise asyncio.CancelledError", "1: CancelledError"),
            (f"{RAISES}raise Odd", "6: Odd: <Odd: its str raised SystemExit>"),
            ("raise ValueError('two\\nlines \\x1b[2J \\ud800')", "1: ValueError: two lines "),
            ("raise ExceptionGroup('g', [ValueError()])", "1: ExceptionGroup: g"),
            ("raise SyntaxError", "1: SyntaxError"),
            ("x = '\\0", "SyntaxError"),
        ],
    )
    @pytest.mark.parametrize("where", ["module", "handlers", "init"])
    def test_is_one_line_with_its_place(self, folder, text, told, where):
        if where == "module":
            file = folder("plain.py", text)
        elif text.startswith("x = "):
            return
        elif where == "handlers":
            lines = "".join(f"    {line}\n" for line in text.splitlines())
            file = folder("plain.py", f"def handlers():\n{lines}")
            told = told.partition(" ")[2]
        else:
            lines = "".join(f"        {line}\n" for line in text.splitlines())
            file = folder("plain.py", f"{PLAIN.format(value=1)}    def __init__(self):\n{lines}")
            told = told.partition(" ")[2]
        with pytest.raises(HandlerLoadError, match=r"plain\.py") as raised:
            load_handlers([file])
        text = str(raised.value)
        assert told in text
        assert text.isprintable()

    def test_ctrl_c_passes(self, folder):
        with pytest.raises(KeyboardInterrupt):
            load_handlers([folder("plain.py", "raise KeyboardInterrupt")])

    @pytest.mark.parametrize(
        "line",
        [
            "asyncio.run(main())",
            "anyio.run(main)",
            "with asyncio.Runner() as runner: runner.run(main())",
            "uvloop.run(main())",
        ],
    )
    def test_a_module_that_runs_a_loop_is_told_so(self, folder, line):
        file = folder(
            "plain.py",
            f"import asyncio, anyio, uvloop\nasync def main(): ...\n{line}\n",
        )
        with pytest.raises(HandlerLoadError, match=r"plain\.py:3: runs an event loop while"):
            load_handlers([file])

        async def within():
            with pytest.raises(HandlerLoadError, match=r"plain\.py:3: runs an event loop while"):
                load_handlers([file])

        asyncio.run(within())

    def test_a_module_that_looks_for_a_loop_finds_none(self, folder):
        file = folder("plain.py", "import asyncio\nasyncio.get_running_loop().create_task(None)\n")
        with pytest.raises(HandlerLoadError, match="no running event loop while handlers"):
            load_handlers([file])
        assert asyncio._get_running_loop() is None


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    caplog.set_level(logging.WARNING)


def test_a_recording_does_not_tell_the_folder(folder):
    (handler,) = load_handlers([folder("plain.py", PLAIN.format(value=1))])
    assert recorded_handler(handler).type == "h.plain.Plain"


def test_what_is_found_names_the_source(folder):
    file = folder("plain.py", PLAIN.format(value=1))
    assert [offered.source for offered in find_handlers([folder.source])] == [file]
