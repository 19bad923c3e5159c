"""Every option by an environment variable, by one rule."""

import os
import re
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from vmibridge.cli import main
from vmibridge.cli.app import COMMANDS, app_for
from vmibridge.cli.environment import Environment, variable_of
from vmibridge.cli.variables import MAX_LINES, OPTIONS, OTHERS, warnings_for

ROOT = Path(__file__).parents[2]
HELLO = "vmibridge.handlers.hello"


@pytest.fixture(autouse=True)
def without_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VMIBRIDGE_")]:
        monkeypatch.delenv(name)


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


def options_of(name):
    """The variables of all options of a command."""
    command = app_for(name.split())
    for word in name.split():
        command = command[word]
    options = {each.name for each in command.assemble_argument_collection()}
    return {variable_of(each) for each in options} - {None}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_variable_of_every_option(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert set(re.findall(r"\bVMIBRIDGE_\w+", text)) >= options_of(name)
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


# --- misspelt ---------------------------------------------------------------------------


def test_the_known_ones_are_those_of_the_options_of_all_commands():
    variables = set().union(*map(options_of, COMMANDS))
    assert {f"VMIBRIDGE_{name}" for name in OPTIONS} == variables


def test_the_other_known_ones_are_those_that_sources_read_or_set():
    """Of compose, images and manifests, units, scripts, the package, the tests and the Makefile."""
    set_or_read = (
        r"\$\{?(VMIBRIDGE_[A-Z0-9_]+)",
        r"^\s*(?:\*guest\s+)?(VMIBRIDGE_[A-Z0-9_]+): ",
        r"environ(?:\.get\(|\[)\"(VMIBRIDGE_[A-Z0-9_]+)\"",
        r"^Environment=(VMIBRIDGE_[A-Z0-9_]+)=",
        r"^(?:ENV)?\s+(VMIBRIDGE_[A-Z0-9_]+)=\S+(?: \\)?$",
        r"name: (VMIBRIDGE_[A-Z0-9_]+)$",
        r"^\t(VMIBRIDGE_[A-Z0-9_]+)=",
    )
    used = set()
    for folder in ("docker", "systemd", "vmibridge", "handlers", "guest", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (
                "",
                ".py",
                ".sh",
                ".yaml",
                ".Dockerfile",
                ".service",
            ):
                text = path.read_text("utf-8", errors="replace")
                used |= {
                    name for rule in set_or_read for name in re.findall(rule, text, re.MULTILINE)
                }
    makefile = (ROOT / "Makefile").read_text()
    used |= {name for rule in set_or_read for name in re.findall(rule, makefile, re.MULTILINE)}
    names = {name.removeprefix("VMIBRIDGE_") for name in used}
    assert "RECORDINGS" in names
    assert sorted(names - OPTIONS - OTHERS) == []
    assert sorted(OTHERS - names) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("RECROD", "did you mean VMIBRIDGE_RECORD?"),
        ("record", "did you mean VMIBRIDGE_RECORD?"),
        ("RECORDING", "did you mean VMIBRIDGE_RECORD?"),
        ("TIME_OUT", "did you mean VMIBRIDGE_TIMEOUT?"),
        ("KERNAL", "did you mean VMIBRIDGE_KERNEL?"),
        ("ZEBRA", "--help of a command shows them all"),
    ],
)
def test_one_line_names_the_closest(name, told, monkeypatch, said):
    monkeypatch.setenv(f"VMIBRIDGE_{name}", "x")
    line = f"vmibridge: VMIBRIDGE_{name}: no option has this variable, it is ignored; {told}"
    assert said("handlers", "list", HELLO) == (0, line)


@pytest.mark.parametrize("name", ["RECORDS\x1b[2J", "RECORDS\nvmibridge: well"])
def test_a_name_moves_no_cursor_and_begins_no_line(name, monkeypatch, said):
    monkeypatch.setenv(f"VMIBRIDGE_{name}", "x")
    status, line = said("handlers", "list", HELLO)
    assert status == 0
    assert line.isprintable()


def test_any_number_of_them_is_a_few_lines():
    lines = warnings_for(f"VMIBRIDGE_X{number}" for number in range(1000))
    assert len(lines) == MAX_LINES
    assert lines[-1] == "996 more variables that begin with VMIBRIDGE_ are ignored"


@pytest.mark.parametrize(
    "names",
    [
        # Of commands other than this one, of compose.yaml and docker/vm, of QEMU's container.
        ["EXIT_ZERO", "HEALTH_SOCKET", "OUTCOMES"],
        ["IMAGE", "ENV_FILE", "COMPOSE"],
        ["HOST_AT", "QEMU", "HEALTH"],
        # Kubernetes' own, for a service that is called vmibridge-server.
        ["SERVER_SERVICE_HOST", "SERVER_SERVICE_PORT", "SERVER_SERVICE_PORT_TLS", "SERVER_PORT"],
        ["SERVER_PORT_7443_TCP", "SERVER_PORT_7443_TCP_ADDR", "SERVICE_HOST", "PORT_1_UDP_PROTO"],
    ],
    ids=lambda names: names[0],
)
def test_what_images_units_and_pods_set_is_not_told(names, monkeypatch, said):
    for name in names:
        monkeypatch.setenv(f"VMIBRIDGE_{name}", "false" if name in OPTIONS else "x")
    assert said("handlers", "list", HELLO) == (0, "")


def test_help_and_version_say_nothing_of_it(monkeypatch, said):
    monkeypatch.setenv("VMIBRIDGE_RECROD", "x")
    for words in (["--help"], ["run", "--help"], ["run", "-h"], ["--version"]):
        assert said(*words) == (0, "")
