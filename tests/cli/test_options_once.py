"""An option that several commands have is declared once; that of a setting, in its struct."""

import dataclasses
import importlib
import inspect
from collections import defaultdict
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from cyclopts import Parameter

from vmibridge.bridge.bounds import declared
from vmibridge.cli import replay, serve
from vmibridge.cli.app import COMMANDS
from vmibridge.cli.server_options import ServerOptions
from vmibridge.cli.setting_options import setting, with_options
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError
from vmibridge.recording import Recorder
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.transport import AgentLimits, AgentServer

pytestmark = pytest.mark.no_cover

NOT_THE_SAME = {
    "backend": "several VMs, or the one of an agent",
    "config": "all of the file, or its handlers alone",
    "files": "recordings, or recordings and folders of them",
    "ignore": "fields of two recordings, or rules for what handlers answer",
    "limit": "where a list ends, or how much a page shows",
    "log_level": "a replay has a level more, and is quiet by default",
    "name": "what a recording is kept as: an option of put, an argument of get",
    "outcomes": "whether each trap is shown, or the file that qemu run shows them in",
    "timeout": "by default that of the server, or the recorded one; both from ServerSettings",
    "to": "a format, or where a recording is kept",
    "until": "when a run ends, or the last trap that is listed",
    "vm": "which traps are listed, or which VMs are replayed",
    "within": "until a check has failed, or what a guest gets to go",
}


def function_of(name):
    module, _, attribute = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"vmibridge.cli.{module}"), attribute)


def options_of(function):
    """The annotation of each option, those of a group of options included."""
    for name, hint in get_type_hints(function, include_extras=True).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        groups = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if groups:
            yield from get_type_hints(groups[0], include_extras=True).items()
        elif name != "return":
            yield name, hint


def parameters_of(hint):
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    return [each for each in hint.__metadata__ if isinstance(each, Parameter)]


def test_an_option_of_several_commands_is_declared_once():
    found = defaultdict(dict)
    for command in COMMANDS:
        for name, hint in options_of(function_of(command)):
            found[name][command] = parameters_of(hint)
    typed_again = {
        name: list(commands)
        for name, commands in found.items()
        if len({id(parameters[0]) for parameters in commands.values()}) > 1
    }
    assert typed_again.keys() == NOT_THE_SAME.keys(), typed_again


def default(function, name):
    return inspect.signature(function).parameters[name].default


def words(hint):
    """Those of a `Literal`, wherever in the annotation it is."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    inside = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return set().union(*map(words, inside))


def test_no_outside_is_what_the_struct_has_two_words_for():
    assert default(replay.replay, "no_outside") is False
    assert ReplayOptions().outside == "call"
    assert words(get_type_hints(ReplayOptions)["outside"]) == {"call", "refuse"}


@pytest.mark.parametrize(
    "name", [each for each in ReplayOptions.__struct_fields__ if each != "outside"]
)
def test_an_option_of_replay_has_words_and_default_of_its_struct(name):
    # Which is not imported for the help, as its extra may be missing.
    hints = get_type_hints(replay.replay, include_extras=True)
    assert default(replay.replay, name) == getattr(ReplayOptions(), name)
    assert words(hints[name]) == words(get_type_hints(ReplayOptions)[name])


def test_what_serve_does_with_repeated_traps_is_as_in_python():
    assert default(serve.serve, "repeated") == default(AgentServer, "repeated")


def test_unrecorded_has_the_words_of_a_recorder_and_says_its_default():
    hint = get_type_hints(ServerOptions, include_extras=True)["unrecorded"]
    assert words(hint) == words(get_type_hints(Recorder.__init__)["on_error"])
    (parameter,) = parameters_of(hint)
    assert f"{default(Recorder, 'on_error')} by default" in parameter.help


def test_a_setting_tells_meaning_unit_bounds_and_default():
    said = declared(AgentLimits, "keep")
    assert said == ("how long a VM is remembered whose agent is away", "seconds", "above 0")
    assert setting(AgentLimits, "keep").help == (
        "How long a VM is remembered whose agent is away. Seconds, above 0; 300 by default."
    )
    assert setting(ServerSettings, "soft_timeout").help.endswith("; none by default.")
    assert setting(ServerSettings, "timeout", "as recorded").help.endswith(
        "; as recorded by default."
    )


def test_options_that_are_given_stand_over_the_settings():
    settings = ServerSettings(timeout=2.0, soft_timeout=1.0)
    assert with_options(settings, ServerOptions().settings) == settings
    given = ServerOptions(timeout=3.0).settings
    assert with_options(settings, given) == ServerSettings(timeout=3.0, soft_timeout=1.0)


@pytest.mark.parametrize(
    ("struct", "name", "told"),
    [
        (ServerSettings, "timeout", "--timeout: must be above 0 seconds, got -1.0"),
        (ServerSettings, "soft_timeout", "--soft-timeout: must be above 0 seconds, got -1.0"),
        (AgentLimits, "keep", "--keep-vm: must be above 0 seconds, got -1.0"),
    ],
)
def test_an_option_that_is_out_of_bounds_is_named(struct, name, told):
    with pytest.raises(ConfigError) as error:
        with_options(struct(), {name: -1.0}, {"keep": "keep_vm"})
    assert str(error.value) == told
