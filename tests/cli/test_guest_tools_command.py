"""`vmibridge guest tools`, and vmib where no host is: on the machine that runs the tests."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from children import run as run_child
from documents import rows, section
from needs import needs
from probe_guest import command

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "guest/tools"
LINUX = {"linux-x64": "vmib", "linux-x86": "vmib-x86"}
WINDOWS = {"windows-x64": "vmib.exe", "windows-x86": "vmib-x86.exe"}
COMPILERS = {
    "windows-x64": "x86_64-w64-mingw32-gcc",
    "windows-x86": "i686-w64-mingw32-gcc",
}
USAGE, NO_HOST = 2, 3


def with_path(path):
    return {**os.environ, "NO_COLOR": "1", "PATH": str(path)}


def linked(folder, *programs):
    """A folder for PATH with these programs alone, under names of their own."""
    folder.mkdir()
    for name, program in programs:
        (folder / name).symlink_to(program)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Everything that can be compiled here, once."""
    needs("gcc")
    folder = tmp_path_factory.mktemp("compiled")
    done = run_child(command("guest", "tools", "-o", str(folder)), seconds=300)
    assert done.returncode == 0, done.stderr
    return folder, done


class TestWhatIsBuilt:
    def test_all_for_which_there_are_compilers(self, compiled):
        folder, done = compiled
        there = [name for target, name in WINDOWS.items() if shutil.which(COMPILERS[target])]
        assert done.stdout.split() == [str(folder / name) for name in (*LINUX.values(), *there)]
        for name in LINUX.values():
            assert (folder / name).read_bytes()[:4] == b"\x7fELF"
        for target, name in WINDOWS.items():
            if name in there:
                assert (folder / name).read_bytes()[:2] == b"MZ"
            else:
                assert (
                    f"{name}: left out, there is no {COMPILERS[target]}: install mingw-w64"
                    in done.stderr
                )

    # What only `make test-slow` installs is not for `make test` to skip.
    @pytest.mark.parametrize(
        "target", ["linux-x86", pytest.param("windows-x64", marks=pytest.mark.slow)]
    )
    def test_the_same_bytes_again(self, compiled, vmibridge, tmp_path, target):
        name = (LINUX | WINDOWS)[target]
        if not (compiled[0] / name).exists():
            pytest.skip(f"no {COMPILERS[target]}: make test-slow installs it")
        assert vmibridge("guest", "tools", "--target", target).returncode == 0
        assert (tmp_path / name).read_bytes() == (compiled[0] / name).read_bytes()

    @pytest.mark.slow
    def test_by_clang_without_a_warning(self, vmibridge, tmp_path):
        program = shutil.which("clang")
        if program is None:
            pytest.skip("no clang: make test-slow installs it")
        place = linked(tmp_path / "place", ("clang", program), ("ld", needs("ld")))
        targets = [each for target in LINUX for each in ("--target", target)]
        done = vmibridge("guest", "tools", "-o", "made", *targets, env=with_path(place))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == [f"made/{name}" for name in LINUX.values()]

    def test_without_a_compiler_nothing_is_and_that_is_told(self, vmibridge, tmp_path):
        place = linked(tmp_path / "place")
        done = vmibridge("guest", "tools", "-o", "made", env=with_path(place))
        assert (done.returncode, done.stdout) == (1, "")
        lines = done.stderr.splitlines()
        assert lines[0] == "vmibridge: vmib: left out, there is no cc or gcc or clang: install gcc"
        assert len(lines) == len(LINUX) + len(WINDOWS)
        asked = vmibridge("guest", "tools", "--target", "windows-x64", env=with_path(place))
        assert asked.returncode == 1
        assert asked.stderr == (
            "vmibridge: vmib.exe: left out, there is no x86_64-w64-mingw32-gcc: install mingw-w64\n"
        )

    def test_what_the_compiler_says_is_told(self, vmibridge, tmp_path):
        place = linked(tmp_path / "place", ("cc", shutil.which("false")))
        done = vmibridge(
            "guest", "tools", "-o", "made", "--target", "linux-x64", env=with_path(place)
        )
        assert (done.returncode, done.stderr) == (1, "vmibridge: vmib: cc failed: status 1\n")
        assert not (tmp_path / "made").exists()

    def test_a_folder_that_was_there_stays(self, vmibridge, tmp_path):
        place = linked(tmp_path / "place", ("cc", shutil.which("false")))
        (tmp_path / "made").mkdir()
        target = ("-o", "made/in", "--target", "linux-x64")
        assert vmibridge("guest", "tools", *target, env=with_path(place)).returncode == 1
        assert [*(tmp_path / "made").iterdir()] == []


def test_the_programs_need_nothing_of_a_system(compiled):
    folder, _ = compiled
    for name in LINUX.values():
        told = subprocess.run(
            [needs("readelf"), "-lW", folder / name], capture_output=True, text=True, check=True
        ).stdout
        assert "INTERP" not in told
        assert "DYNAMIC" not in told
        assert not re.search(r"GNU_STACK.* RWE", told)
    for name in WINDOWS.values():
        if not (folder / name).exists():
            continue
        told = subprocess.run(
            [needs("objdump"), "-p", folder / name], capture_output=True, text=True, check=True
        ).stdout
        assert {each.lower() for each in re.findall(r"DLL Name: (\S+)", told)} == {"kernel32.dll"}


@pytest.fixture(params=LINUX.values())
def vmib(request, compiled):
    def run(*arguments):
        return run_child([compiled[0] / request.param, *arguments], seconds=60)

    return run


class TestWithoutAHost:
    @pytest.mark.parametrize(
        "arguments",
        [
            *("ping", "put /proc/version", "get a", "cat a", "log a", "env a"),
            *("fetch http://a/", "exit 1"),
        ],
    )
    def test_that_is_told(self, vmib, arguments):
        done = vmib(*arguments.split())
        assert (done.returncode, done.stdout) == (NO_HOST, "")
        assert re.fullmatch(r"vmib: [^\n]*: no host answered\n", done.stderr)

    @pytest.mark.parametrize("how", ["vmcall", "vmmcall"])
    def test_an_instruction_that_cannot_be_executed_ends_nothing_by_a_signal(self, vmib, how):
        done = vmib("--by", how, "ping")
        assert done.returncode == NO_HOST
        assert done.stderr.startswith("vmib: ping: no host answered")

    @pytest.mark.parametrize(
        ("way", "missing"),
        [("driver", "driver of the PCI device"), ("sysfs", "PCI device of vmibridge")],
    )
    def test_a_device_that_is_not_there_is_named(self, vmib, way, missing):
        done = vmib("--by", way, "ping")
        assert (done.returncode, done.stdout) == (NO_HOST, "")
        assert done.stderr == f"vmib: ping: no host answered: there is no {missing}\n"

    def test_a_call_shows_what_the_instruction_left(self, vmib):
        done = vmib("call", "1", "0x10", "7")
        assert done.returncode == NO_HOST
        assert re.fullmatch(r"(0x[0-9a-f]+ ){4}unstamped\n", done.stdout)

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ([], "no command"),
            (["nope"], "no command: nope"),
            (["ping", "more"], "too few or too many operands: ping"),
            (["put"], "too few or too many operands: put"),
            (["put", "-"], "put - takes a NAME"),
            (["get", "a/.."], "get takes a FILE here: a/.."),
            (["--nope", "ping"], "no option: --nope"),
            (["ping", "--by"], "takes a value: --by"),
            (["--by", "int3", "ping"], "--by is cpuid, vmcall, vmmcall, driver or sysfs, not "),
            (["--timeout", "soon", "ping"], "--timeout is 0 to 1000000, not soon"),
            (["--timeout", "0x", "ping"], "--timeout is 0 to 1000000, not 0x"),
            (["--level", "loud", "log"], "--level is debug, info, warning or error, not loud"),
            (["--magic", "0x100000000", "call", "1", "1"], "--magic has 32 bits, not 0x100000000"),
            (["call", "65536", "1"], "a request has 16 bits, not 65536"),
            (["call", "1", "65536"], "a method has 16 bits, not 65536"),
            (["call", "1", "1", "99999999999999999999"], "no value of this program's width: 9"),
            (["call", "1", "1", "18446744073709551616"], "no value of this program's width: 1"),
            (["exit", "4294967296"], "a status has 32 bits, not 4294967296"),
        ],
    )
    def test_wrong_usage(self, vmib, arguments, told):
        done = vmib(*arguments)
        # Numbers are read when a host is known, in which none is.
        assert done.returncode == USAGE, done
        assert done.stderr.startswith(f"vmib: {told}")

    def test_help(self, vmib):
        done = vmib("--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Usage: vmib ")


class TestTheDocs:
    """docs/linux-guest.md, against the source and what --help prints."""

    def test_commands_and_options_are_those_of_the_program(self, compiled):
        told = subprocess.run(
            [compiled[0] / "vmib", "--help"], capture_output=True, text=True, check=True
        ).stdout
        page = section("docs/linux-guest.md", "## vmib")
        commands = re.findall(r"^\| `vmib (\w+)", page, re.MULTILINE)
        assert commands == re.findall(r"^  (\w+)", told, re.MULTILINE)
        options = re.findall(r"^\| `(--[a-z]*)", page, re.MULTILINE)
        assert {*options} == {*re.findall(r"(--[a-z]*)\b|(?<=  )--(?= )", told), "--"} - {""}

    def test_exit_statuses_are_those_of_the_source(self):
        source = (SOURCE / "host.h").read_text()
        statuses = re.findall(r"EXIT_\w+ = (\d)", source)
        page = section("docs/linux-guest.md", "## vmib").partition("| exit status |")[2]
        assert re.findall(r"^\| (\d) \|", page, re.MULTILINE) == statuses

    def test_targets_are_those_of_the_command(self, vmibridge):
        table = rows(section("docs/command-line.md", "## vmibridge guest tools"))
        named = set(re.findall(r"`([\w-]+)` \(", table["--target"][2]))
        assert named == {*LINUX, *WINDOWS}
