"""Where handlers come from: files, folders, dotted modules; and what is told when they do not."""

import pytest

from vmibridge import BridgeHandler
from vmibridge.config import Config, HandlerFactory, find_handlers, load_handlers
from vmibridge.errors import (
    ConfigError,
    HandlerLoadError,
    HandlerSourceError,
    MissingExtraError,
)

ONE = """
from vmibridge import BridgeHandler, BridgeResponse, method

class Base(BridgeHandler[None]):
    '''Abstract: it has no REQUEST.'''

class NoAnswer(BridgeHandler[None]):
    REQUEST = 9

class First(Base):
    REQUEST = 1
    async def handle(self, vmi, packet):
        return BridgeResponse(value1=1)

class SecondOne(Base):
    REQUEST = 2
    @method(1)
    async def go(self, vmi, packet):
        return BridgeResponse(value1=2)
"""

SETTINGS = """
import msgspec
from vmibridge import BridgeHandler

class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    most: int = 4

class Careful(BridgeHandler[None]):
    REQUEST = 3
    class Settings(msgspec.Struct, forbid_unknown_fields=True):
        names: list[str] = []
        limits: Limits = Limits()
        def __post_init__(self):
            if "" in self.names:
                raise ValueError("an empty name")
    def __init__(self, settings):
        self.settings = settings
    async def handle(self, vmi, packet):
        return None
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


class TestSources:
    def test_a_file_offers_its_concrete_handlers_in_order(self, source):
        handlers = load_handlers([source(ONE)])
        assert [handler.name for handler in handlers] == ["first", "second_one"]

    def test_a_folder_offers_its_files_in_order_without_private_ones(self, source, tmp_path):
        source(ONE, "folder/b.py")
        source(SETTINGS, "folder/a.py")
        source("raise RuntimeError", "folder/_private.py")
        source("x = 1", "folder/no_handler.py")
        handlers = load_handlers([str(tmp_path / "folder")])
        assert [handler.name for handler in handlers] == ["careful", "first", "second_one"]

    def test_a_dotted_module_of_the_current_folder(self, source):
        source("", "dotted_package_of_tests/__init__.py")
        source(ONE, "dotted_package_of_tests/inner.py")
        handlers = load_handlers(["dotted_package_of_tests.inner"])
        assert [handler.name for handler in handlers] == ["first", "second_one"]

    def test_a_handlers_function_decides_instead(self, source):
        text = ONE + "\ndef handlers():\n    return [SecondOne(), First]\n"
        handlers = load_handlers([source(text)])
        assert [handler.name for handler in handlers] == ["second_one", "first"]
        assert all(isinstance(handler, BridgeHandler) for handler in handlers)

    def test_one_source_given_twice_is_loaded_once(self, source):
        path = source(ONE)
        assert len(load_handlers([path, path])) == 2

    def test_what_a_module_imports_is_not_its_own(self, source, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        source(ONE, "shared_by_tests.py")
        path = source("from shared_by_tests import First, Base\n" + ONE.replace("Base(", "Own("))
        assert [offered.source for offered in find_handlers([path])] == [path] * 2

    def test_two_files_of_one_name_are_two_modules(self, source):
        paths = [source(ONE, "one/same.py"), source(ONE, "two/same.py")]
        assert len(load_handlers(paths)) == 4

    def test_a_package_offers_what_its_modules_offer(self, source):
        source("", "package_of_tests/__init__.py")
        source(ONE, "package_of_tests/two.py")
        source(SETTINGS, "package_of_tests/one.py")
        source("raise RuntimeError", "package_of_tests/_private.py")
        handlers = load_handlers(["package_of_tests"])
        assert [handler.name for handler in handlers] == ["careful", "first", "second_one"]


NEEDS_AN_EXTRA = """
import msgspec
from vmibridge.errors import MissingExtraError
class Needy(First):
    REQUEST = 0x77
    class Settings(msgspec.Struct):
        pass
    def __init__(self, settings):
        raise MissingExtraError("the handler", "fetch")
"""


class TestAHandlerWhoseExtraIsMissing:
    @pytest.fixture
    def folder(self, source, tmp_path):
        source(ONE, "a.py")
        source(ONE + NEEDS_AN_EXTRA, "b.py")
        return tmp_path

    def test_is_left_out_of_a_folder_and_logged_once(self, folder, caplog):
        factory = HandlerFactory([str(folder)])
        for vm in ("red", "blue"):
            assert "needy" not in [handler.name for handler in factory(vm).handlers]
        (record,) = [each for each in caplog.records if each.name == "vmibridge.config.handlers"]
        assert record.levelname == "WARNING"
        assert record.getMessage().startswith("the handler needy is left out: the handler needs")

    def test_is_left_out_of_a_package(self, source, tmp_path, monkeypatch):
        (tmp_path / "needy_package").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("__init__", "a"):
            source(ONE if name == "a" else "", f"needy_package/{name}.py")
        source(ONE + NEEDS_AN_EXTRA, "needy_package/b.py")
        found = [handler.name for handler in load_handlers(["needy_package"])]
        assert found
        assert "needy" not in found
        with pytest.raises(MissingExtraError):
            load_handlers(["needy_package.b"])

    def test_is_an_error_when_its_file_is_named(self, folder):
        for sources in (["b.py"], [".", "b.py"], ["b.py", "."]):
            with pytest.raises(MissingExtraError):
                load_handlers([str(folder / each) for each in sources])

    def test_is_an_error_when_it_has_settings(self, folder):
        config = Config("c.toml", "[handlers.needy]\n")
        with pytest.raises(MissingExtraError):
            load_handlers([str(folder)], config)

    def test_is_an_error_when_none_is_left(self, folder):
        (folder / "a.py").unlink()
        (folder / "b.py").write_text(
            (folder / "b.py").read_text() + "\ndef handlers():\n    return [Needy]\n"
        )
        with pytest.raises(MissingExtraError):
            load_handlers([str(folder)])


class TestWhatIsTold:
    @pytest.mark.parametrize("name", ["nothing.py", "no/such/folder", "no_such_module_here", "a b"])
    def test_a_source_that_is_not_there(self, name):
        with pytest.raises(HandlerSourceError, match="no such file, folder or module"):
            load_handlers([name])

    def test_a_source_without_handlers(self, source):
        with pytest.raises(HandlerSourceError, match="offers no handler"):
            load_handlers([source("x = 1")])

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("x = 1\nraise ValueError('broken')", r"mine\.py:2: ValueError: broken"),
            ("x = 1\n\nclass:", r"mine\.py:3: SyntaxError"),
            ("import no_such_dependency", r"mine\.py:1: ModuleNotFoundError"),
            ("x = 1\nraise SystemExit(0)", r"mine\.py:2: SystemExit: 0"),
            ("def handlers():\n    raise SystemExit", r"mine\.py:2: SystemExit"),
            ("def handlers():\n    return [5]", r"handlers\(\) returned 5, not a handler"),
            ("def handlers():\n    1 / 0", r"mine\.py:2: ZeroDivisionError"),
            (
                ONE + "\n    def __init__(self):\n        raise OSError('no disk')",
                "SecondOne: OSError: no disk",
            ),
        ],
    )
    def test_a_module_that_fails_is_named_with_its_line(self, source, text, told):
        with pytest.raises(HandlerLoadError, match=told):
            load_handlers([source(text)])

    def test_a_module_that_failed_can_be_mended_and_loaded(self, source):
        path = source("raise ValueError")
        with pytest.raises(HandlerLoadError):
            load_handlers([path])
        assert len(load_handlers([source(ONE)])) == 2


class TestSettings:
    def test_are_decoded_for_the_handler(self, source):
        config = Config("c.toml", '[handlers.careful]\nnames = ["a"]\nlimits = { most = 7 }')
        (handler,) = load_handlers([source(SETTINGS)], config)
        assert handler.settings.names == ["a"]
        assert handler.settings.limits.most == 7

    def test_have_defaults(self, source):
        (handler,) = load_handlers([source(SETTINGS)])
        assert handler.settings.limits.most == 4

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (
                "[handlers.careful]\nnames = 5",
                "c.toml:2: handlers.careful.names: must be an array, got an integer",
            ),
            (
                "[handlers.careful]\nlimits = { most = 'x' }",
                "c.toml:2: handlers.careful.limits.most: must be an integer, got a string",
            ),
            (
                "[handlers.careful.limits]\n\nmost = 'x'",
                "c.toml:3: handlers.careful.limits.most: must be an integer, got a string",
            ),
            (
                "[handlers.careful]\n\nmames = []",
                "c.toml:3: handlers.careful.mames: no such key; there are names, limits",
            ),
            ("[handlers.careful]\nnames = ['']", "c.toml:1: handlers.careful: an empty name"),
            (
                "[handlers.carefull]\nx = 1",
                "c.toml:1: handlers.carefull: no such handler is loaded; did you mean 'careful'?",
            ),
            (
                "[handlers.zzz]\n",
                "c.toml:1: handlers.zzz: no such handler is loaded; loaded: careful",
            ),
        ],
    )
    def test_that_are_wrong_are_named_with_key_and_line(self, source, text, told):
        with pytest.raises(ConfigError) as error:
            load_handlers([source(SETTINGS)], Config("c.toml", text))
        assert str(error.value).startswith(told)

    def test_for_a_handler_that_the_module_makes_itself_are_refused(self, source):
        text = ONE + "\ndef handlers():\n    return [First()]\n"
        with pytest.raises(ConfigError, match=r"c.toml:1: handlers.first: .* made by"):
            load_handlers([source(text)], Config("c.toml", "[handlers.first]\nx = 1"))

    def test_for_a_handler_that_takes_none_are_refused(self, source):
        with pytest.raises(ConfigError, match=r"c.toml:1: handlers.first: .*takes no settings"):
            load_handlers([source(ONE)], Config("c.toml", "[handlers.first]\nx = 1"))


class TestServerSettings:
    def test_are_decoded(self):
        config = Config(
            "c.toml", "[server]\ntimeout = 2\nqueue = 5\nfallback = { value1 = 0xffff }"
        )
        assert config.server.timeout == 2.0
        assert config.server.queue == 5
        assert config.server.fallback.value1 == 0xFFFF
        assert Config().server.timeout == 5.0

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (
                "[server]\ntimeout = 'soon'",
                "c.toml:2: server.timeout: must be a number, got a string",
            ),
            ("[server]\ntimeout = -1", "c.toml:2: server.timeout: must be above 0 seconds, got -1"),
            ("[server]\nqueue = 0", "c.toml:2: server.queue: must be 1 or more traps, got 0"),
            (
                "[server]\n\nfallback = { value9 = 1 }",
                "c.toml:3: server.fallback.value9: no such key; there are value1",
            ),
            (
                "[server]\nfallback = { value1 = -1 }",
                "c.toml:2: server.fallback.value1: must be 0 or more, got -1",
            ),
            (
                f"[server]\nfallback = {{ value1 = {1 << 64} }}",
                "c.toml:2: server.fallback: value1 has 64 bits, got 0x1",
            ),
            ("[sever]\n", "c.toml:1: sever: no such key; there are server, policy, handlers"),
            ("[server", "c.toml: Expected ']'"),
            ("server = 5", "c.toml:1: server: must be a table, got an integer"),
        ],
    )
    def test_that_are_wrong_are_named_with_key_and_line(self, text, told):
        with pytest.raises(ConfigError) as error:
            _ = Config("c.toml", text).server
        assert str(error.value).startswith(told)

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nothing\.toml"):
            Config.read(tmp_path / "nothing.toml")
        (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match=r"binary.toml"):
            Config.read(tmp_path / "binary.toml")
