"""The settings of a server are one struct; Python, the TOML file and its own defaults agree."""

import inspect

import msgspec
import pytest

from vmibridge import BridgeServer
from vmibridge.config import Config
from vmibridge.config.file import _Server
from vmibridge.engine.settings import DEFAULTS, ServerSettings

NAMES = ServerSettings.__struct_fields__
OTHERS = {"taps", "before_resume"}


def keywords():
    parameters = inspect.signature(BridgeServer).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_the_server_takes_each_by_its_name():
    assert keywords().keys() - OTHERS == set(NAMES)


def test_the_file_has_each_but_the_policy_which_is_a_table_of_its_own():
    assert set(_Server.__struct_fields__) == set(NAMES) - {"policy"}


def test_without_a_file_all_are_as_by_default():
    assert Config().server == ServerSettings() == DEFAULTS


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fallback"])
def test_a_server_has_the_same_default(name):
    assert keywords()[name].default == getattr(DEFAULTS, name)


def test_the_fallback_of_a_server_is_by_default_that_of_the_settings():
    assert keywords()["fallback"].default is None
    assert msgspec.structs.astuple(DEFAULTS.fallback) == (None,) * 5
