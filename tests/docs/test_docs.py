"""The documentation, run: its examples, its links, and its reference tables against the code.

| in a document | is |
|---|---|
| a `console` block | run in a folder like the root of a checkout; its output is compared |
| `<!-- file: NAME -->` before a block | written to NAME in that folder |
| `<!-- run -->` before a `python` block | executed |
| any `python` block | compiled, and its imports from vmibridge are resolved |

Of an output only durations are left out, and what the document leaves out by `...`.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from children import run as run_child
from needs import needs

from vmibridge import BridgeHandler, BridgeServer, Gate, OutcomeKind, StatusKind
from vmibridge import method as mark_method
from vmibridge.backends.unicorn.backend import UnicornOptions
from vmibridge.cli.handlers import HandlerLine, MethodLine
from vmibridge.cli.trap_line import TrapLine, VcpuLine, summary_json
from vmibridge.config import Config, find_handlers
from vmibridge.engine.handshake import VERSION, Feature, Host, Limit
from vmibridge.engine.policy import AddressRange, Policy, Quota, Rate
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.errors import ConfigError
from vmibridge.recording.export.jsonl import FullTrapRecord
from vmibridge.recording.export.rows import ACCESS_COLUMNS, TRAP_COLUMNS
from vmibridge.vm.memory import GuestMemory
from vmibridge.vm.spec import parse_size

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = ("make", "pip", "apt-get", "git")
SECONDS = 60

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


class Block(NamedTuple):
    """A fenced block, and the comment on the line before it."""

    line: int
    language: str
    note: str
    text: str


def blocks(document: Path) -> list[Block]:
    found, note, opened = [], "", None
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if opened is not None:
            if line != "```":
                opened[3].append(line)
                continue
            at, language, before, lines = opened
            found.append(Block(at, language, before, "\n".join([*lines, ""])))
            opened, note = None, ""
        elif line.startswith("```"):
            opened = (number, line.removeprefix("```"), note, [])
        else:
            comment = re.fullmatch(r"<!-- (.*) -->", line)
            note = comment[1] if comment else ""
    assert opened is None, f"{document.name}: a block is not closed"
    return found


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def section(document: str, heading: str) -> str:
    """What is below a heading, up to the next one of its level or above."""
    text = prose(ROOT / document)
    level = heading.partition(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}$\n(.*?)(?=^#{{1,{len(level)}}} |\Z)",
        text,
        re.DOTALL | re.MULTILINE,
    )
    assert found, f"{document} has no {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of all table rows, by the name (or names) in code in their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {
        code: row for row in cells for code in re.findall(r"`(?:await )?([\w-]+)[^`]*`", row[0])
    }


# --- examples ---------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A folder with what a document may name of the repository."""
    needs("nasm")
    for name in ("guest", "handlers", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def environment():
    # Without coverage: tests/cli/ gathers that of the commands, which would take twice as long.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "COVERAGE_", "COV_"))
    }
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@documents
def test_examples_do_what_the_document_says(document, checkout, environment):
    for block in blocks(document):
        place = f"{document.name}:{block.line}"
        if block.note.startswith("file: "):
            file = checkout / block.note.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "console":
            for command, printed in commands(block.text):
                run_command(place, command, printed, checkout, environment)
        elif block.note == "run":
            done = run([sys.executable, "-W", "error", "-c", block.text], checkout, environment)
            assert done.returncode == 0, f"{place}: {done.stdout}"
        else:
            assert not block.note, f"{place}: what is {block.note!r}?"


def commands(text):
    """Each command of a console block, with the lines that it prints."""
    assert text.startswith("$ "), "a console block begins with a command"
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *printed = part.splitlines()
        yield command, printed


def run_command(place, command, printed, folder, environment):
    if command.split()[0] in NOT_RUN:
        return
    status = re.search(r"# exits with (\d+)$", command)
    done = run(["bash", "-c", command], folder, environment)
    told = f"{place}: {command}\n{done.stdout}"
    assert done.returncode == (int(status[1]) if status else 0), told
    pattern = "".join(line_pattern(line) for line in printed)
    seen = "".join(f"{without_durations(line)}\n" for line in done.stdout.splitlines())
    assert re.fullmatch(pattern, seen), told


def run(command, folder, environment):
    """Its output is that of both streams, as on a terminal."""
    return run_child(
        command, seconds=SECONDS, cwd=folder, env=environment, stderr=subprocess.STDOUT
    )


def line_pattern(line):
    if line == "...":
        return r"(?:.*\n)*?"
    return re.escape(without_durations(line)).replace(r"\.\.\.", ".*") + r"\n"


def without_durations(line):
    """One line of output with single blanks, and with N for what differs from run to run."""
    words = line.split()
    if len(words) > 10 and re.fullmatch(r"(cpuid|vmcall|vmmcall)\d\d", words[2]):
        words[10] = "N"  # behind the four values of the answer
    line = re.sub(r'"duration_us":[0-9.]+', '"duration_us":N', " ".join(words))
    return re.sub(r" in [0-9.]+s$", " in N s", line)


@documents
def test_python_compiles_and_imports_what_is_there(document):
    for block in blocks(document):
        if block.language != "python":
            continue
        place = f"{document.name}:{block.line}"
        tree = ast.parse(block.text, place)
        compile(tree, place, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vmibridge":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{place}: {node.module} has no {missing}"


# --- links ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert ROOT in file.resolve().parents, f"{page.name}: {target} is not of this project"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(document):
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
        "recover",
        "replay",
        "report",
        "qemu build-plugin",
        "qemu run",
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
            assert not field.default_factory()
        else:
            assert ast.literal_eval(told) == field.default


def rows_of_overview():
    lines = prose(ROOT / "docs/handlers.md").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("[").partition("]")[0]: row[3] for row in cells if len(row) == 4}


def test_every_call_of_guest_memory_is_there():
    engine = {"attach", "close", "park", "settled"}  # what the engine does with it
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
