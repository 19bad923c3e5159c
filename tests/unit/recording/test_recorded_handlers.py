"""What a session says of handlers: their settings, and the modules of their project."""

import hashlib

import anyio
import msgspec
import pytest

from vmibridge import Bridge, BridgeHandler
from vmibridge.bridge.made_with import made_with
from vmibridge.config import Config, load_handlers
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError
from vmibridge.recording.messages import RecordedHandler, Session
from vmibridge.recording.project_modules import module_name, project_modules
from vmibridge.recording.redaction import Redaction, RedactionRule
from vmibridge.recording.session import recorded_handler, session_of, settings_text
from vmibridge.vm.arch.x86.description import X86

HANDLER = """
import json
import anyio
import msgspec
import shared_part
from package import inner
from vmibridge import BridgeHandler

class Job(BridgeHandler[int]):
    REQUEST = 0x0300

    class Settings(msgspec.Struct, frozen=True):
        limit: int = 5
        api_key: str = "k"
        inside: dict[str, str] = {}

    def __init__(self, settings):
        self.limit = settings.limit

    async def handle(self, vmi, packet):
        import asked_for_later
"""


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    files = {
        "job.py": HANDLER,
        "shared_part.py": "from deeper import X\n",
        "deeper.py": "X = 1\n",
        "asked_for_later.py": "Y = 1\n",
        "not_imported.py": "",
        "package/__init__.py": "",
        "package/inner.py": "from . import more\nfrom .. import job\n",
        "package/more.py": "import sys\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def handler(project):
    config = Config("", '[handlers.job]\nlimit = 7\napi_key = "s3cret"\ninside = { token = "t" }')
    return load_handlers([str(project / "job.py")], config)[0]


def test_modules_are_those_of_the_project_with_their_hashes(handler):
    assert recorded_handler(handler).modules == {
        "asked_for_later": digest("Y = 1\n"),
        "deeper": digest("X = 1\n"),
        "package": digest(""),
        "package.inner": digest("from . import more\nfrom .. import job\n"),
        "package.more": digest("import sys\n"),
        "shared_part": digest("from deeper import X\n"),
    }


def test_a_module_that_changes_has_another_hash(handler, project):
    (project / "deeper.py").write_text("X = 20\n")
    assert recorded_handler(handler).modules["deeper"] == digest("X = 20\n")


@pytest.mark.parametrize("source", ["x = (", "x = '\ud800'.encode(", "(" * 10_000, "\0"])
def test_a_source_that_cannot_be_read_is_hashed_and_ends_nothing(handler, project, source):
    data = source.encode("utf-8", "surrogatepass")
    (project / "deeper.py").write_bytes(data)
    assert recorded_handler(handler).modules["deeper"] == hashlib.sha256(data).hexdigest()


def test_python_and_installed_packages_are_no_modules_of_a_project():
    assert project_modules("json") == project_modules("msgspec") == {}
    assert project_modules("vmibridge.config") == project_modules("no.such.module") == {}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("vmibridge.config.loaded./srv/handlers@2.fetch", "fetch"),
        ("vmibridge.config.loaded./srv/handlers.pack.inner", "pack.inner"),
        ("vmibridge.config.loaded./srv/handlers", "__init__"),
        ("project.handlers", "project.handlers"),
    ],
)
def test_a_module_is_named_without_its_folder(name, kept):
    assert module_name(name) == kept


def test_settings_are_recorded_without_secrets(handler):
    assert msgspec.json.decode(settings_text(handler)) == {
        "limit": 7,
        "api_key": "left out",
        "inside": {"token": "left out"},
    }
    assert recorded_handler(handler).settings == settings_text(handler)


class TestSettingsOfAHandlerThatIsMadeInPython:
    class Settings(msgspec.Struct):
        limit: int = 5

    def test_are_found_where_it_keeps_them(self):
        class Keeps(BridgeHandler[int]):
            REQUEST = 1
            Settings = self.Settings

            def __init__(self, settings):
                self._own = settings

            async def handle(self, vmi, packet):
                return None

        assert settings_text(Keeps(self.Settings(6))) == '{"limit":6}'
        assert settings_text(Keeps(None)) is None

    def test_are_not_known_elsewhere(self):
        class Unpacks(BridgeHandler[int]):
            REQUEST = 1
            Settings = self.Settings

            async def handle(self, vmi, packet):
                return None

        assert made_with(Unpacks()) is None


@pytest.mark.parametrize(
    ("rules", "hidden"),
    [
        (["settings"], True),
        (["0x0300:settings"], True),
        (["0x0301:settings"], False),
        (["memory"], False),
    ],
)
def test_settings_are_left_out_by_a_rule(handler, rules, hidden):
    redaction = Redaction(rules)
    session = session_of_one(handler, redaction)
    assert (session.handlers[0].settings is None) is hidden
    assert redaction.of(0x0300) == frozenset({"memory"} & {*rules})
    # A reader of 0.2.0 knows no such rule, and would not take the session for one.
    assert all(rule.what != "settings" for rule in session.redaction)


def session_of_one(handler, redaction):
    async def main():
        return session_of("vm", Bridge(handler), ServerSettings(), redaction, X86, None, 0)

    return anyio.run(main)


def test_a_session_of_0_2_0_is_read():
    old = msgspec.msgpack.encode(
        {"vm": "vm", "handlers": [{"name": "a", "type": "b", "request": 1}]}
    )
    (handler,) = msgspec.msgpack.decode(old, type=Session).handlers
    assert handler == RecordedHandler("a", "b", 1)
    assert (handler.settings, handler.modules) == (None, {})


def test_settings_is_a_rule_of_the_command_line():
    assert str(RedactionRule.parse("0x0300:settings")) == "0x0300:settings"
    with pytest.raises(ConfigError):
        RedactionRule.parse("setting")


def test_the_file_of_settings_may_have_rules_for_a_replay():
    assert Config("", '[replay]\nignore = ["output.id"]').replay_ignore == ("output.id",)
    with pytest.raises(ConfigError, match=r"^c\.toml:2: replay\.ignored: no such key; there are"):
        Config("c.toml", '[replay]\nignored = ["output.id"]')
