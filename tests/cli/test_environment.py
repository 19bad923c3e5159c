"""Every option by an environment variable, by one rule."""

import re

import pytest
from cyclopts import CycloptsError

from vmibridge.cli import main
from vmibridge.cli.app import COMMANDS, app_for
from vmibridge.cli.environment import Environment, variable_of

HELLO = "vmibridge.handlers.hello"


@pytest.fixture(autouse=True)
def without_variables(monkeypatch):
    monkeypatch.delenv("VMIBRIDGE_QEMU", raising=False)


@pytest.fixture
def said(capsys):
    """`said(WORD...)`: the status of a command, and its line on standard error."""

    def run(*words):
        status = main(words)
        return status, capsys.readouterr().err.strip()

    return run


def taken(tokens, **variables):
    """What a command is called with."""
    environment = Environment({f"VMIBRIDGE_{name}": value for name, value in variables.items()})
    app = app_for(tokens, environment)
    return app.parse_args(tokens, exit_on_error=False, print_error=False)[1].arguments


# --- the rule ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_variable_of_every_option(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    command = app_for(name.split())
    for word in name.split():
        command = command[word]
    options = {each.name for each in command.assemble_argument_collection()}
    variables = {variable_of(each) for each in options} - {None}
    assert set(re.findall(r"\bVMIBRIDGE_\w+", text)) >= variables
    assert "VMIBRIDGE_HELP" not in text


def test_positions_and_words_have_none():
    assert variable_of("--soft-timeout") == "VMIBRIDGE_SOFT_TIMEOUT"
    assert [variable_of(each) for each in ("FILE", "-o", "--help", "--version")] == [None] * 4


def test_values_of_each_kind():
    given = taken(
        ["run"],
        BACKEND="web=unicorn:a.bin db=unicorn:b.bin?width=32",
        HANDLERS="own.py more/",
        UNTIL="7",
        CONFIG="/etc/vmibridge.toml",
        TIMEOUT="2.5",
        UVLOOP="1",
        JSON="no",
    )
    assert given["backend"] == ["web=unicorn:a.bin", "db=unicorn:b.bin?width=32"]
    assert given["handlers"] == ["own.py", "more/"]
    options = given["options"]
    assert (given["until"], options.timeout, options.uvloop, options.json) == (7, 2.5, True, False)
    assert str(options.config) == "/etc/vmibridge.toml"


def test_an_option_stands_over_its_variable():
    given = taken(["run", "--backend", "unicorn:mine"], BACKEND="unicorn:other", TIMEOUT="2")
    assert given["backend"] == ["unicorn:mine"]
    assert given["options"].timeout == 2


def test_an_empty_variable_is_as_one_that_is_not_set():
    given = taken(["run"], BACKEND="unicorn:a", CONFIG="", TIMEOUT="")
    assert given.get("options") is None
    with pytest.raises(CycloptsError, match="--backend"):
        taken(["run"], BACKEND="")


# --- what is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TIMEOUT", "soon", "VMIBRIDGE_TIMEOUT 'soon': is no number"),
        ("TIMEOUT", "-1", "VMIBRIDGE_TIMEOUT: must be above 0 seconds, got -1.0"),
        ("JSON", "maybe", "VMIBRIDGE_JSON 'maybe': is neither true nor false"),
        ("LOG_LEVEL", "loud", 'Invalid value "loud" for VMIBRIDGE_LOG_LEVEL'),
        ("CONFIG", "/none.toml", "VMIBRIDGE_CONFIG: /none.toml: No such file"),
        ("HANDLERS", f"{HELLO} /none.py", "VMIBRIDGE_HANDLERS: /none.py: there is no such file"),
        ("BACKEND", "a=unicorn:x?frob=1", "VMIBRIDGE_BACKEND: unicorn:x: no option 'frob'"),
        ("BACKEND", "vmware:x", "VMIBRIDGE_BACKEND: no backend for 'vmware:x'"),
        ("ROTATE", "1h", "VMIBRIDGE_ROTATE is about a recording"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(name, value, told, monkeypatch, said):
    words = {"BACKEND": "unicorn:guest.bin", "HANDLERS": HELLO}
    words.pop(name, None)
    monkeypatch.setenv(f"VMIBRIDGE_{name}", value)
    given = [word for key, text in words.items() for word in (f"--{key.lower()}", text)]
    status, line = said("run", *given)
    assert status == 2
    assert "\n" not in line
    assert told in line


def test_what_the_message_names_counts_more_than_a_value_that_it_has_in_it(monkeypatch, said):
    monkeypatch.setenv("VMIBRIDGE_UVLOOP", "true")
    monkeypatch.setenv("VMIBRIDGE_ASYNC_BACKEND", "trio")
    status, line = said("run", "--backend=unicorn:x", f"--handlers={HELLO}")
    told = "vmibridge: VMIBRIDGE_UVLOOP: uvloop is for asyncio, so it does not go with trio"
    assert (status, line) == (2, told)


def test_an_option_that_was_given_is_named_as_it_was(monkeypatch, said):
    monkeypatch.setenv("VMIBRIDGE_TIMEOUT", "2")
    status, line = said("run", "--backend=unicorn:x", f"--handlers={HELLO}", "--timeout=-1")
    assert (status, line) == (2, "vmibridge: --timeout: must be above 0 seconds, got -1.0")
