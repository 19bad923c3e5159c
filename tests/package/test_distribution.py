"""What would be uploaded: the wheel and the sdist of this checkout."""

import json
import re
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from distribution_parts import ROOT, run

from vmibridge.cli.new_handler import _FILES

PROGRAM = Path(__file__).parent / "downstream/program.py"
FOLDERS = {"benchmarks", "docker", "docs", "guest", "handlers", "systemd", "tests", "vmibridge"}
FILES = {
    *(".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "PKG-INFO"),
    *("README.md", "SECURITY.md", "hatch_build.py", "pyproject.toml", "requirements-demo.lock"),
    "requirements.lock",
}


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_an_index_would_take_both(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_has_what_a_wheel_should_have(built):
    run(Path(sys.executable).with_name("check-wheel-contents"), built.wheel)


def test_the_wheel_says_that_it_is_typed(built, metadata):
    with zipfile.ZipFile(built.wheel) as wheel:
        assert "vmibridge/py.typed" in wheel.namelist()
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_sdist_has_what_builds_and_tests_the_package_and_nothing_else(built):
    with tarfile.open(built.sdist) as sdist:
        names = {each.name.partition("/")[2] for each in sdist if each.isfile()}
    found = {name for name in names if "/" in name}
    assert {name.partition("/")[0] for name in found} == FOLDERS
    assert {name for name in names if "/" not in name} == FILES
    there = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == there


def test_the_description_links_to_nothing_that_an_index_does_not_have(metadata):
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "`docs/guide.md`" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert [target for target in targets if not re.match(r"https?://|#", target)] == []


def test_every_supported_python_has_its_classifier(metadata):
    """Those of `requires-python`, up to the newest one that the tests are run on."""
    prefix = "Programming Language :: Python :: 3."
    minors = [
        int(each.removeprefix(prefix))
        for each in metadata.get_all("Classifier")
        if each.startswith(prefix)
    ]
    lowest = int(metadata["Requires-Python"].removeprefix(">=3."))
    assert minors == list(range(lowest, max(minors) + 1))
    assert sys.version_info.minor in minors


def test_the_license_is_in_it(built, metadata):
    assert metadata["License-Expression"] == "MIT"
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith("/licenses/LICENSE"))
        assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_pytest_finds_its_plugin(built):
    """Under the name of its module, so that `-p` does not load it a second time."""
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith("/entry_points.txt"))
        assert b"[pytest11]\nvmibridge.pytest_plugin = vmibridge.pytest_plugin\n" in wheel.read(
            name
        )


def test_a_handler_of_ones_own_can_be_begun_from_it(built):
    """What `vmibridge new handler` makes, and what its guest includes."""
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    headers = {f"vmibridge/guest/include/{name}" for name in ("start.h", "flat.ld", "vmibridge.h")}
    templates = {f"vmibridge/cli/templates/handler/{name}" for name in _FILES}
    assert headers | templates <= names


class TestUserProgram:
    """A program of a user, against the wheel and not against this checkout."""

    def test_runs(self, installed_python, tmp_path):
        *_, last = run(installed_python, PROGRAM, cwd=tmp_path).splitlines()
        folder, _, version = last.rpartition(" ")
        assert Path(folder).is_relative_to(installed_python.parents[1])
        assert version

    def test_is_typed_for_mypy(self, installed_python, tmp_path):
        run(
            *(sys.executable, "-m", "mypy", "--strict", "--config-file", "/dev/null"),
            *("--cache-dir", tmp_path / "cache", "--python-executable", installed_python, PROGRAM),
            cwd=tmp_path,
        )

    def test_is_typed_for_pyright(self, installed_python, tmp_path):
        settings = {"include": [str(PROGRAM)], "typeCheckingMode": "strict"}
        project = tmp_path / "pyrightconfig.json"
        project.write_text(json.dumps(settings))
        told = run(
            *(sys.executable, "-m", "basedpyright", "--project", project),
            *("--pythonpath", installed_python, "--verbose"),
            cwd=tmp_path,
        )
        assert "0 errors, 0 warnings" in told
        assert "Found 1 source file" in told
