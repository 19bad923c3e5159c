"""The reference pages, held against the code: options, settings, fields, codes."""

import ast
import inspect
import re
import sys
import tomllib
from typing import get_args

import msgspec
import pytest
from documents import ROOT, prose, rows, run, section

from vmibridge import BridgeHandler, BridgeServer, Gate, OutcomeKind, StatusKind
from vmibridge import method as mark_method
from vmibridge.backends.unicorn.backend import UnicornOptions
from vmibridge.cli.handlers import HandlerLine, MethodLine
from vmibridge.cli.trap_line import TrapLine, VcpuLine, summary_json
from vmibridge.config import Config, find_handlers
from vmibridge.engine.access_policy import AddressRange, Policy, Quota, Rate
from vmibridge.engine.handshake import VERSION, Feature, Host, Limit
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.errors import ConfigError
from vmibridge.health.state import Code, Reason, Report
from vmibridge.recording.export.jsonl import FullTrapRecord
from vmibridge.recording.export.rows import ACCESS_COLUMNS, TRAP_COLUMNS
from vmibridge.vm.memory import GuestMemory
from vmibridge.vm.spec import parse_size

# --- reference tables -------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "handlers list",
        "completion",
        "demo",
        "qemu fetch",
        "qemu initramfs",
        "inspect",
        "export",
        "import",
        "edit",
        "diff",
        "recover",
        "replay",
        "report",
        "qemu build-plugin",
        "qemu run",
        "qemu attach",
        "qemu device-args",
        "qemu stop",
        "agent",
        "serve",
        "health",
    ],
)
def test_every_option_is_there(command, environment):
    help_text = run(
        [sys.executable, "-m", "vmibridge", *command.split(), "--help"],
        ROOT,
        {**environment, "COLUMNS": "200"},
    ).stdout
    options = set(re.findall(r"--[a-z][a-z-]*", help_text))
    table = rows(section("docs/command-line.md", f"## vmibridge {command}"))
    assert {name for name in table if name.startswith("--")} == options


def test_every_json_field_is_there():
    told = section("docs/command-line.md", "### JSON lines")
    summary = msgspec.json.decode(summary_json({"vm": Summary()}))["summary"]
    trap_fields, summary_fields, vcpu_fields = told.split("| field of ")
    assert set(rows(trap_fields)) == set(TrapLine.__struct_fields__)
    assert set(rows(summary_fields)) == set(summary)
    assert set(rows(vcpu_fields)) == set(VcpuLine.__struct_fields__)


def test_every_field_and_column_of_a_recorded_trap_is_there():
    told = section("docs/command-line.md", "## vmibridge inspect").partition("| field |")[2]
    assert names_in(told) == {*FullTrapRecord.__struct_fields__}
    traps, accesses = section("docs/command-line.md", "### Columns").split("Of `accesses`")
    assert names_in(traps) == {*TRAP_COLUMNS}
    assert names_in(accesses) == {*ACCESS_COLUMNS}


def test_every_reason_and_field_of_health_is_there():
    told = section("docs/command-line.md", "## vmibridge health").partition("###")[0]
    options, _, codes = told.partition("| code | fails |")
    assert {*rows(codes)} == {*get_args(Code)}
    fields = {*re.findall(r"`(\w+)`", rows(options)["--json"][2])} - {"null"}
    assert fields == {*Report.__struct_fields__, *Reason.__struct_fields__}


def names_in(table):
    """All names in code in the first cells."""
    return {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split(" | ")[0])
    }


def test_every_field_of_the_handlers_list_is_there():
    table = rows(section("docs/command-line.md", "## vmibridge handlers list"))
    assert set(HandlerLine.__struct_fields__) == set(table) - {"SOURCES", "--json"}
    assert all(f"`{field}`" in table["methods"][2] for field in MethodLine.__struct_fields__)


def test_every_key_of_the_server_is_there():
    text = section("docs/configuration.md", "## `[server]`")
    keys, reply_keys = map(rows, text.split("### `server.wait` and `server.fallback`"))
    settings = list(ServerSettings.__struct_fields__)
    settings.remove("policy")  # a table of its own
    assert list(keys) == config_keys("server") == settings
    for reply in ("wait", "fallback"):
        assert list(reply_keys) == config_keys(f"server.{reply}")


def test_every_default_of_the_server_is_there():
    """The documented defaults, written into a file, are those of a server without one."""
    keys = rows(section("docs/configuration.md", "## `[server]`").split("###")[0])
    told = {key: row[2].strip("`") for key, row in keys.items()}
    without = [key for key, default in told.items() if default == "none"]
    lines = [f"{key} = {default}\n" for key, default in told.items() if key not in without]
    default = ServerSettings()
    assert Config("", "".join(["[server]\n", *lines])).server == default == Config().server
    assert [getattr(default, key) for key in without] == [None] * len(without)


def test_the_server_takes_its_settings_as_arguments():
    """In Python and in the file there are the same settings, with the same defaults."""
    arguments = {
        name: argument.default
        for name, argument in inspect.signature(BridgeServer).parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert arguments.pop("taps") == (), "what only looks on is no setting"
    assert arguments.pop("before_resume") is None, "code is no setting"
    assert list(arguments) == list(ServerSettings.__struct_fields__)
    default = msgspec.structs.asdict(ServerSettings())
    assert {**arguments, "fallback": default["fallback"]} == default
    assert arguments["fallback"] is None


def test_every_attribute_of_a_handler_is_there():
    own = rows(section("docs/configuration.md", "## What a handler says"))
    contract = section("docs/protocol.md", "## Contract, handler, dispatch")
    attributes = set(BridgeHandler.__annotations__) - {"methods"}
    assert {name for name in attributes if name.isupper() and f"`{name}`" not in contract} == {
        f"VERIFY_VALUE{slot}" for slot in (2, 3)
    }
    assert set(own) == {name for name in attributes if not name.isupper()}
    marked = set(inspect.signature(mark_method).parameters) - {"code"}
    assert {name for name, row in own.items() if row[2] == "yes"} == marked
    for name, row in own.items():
        if name != "name":
            told = row[1].strip("`").capitalize()
            assert ast.literal_eval(told) == getattr(BridgeHandler, name)


def test_every_limit_of_concurrency_is_there():
    keys = rows(section("docs/guide.md", "## Order and concurrency"))
    assert list(keys) == ["in_flight", "in_flight_total"]
    for name, row in keys.items():
        assert int(row[1]) == getattr(ServerSettings(), name)


def test_every_count_of_the_summary_is_there():
    keys = rows(section("docs/guide.md", "## Stopping"))
    counts = set(Summary.__struct_fields__) - {"guest"}
    assert {key for key in keys if key in Summary.__struct_fields__} == counts


def test_every_key_of_the_policy_is_there():
    text = section("docs/configuration.md", "## `[policy]`")
    keys, ranges, quota, rate, denied = re.split(r"^### .*$", text, flags=re.MULTILINE)
    assert config_keys("policy") == list(rows(keys)) == list(Policy.__struct_fields__)
    assert config_keys("[policy.instructions]") == list(rows(ranges))
    assert list(rows(ranges)) == list(AddressRange.__struct_fields__)
    for table in ("policy.vm", "policy.address_space"):
        assert config_keys(table) == list(rows(quota)) == list(Quota.__struct_fields__)
        for key in rows(quota):
            assert config_keys(f"{table}.{key}") == list(rows(rate)) == list(Rate.__struct_fields__)
    words = re.findall(r'^\| "(\w+)" \|', denied, re.MULTILINE)
    assert words == known('[policy]\ndenied = "no such word"\n')
    assert config_keys("policy.denied") == config_keys("server.fallback")


def test_every_default_of_the_policy_is_there():
    keys = rows(section("docs/configuration.md", "## `[policy]`"))
    default = Policy()
    assert ast.literal_eval(keys["rings"][2]) == sorted(default.rings)
    assert ast.literal_eval(keys["max_address_spaces"][2]) == default.max_address_spaces
    assert ast.literal_eval(keys["denied"][2]) == default.denied
    assert ast.literal_eval(keys["rate"][2]) == Rate(burst=1).rate


def config_keys(table):
    """The keys that a table of the file may have, as the error for another one tells."""
    return known(f"[{table}]\nno_such_key = 1\n")


def known(wrong):
    """What there is, as the error for a file tells that has something else."""
    with pytest.raises(ConfigError) as told:
        Config("", wrong)
    return str(told.value).partition("there are ")[2].split(", ")


HANDLERS = [offered.handler for offered in find_handlers([str(ROOT / "handlers")])]


@pytest.mark.parametrize("handler", HANDLERS, ids=lambda handler: handler.name)
def test_every_method_and_setting_of_a_handler_is_there(handler):
    text = section("docs/handlers.md", f"## {handler.name}")
    assert f"Request {handler.REQUEST:#06x}." in text
    for method in handler.methods.values():
        assert f"| {method.code:#06x} {method.name.upper()} |" in text
    settings = rows(text)
    overview = rows_of_overview()[handler.name]
    if handler.Settings is None:
        assert settings == {}
        assert overview == "none"
        return
    fields = msgspec.structs.fields(handler.Settings)
    assert list(settings) == [field.name for field in fields]
    assert overview == ", ".join(f"`{field.name}`" for field in fields)
    for field in fields:
        told = settings[field.name][1].strip("`")
        if told == "none":
            made = field.default is msgspec.NODEFAULT
            assert not (field.default_factory() if made else field.default)
        else:
            # As the configuration has it: `true`, `3`, `"debug"`.
            assert tomllib.loads(f"value = {told}") == {"value": field.default}


def rows_of_overview():
    lines = prose(ROOT / "docs/handlers.md").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("[").partition("]")[0]: row[3] for row in cells if len(row) == 4}


def test_every_call_of_guest_memory_is_there():
    engine = {"attach", "close", "is_awaited", "park", "settled"}  # what the engine does with it
    calls = {name for name in vars(GuestMemory) if not name.startswith("_")} - engine
    table = rows(section("docs/guide.md", "## Guest memory"))
    assert set(table) == calls


def test_every_option_of_unicorn_is_there():
    table = rows(section("docs/backends.md", "## Unicorn").split("###")[0])
    defaults = {name: parse_size(row[1]) for name, row in table.items()}
    assert defaults == msgspec.structs.asdict(UnicornOptions())


def test_every_outcome_status_and_gate_is_there():
    outcomes = section("docs/protocol.md", "## Outcomes")
    statuses = section("docs/protocol.md", "## Encoded status")
    gates = section("docs/protocol.md", "## Gates")
    assert re.findall(r"^\| \*(\w+)\* \|", outcomes, re.MULTILINE) == [k.value for k in OutcomeKind]
    assert named_codes(statuses) == [(kind.value, kind.name) for kind in StatusKind]
    assert named_codes(gates) == [(gate.value, gate.name) for gate in Gate]


def named_codes(text):
    found = re.findall(r"^\| (0x\w+|\d) \| `([A-Z_]+)` \|", text, re.MULTILINE)
    return [(int(code, 0), name) for code, name in found]


def test_every_method_feature_and_limit_of_the_handshake_is_there():
    text = section("docs/protocol.md", "## The handshake")
    methods = re.findall(r"^\| (0x\w{4}) ([A-Z_]+) \|", text, re.MULTILINE)
    assert [(int(code, 0), name) for code, name in methods] == [
        (marked.code, marked.name.upper()) for _, marked in sorted(Host.methods.items())
    ]
    features, limits = text.split("| bit | `Feature` |")[1].split("| number | `Limit` |")
    assert [(1 << bit, name) for bit, name in named_codes(features)] == [
        (feature.value, feature.name) for feature in Feature
    ]
    assert named_codes(limits) == [(limit.value, limit.name) for limit in Limit]
    assert f"now {VERSION:#010x}" in text
