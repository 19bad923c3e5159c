"""The settings of a server are one struct; Python, the TOML file and its own defaults agree."""

import inspect
import math
from typing import Annotated, get_type_hints

import msgspec
import pytest

from vmibridge import Bridge, BridgeResponse, BridgeServer, Policy
from vmibridge.config import Config
from vmibridge.engine.settings import DEFAULTS, ServerSettings
from vmibridge.errors import ConfigError
from vmibridge.testing import FakeBackend

NAMES = ServerSettings.__struct_fields__
OTHERS = {"taps", "before_resume"}
OTHER_VALUES = {
    "timeout": 1.5,
    "soft_timeout": 2.5,
    "wait": BridgeResponse(2),
    "retry_values": (2, 3),
    "result_timeout": 3.5,
    "fallback": BridgeResponse(3),
    "queue": 4,
    "in_flight": 5,
    "in_flight_total": 6,
    "grace": 7.5,
    "stop_timeout": 8.5,
    "policy": Policy(rings=frozenset({3})),
    "handshake": False,
    "blocked_after": 9.5,
}
"""Of each setting one that is not the default, no two alike."""
IN_THE_FILE = {
    "wait": "{ value1 = 2 }",
    "fallback": "{ value1 = 3 }",
    "retry_values": "[2, 3]",
    "handshake": "false",
}
OUT_OF_BOUNDS = [
    ("timeout", 0, "must be above 0 seconds, got 0"),
    ("timeout", -1.5, "must be above 0 seconds, got -1.5"),
    ("timeout", math.nan, "must be above 0 seconds, got nan"),
    ("soft_timeout", 0, "must be above 0 seconds, got 0"),
    ("result_timeout", -1, "must be above 0 seconds, got -1"),
    ("stop_timeout", 0, "must be above 0 seconds, got 0"),
    ("blocked_after", 0, "must be above 0 seconds, got 0"),
    ("grace", -1, "must be 0 or more seconds, got -1"),
    ("grace", math.nan, "must be 0 or more seconds, got nan"),
    ("queue", 0, "must be 1 or more traps, got 0"),
    ("in_flight", 0, "must be 1 or more handlers, got 0"),
    ("in_flight_total", -3, "must be 1 or more handlers, got -3"),
]


def keywords():
    parameters = inspect.signature(BridgeServer).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_the_server_takes_each_by_its_name():
    assert keywords().keys() - OTHERS == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fallback"])
def test_a_server_has_the_same_default_and_type(name):
    assert keywords()[name].default == getattr(DEFAULTS, name)
    assert get_type_hints(BridgeServer.__init__)[name] == get_type_hints(ServerSettings)[name]


def test_the_fallback_of_a_server_is_by_default_that_of_the_settings():
    assert keywords()["fallback"].default is None
    assert msgspec.structs.astuple(DEFAULTS.fallback) == (None,) * 5


@pytest.mark.parametrize("name", NAMES)
def test_each_keyword_of_a_server_becomes_the_setting_of_its_name(name):
    given = {name: OTHER_VALUES[name]}
    server = BridgeServer(FakeBackend(), Bridge(), **given)
    assert server._settings == ServerSettings(**given) != DEFAULTS


@pytest.mark.parametrize("name", [name for name in NAMES if name != "policy"])
def test_each_key_of_the_file_becomes_the_setting_of_its_name(name):
    value = IN_THE_FILE.get(name, OTHER_VALUES[name])
    read = Config("c.toml", f"[server]\n{name} = {value}").server
    assert read == ServerSettings(**{name: OTHER_VALUES[name]})


def test_the_policy_is_a_table_of_its_own():
    assert Config("c.toml", "[policy]\nrings = [3]").server == ServerSettings(
        policy=OTHER_VALUES["policy"]
    )
    with pytest.raises(ConfigError, match=r"^c.toml:2: server.policy: no such key; there are tim"):
        Config("c.toml", "[server]\npolicy = { rings = [3] }")


def test_without_a_file_all_are_as_by_default():
    assert Config().server == ServerSettings() == DEFAULTS


@pytest.mark.parametrize(("name", "value", "told"), OUT_OF_BOUNDS)
def test_a_bound_has_one_message_in_python_and_in_the_file(name, value, told):
    with pytest.raises(ValueError) as in_python:
        BridgeServer(FakeBackend(), Bridge(), **{name: value})
    assert str(in_python.value) == f"{name} {told}"
    with pytest.raises(ConfigError) as in_the_file:
        Config("c.toml", f"[server]\n{name} = {value}")
    assert str(in_the_file.value) == f"c.toml:2: server.{name}: {told}"


def test_of_a_list_the_item_that_is_out_of_bounds_is_named():
    with pytest.raises(ValueError, match=r"^retry_values must each be 1 to 4, got 5$"):
        ServerSettings(retry_values=(1, 5))
    with pytest.raises(ConfigError, match=r"^c.toml:2: server.retry_values.1: must be 1 to 4, got"):
        Config("c.toml", "[server]\nretry_values = [1, 5]")


def test_the_settings_of_a_handler_have_the_same_messages():
    class Settings(msgspec.Struct):
        most: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
        name: Annotated[str, msgspec.Meta(min_length=2)] = "ab"

    with pytest.raises(ConfigError, match=r"^c.toml:2: handlers.x.most: must be 1 to 9, got 10$"):
        Config("c.toml", "[handlers.x]\nmost = 10").settings_of("x", Settings)
    with pytest.raises(
        ConfigError, match=r"^c.toml:2: handlers.x.name: must be a string of length"
    ):
        Config("c.toml", "[handlers.x]\nname = 'a'").settings_of("x", Settings)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_means(name):
    field = next(each for each in msgspec.structs.fields(ServerSettings) if each.name == name)
    assert any(getattr(said, "description", None) for said in field.type.__metadata__)
