"""What docker/trim_environment.py leaves of an environment. Needs no container."""

import base64
import hashlib
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trim_environment
from needs import needs

ROOT = Path(__file__).parents[2]

UNCHECKED = 1
"""The flags of bytecode that is valid whatever its source is (PEP 552)."""


@pytest.fixture
def environment(tmp_path):
    """One with a package `made`, of a module in Python and one in C with debug information."""
    packages = tmp_path / "lib/python3.13/site-packages"
    package = packages / "made"
    package.mkdir(parents=True)
    source = package / "__init__.py"
    source.write_text("VALUE = frozenset({'a', 'b', 'c'})\n")
    py_compile.compile(str(source))
    script = tmp_path / "bin/script.py"
    script.parent.mkdir()
    script.write_text("print()\n")
    py_compile.compile(str(script))
    code = "int answer(void) { return 42; }\n"
    command = [needs("gcc"), "-g", "-shared", "-fPIC", "-x", "c", "-", "-o", package / "native.so"]
    subprocess.run(command, input=code, text=True, check=True)
    (package / "native.so.txt").write_text("no module\n")
    lists = packages / "made-1.0.dist-info"
    lists.mkdir()
    (lists / "RECORD").write_text(
        "made/__init__.py,sha256=of-the-source,35\n"
        "made/__pycache__/__init__.cpython-313.pyc,,\n"
        "made/native.so,sha256=of-before,99999\n"
        '"made/a,b.txt",sha256=other,1\n'
        "made-1.0.dist-info/RECORD,,\n"
    )
    return tmp_path


def packages_of(environment):
    return environment / "lib/python3.13/site-packages"


def trimmed(environment):
    """By a process of its own, with the seed of hashes that is built with."""
    command = [sys.executable, trim_environment.__file__, environment]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, check=True)


def test_a_compiled_module_loses_its_debug_information_and_no_symbol(environment):
    from elftools.elf.elffile import ELFFile

    path = packages_of(environment) / "made/native.so"
    before = path.stat().st_size
    trimmed(environment)
    assert path.stat().st_size < before
    with path.open("rb") as file:
        elf = ELFFile(file)
        assert elf.get_section_by_name(".debug_info") is None
        assert elf.get_section_by_name(".symtab").get_symbol_by_name("answer")


def test_the_list_of_files_has_what_is_there(environment):
    trimmed(environment)
    packages = packages_of(environment)
    data = (packages / "made/native.so").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    assert (packages / "made-1.0.dist-info/RECORD").read_text().splitlines() == [
        "made/__init__.py,sha256=of-the-source,35",
        f"made/native.so,sha256={digest},{len(data)}",
        '"made/a,b.txt",sha256=other,1',
        "made-1.0.dist-info/RECORD,,",
    ]


def test_bytecode_does_not_go_by_time_stamps(environment):
    trimmed(environment)
    (compiled,) = environment.rglob("*.pyc")
    assert compiled.read_bytes()[4:8] == UNCHECKED.to_bytes(4, "little")


def test_twice_it_gives_the_same(environment, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "environment"
    shutil.copytree(environment, other)
    # Bytecode names its source: it is at the same place in each build.
    found = []
    for each in (environment, other):
        place = environment.with_name("trimmed")
        each.rename(place)
        trimmed(place)
        found.append(
            {p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file()}
        )
        place.rename(each)
    assert found[0] == found[1]
