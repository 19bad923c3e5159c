"""`vmibridge demo` and `vmibridge guest`: what needs no checkout."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from probe_guest import command

ROOT = Path(__file__).parents[2]
IMAGES = {"demo/demo.asm": "demo/demo.bin", "init/init.asm": "init/init"}


def demo(*options, folder, **environment):
    return subprocess.run(
        command("demo", *options),
        capture_output=True, text=True, timeout=120, check=False, cwd=folder,
        env={**os.environ, "NO_COLOR": "1", **environment},
    )  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder with a blank in its name, which is no checkout."""
    folder = tmp_path / "some where"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("source", IMAGES)
def test_an_image_that_ships_is_its_source_assembled(tmp_path, source):
    made = tmp_path / "made"
    include = f"-I{ROOT / 'guest/include'}/"
    assemble = ["nasm", "-Werror", "-f", "bin", include, str(ROOT / "guest" / source), "-o", made]
    subprocess.run(assemble, check=True, timeout=60)
    assert made.read_bytes() == (ROOT / "guest" / IMAGES[source]).read_bytes()


class TestDemo:
    @pytest.mark.parametrize("options", [[], ["--async-backend", "trio"], ["--uvloop"]], ids=str)
    def test_the_guest_passes_all_of_its_checks(self, place, options):
        done = demo("--json", *options, folder=place, TMPDIR=str(place))
        assert done.returncode == 0, done.stderr
        *traps, last = [json.loads(line) for line in done.stdout.splitlines()]
        assert {trap["trap"] for trap in traps} == {"vmcall", "vmmcall", "cpuid"}
        named = {"hello", "log", "environment", "clock", "random", "exec_gate", "fetch"}
        assert {trap["handler"] for trap in traps} == named
        assert last["summary"]["handled"] == len(traps)
        assert last["summary"]["guest"][0]["registers"]["rax"] == 0
        first, *_, passed = done.stderr.splitlines()
        assert first.startswith("demo: the guest is assembled from ")
        assert passed == "demo: passed"
        assert list(place.iterdir()) == []

    def test_without_nasm_it_runs_the_image_that_ships(self, place):
        done = demo(folder=place, PATH=str(place))
        assert done.returncode == 0, done.stderr
        first, *_, passed = done.stderr.splitlines()
        assert first.startswith("demo: nasm is not installed: the guest is ")
        assert "demo.bin" in first
        assert passed == "demo: passed"
        assert "76 traps: 76 handled" in done.stdout

    def test_a_nasm_that_fails_is_an_error(self, place):
        (place / "nasm").write_text("#!/bin/sh\necho 'out of order' >&2; exit 3\n")
        (place / "nasm").chmod(0o755)
        done = demo(folder=place, PATH=str(place))
        assert done.returncode == 1
        failed, line = done.stderr.splitlines()
        assert failed == "demo: FAILED"
        assert line.startswith("vmibridge: ")
        assert line.endswith("nasm: out of order")

    def test_2_for_options_that_do_not_go_together(self, place):
        done = demo("--uvloop", "--async-backend", "trio", folder=place)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "uvloop is for asyncio" in line


class TestIncludePath:
    def test_a_guest_is_assembled_with_it(self, vmibridge, tmp_path):
        folder = vmibridge("guest", "include-path").stdout.strip()
        (tmp_path / "guest.asm").write_text('%include "bridge.inc"\nbits 64\nhlt\n')
        subprocess.run(
            [shutil.which("nasm"), "-f", "bin", f"-I{folder}/", "guest.asm", "-o", "guest.bin"],
            cwd=tmp_path, check=True, timeout=60,
        )  # fmt: skip
        assert (tmp_path / "guest.bin").read_bytes() == b"\xf4"

    def test_it_has_the_header_for_c(self, vmibridge):
        folder = vmibridge("guest", "include-path").stdout.strip()
        assert {"bridge.inc", "gate.inc", "vmibridge.h", "flat.ld"} <= {
            path.name for path in Path(folder).iterdir()
        }


def test_handlers_are_a_package_in_a_checkout_too(vmibridge):
    done = vmibridge("handlers", "list", "vmibridge.handlers", "--json")
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each["source"] for each in map(json.loads, done.stdout.splitlines())}
    assert found == {name: f"vmibridge.handlers.{name}" for name in sorted(found)}
    assert set(found) == {path.stem for path in (ROOT / "handlers").glob("[a-z]*.py")}
