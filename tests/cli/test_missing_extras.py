"""What is said when the package of an extra is not there: the same from each command."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from vmibridge.errors import EXTRAS, MissingExtraError

pytestmark = pytest.mark.no_cover

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
FOR_DEVELOPERS = {"all", "bench", "demo", "dev", "test", "test-libraries"}


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0]


def test_every_extra_has_its_packages():
    declared = {
        extra: {name_of(each) for each in requirements} - {"vmibridge"}
        for extra, requirements in PYPROJECT["project"]["optional-dependencies"].items()
        if extra not in FOR_DEVELOPERS
    }
    assert {extra: set(packages) for extra, packages in EXTRAS.items()} == declared


def test_it_names_what_is_missing_and_where(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: None if name == "mcap" else missing()
    )
    error = MissingExtraError("a recording", "recording")
    assert (error.extra, error.packages) == ("recording", ("lz4", "zstandard"))
    assert str(error) == (
        "a recording needs the packages lz4 and zstandard, which the extra 'recording' of vmibridge"
        f" brings: add them to the environment of {sys.executable}"
    )


def missing():
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError


def test_without_any_package_all_are_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: missing())
    monkeypatch.setattr(sys, "executable", "")
    assert str(MissingExtraError("nats://", "nats")) == (
        "nats:// needs the packages nats-py and nkeys, which the extra 'nats' of vmibridge brings:"
        " add them to the environment of this Python"
    )


RUN = ["run", "--handlers", "H", "--backend"]
COMMANDS = [
    ("cyclopts", ["run"], "cli", 2),
    ("rich", ["handlers", "list", "H"], "cli", 2),
    ("rich", [*RUN, "unicorn:G"], "cli", 2),
    ("unicorn", [*RUN, "unicorn:G"], "unicorn", 1),
    ("unicorn", ["agent", "--backend", "unicorn:G", "--connect", "unix:s"], "unicorn", 1),
    ("unicorn", ["demo"], "unicorn", 1),
    ("httpcore", ["demo"], "fetch", 1),
    ("httpcore", ["run", "--backend", "unicorn:G", "--handlers", "FETCH"], "fetch", 1),
    ("trio", [*RUN, "unicorn:G", "--async-backend", "trio"], "trio", 1),
    ("uvloop", [*RUN, "unicorn:G", "--uvloop"], "uvloop", 1),
    ("mcap", [*RUN, "unicorn:G", "--record", "r.mcap"], "recording", 1),
    ("zstandard", ["inspect", "r.mcap"], "recording", 1),
    ("mcap", ["report", "r.mcap"], "recording", 1),
    ("mcap", ["recover", "r.mcap", "-o", "s.mcap"], "recording", 1),
    ("mcap", ["export", "r.mcap", "--to", "sqlite"], "recording", 1),
    ("mcap", ["replay", "r.mcap", "--handlers", "H"], "recording", 1),
    ("nats", ["serve", "--listen", "nats://127.0.0.1", "--handlers", "H"], "nats", 1),
    ("nats", ["recordings", "list", "nats://127.0.0.1"], "nats", 1),
    ("elftools", [*RUN, "qemu-gdb:unix:s?elf=ELF&symbol=x"], "gdb", 1),
]


@pytest.mark.parametrize(("hidden", "arguments", "extra", "status"), COMMANDS, ids=str)
def test_one_line_from_each_command(
    vmibridge, image, handlers, root, tmp_path, hidden, arguments, extra, status
):
    (tmp_path / f"{hidden}.py").write_text(f"raise ModuleNotFoundError(name={hidden!r})\n")
    (tmp_path / "elf").write_bytes(Path(sys.executable).read_bytes()[:4096])
    places = {
        "H": handlers,
        "G": image("hlt"),
        "ELF": "elf",
        "FETCH": str(root / "handlers/fetch.py"),
    }
    made = [re.sub(r"\b(H|G|ELF|FETCH)\b", lambda m: places[m[1]], each) for each in arguments]
    done = vmibridge(*made)
    assert done.returncode == status, done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"vmibridge: .* needs the packages? .*, which the extra '{extra}' of vmibridge brings:"
        r" add (it|them) to the environment of \S+",
        line,
    )
    assert "Traceback" not in done.stderr


def test_the_whole_package_leaves_a_handler_out_with_a_note(vmibridge, image, tmp_path):
    (tmp_path / "httpcore.py").write_text("raise ModuleNotFoundError(name='httpcore')\n")
    spec = f"unicorn:{image('hlt')}"
    done = vmibridge("run", "--backend", spec, "--handlers", "vmibridge.handlers", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "the handler fetch is left out: the fetch handler needs the package httpcore" in line
    done = vmibridge("run", "--backend", spec, "--handlers", "vmibridge.handlers.fetch")
    assert done.returncode == 1
    assert done.stderr.startswith("vmibridge: the fetch handler needs the package httpcore")
