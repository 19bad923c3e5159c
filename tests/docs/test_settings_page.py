"""The pages say of settings, and of the options for them, what the structs of settings say."""

import re

import msgspec
import pytest
from documents import rows, section

from vmibridge.bridge.bounds import declared
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentLimits

NAMES = [name for name in ServerSettings.__struct_fields__ if name != "policy"]
TYPES = {
    "timeout": "float",
    "soft_timeout": "float",
    "wait": "table",
    "retry_values": "list of integers",
    "result_timeout": "float",
    "fallback": "table or string",
    "queue": "integer",
    "in_flight": "integer",
    "in_flight_total": "integer",
    "grace": "float",
    "stop_timeout": "float",
    "handshake": "boolean",
    "blocked_after": "float",
}
"""As TOML calls them."""


@pytest.fixture(scope="module")
def table():
    lines = section("docs/configuration.md", "## `[server]`").partition("###")[0].splitlines()
    return [without_links(line) for line in lines if line.startswith("| `")]


def row(name):
    said = declared(ServerSettings, name)
    # That a value is 1 to 4 is in what its meaning says: value1 to value4.
    bounds = "" if name == "retry_values" else said.bounds
    means = f"{said.description}; {bounds}" if bounds else said.description
    default = as_toml(getattr(ServerSettings(), name))
    return (
        "| "
        + "".join(f"{cell} | " for cell in (f"`{name}`", TYPES[name], default))
        + (f"{said.unit} | {means} |" if said.unit else f"| {means} |")
    )


def test_each_has_its_row_with_type_default_unit_meaning_and_bounds(table):
    assert table == [row(name) for name in NAMES]


@pytest.mark.parametrize(
    ("command", "option", "default"),
    [
        ("run", "--timeout", ServerSettings().timeout),
        ("run", "--soft-timeout", ServerSettings().soft_timeout),
        ("serve", "--keep-vm", AgentLimits().keep),
    ],
)
def test_an_option_that_is_a_setting_has_its_default(command, option, default):
    cells = rows(section("docs/command-line.md", f"## vmibridge {command}"))[option]
    assert cells[1] == ("none" if default is None else f"{default:g}")


def as_toml(value):
    if value is None:
        return "none"
    if isinstance(value, msgspec.Struct):
        values = [f"value{n}" for n in range(1, 5) if getattr(value, f"value{n}") is not None]
        told = ", ".join(f"{name} = {getattr(value, name)}" for name in values)
        return f"`{{ {told} }}`" if told else "`{}`"
    return f"`{msgspec.json.format(msgspec.json.encode(value), indent=0).decode()}`"


def without_links(text):
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
