"""An installation from nothing: each extra alone, at locked, newest and lowest versions.

Each is an environment of its own, with nothing but what is installed into it. There every module
is imported that this installation is for, and one real thing is done with each extra: see
real_things.py.
"""

import os
import sys
import tomllib
from pathlib import Path

import pytest
from environments import BIN, ROOT, environment, install, installed_python, run
from lock import LOCKS, PYTHONS, read_lock

pytestmark = pytest.mark.install

ALONE = ["", "cli", "trio", "uvloop", "unicorn", "gdb", "fetch", "recording", "parquet", "perfetto"]
ALONE += ["exec_gate", "kv", "nats", "all"]
VERSIONS = ("locked", "newest", "lowest")
NOT_FOR_USERS = {"bench", "demo", "dev", "test", "test-libraries"}
IN_ALL = set(ALONE) - {"", "all", "parquet"}


def pythons():
    """This Python; with VMIBRIDGE_PYTHONS=all every one of those supported that runs here."""
    if os.environ.get("VMIBRIDGE_PYTHONS") != "all":
        return [sys.executable]
    return [path for path in map(installed_python, PYTHONS) if path]


def requirements(extra, versions, python, folder):
    """A file with a version of each package that this extra needs."""
    file = folder / "requirements.txt"
    options = [f"--python={python}", "--quiet", "--no-header", "--no-annotate", "-o", file]
    if extra:
        options += ["--extra", extra]
    if versions == "locked":
        pins = folder / "pins.txt"
        pins.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in read_lock(LOCKS[0])))
        options += ["--constraints", pins]
    elif versions == "lowest":
        options += ["--resolution", "lowest-direct"]
    run(BIN / "uv", "pip", "compile", *options, ROOT / "pyproject.toml")
    return file


def do_real_things(python, extra, elf, folder):
    extras = sorted(IN_ALL) if extra == "all" else [extra] if extra else []
    variables = {"ELF": str(elf), "NATS_SERVER": str(BIN / "nats-server")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = run(
        *(python, "-I", ROOT / "tests/install/real_things.py", *extras),
        cwd=folder,
        env={**kept, **variables},
    )
    assert done.count(": done\n") == 1 + len(extras)


@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
@pytest.mark.parametrize("versions", VERSIONS)
@pytest.mark.parametrize("extra", ALONE, ids=lambda name: name or "core")
def test_an_extra_alone_does_what_it_is_for(extra, versions, python, wheel, elf, tmp_path):
    needed = requirements(extra, versions, python, tmp_path)
    there = environment(tmp_path / "an environment", python)
    install(there, "--no-deps", "-r", needed)
    install(there, "--no-deps", wheel)
    do_real_things(there, extra, elf, tmp_path)


def test_every_extra_for_users_is_tried():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(extras) - NOT_FOR_USERS == set(ALONE) - {""}


def test_the_sdist_installs_as_the_wheel_does(built, elf, tmp_path):
    wheel, sdist = built
    files = []
    for name, archive in (("wheel", wheel), ("sdist", sdist)):
        there = environment(tmp_path / name, sys.executable)
        install(there, f"vmibridge[cli] @ {archive.as_uri()}")
        do_real_things(there, "cli", elf, tmp_path)
        (root,) = (tmp_path / name).glob("lib/python*/site-packages/vmibridge")
        files.append(
            {
                str(file.relative_to(root)): file.read_bytes()
                for file in root.rglob("*")
                if file.is_file() and file.suffix != ".pyc"
            }
        )
    assert files[0] == files[1]


def test_pip_takes_a_part_of_the_lock(wheel, elf, tmp_path):
    """As the image does, by pip and with hashes."""
    there = tmp_path / "part"
    script = ROOT / "docker/locked_install.py"
    # nats-py is locked with an extra of its own.
    run(sys.executable, script, LOCKS[0], there, f"{wheel}[cli,nats,recording]")
    do_real_things(there / "bin/python", "cli", elf, tmp_path)
    do_real_things(there / "bin/python", "nats", elf, tmp_path)
    do_real_things(there / "bin/python", "recording", elf, tmp_path)
