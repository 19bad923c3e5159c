"""`vmibridge qemu initramfs`: what is packed, what is refused, and a real Linux that runs it."""

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from probe_guest import command

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / ".linux/vmlinuz"
INCLUDE = ROOT / "guest/include"

GREET = """
#include <stdio.h>
#include <stdlib.h>
#include "vmibridge.h"

int main(int count, char **arguments)
{
    static char name[] = "guest", greeting[64] = {1};
    struct vmibridge_packet packet = {
        .magic = VMIBRIDGE_MAGIC, .request = 0x0001, .method = 1,
        .value1 = VMIBRIDGE_ADDRESS(name), .value2 = VMIBRIDGE_ADDRESS(greeting),
        .value3 = sizeof greeting,
    };
    struct vmibridge_retry retry = {.attempts = 100, .wait = VMIBRIDGE_STATUS_WAITING};
    struct vmibridge_response response;

    if (vmibridge_ask(VMIBRIDGE_CPUID, &packet, &retry, &response) != VMIBRIDGE_ANSWERED) {
        puts("nobody");
        return 3;
    }
    printf("%s %s %s %s\\n", greeting, arguments[0], count > 1 ? arguments[1] : "", getenv("mode"));
    return 0;
}
"""
TRAP = "int main(void) { __builtin_trap(); }"


@pytest.fixture
def build(tmp_path):
    """`build(NAME, SOURCE, OPTION...)` compiles a program."""

    def build(name, source, *options):
        (tmp_path / f"{name}.c").write_text(source)
        compile_it = ["gcc", f"-I{INCLUDE}", f"{name}.c", "-o", name, *options]
        subprocess.run(compile_it, cwd=tmp_path, check=True, timeout=60)
        return tmp_path / name

    return build


def members_of(archive):
    """From the name of each member to its mode and its data. Asserts that the format is right."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n :][:8], 16) for n in range(13)]
        name_at = at + 110
        data_at = (name_at + fields[11] + 3) // 4 * 4
        name = archive[name_at : name_at + fields[11] - 1].decode()
        assert archive[name_at + fields[11] - 1] == 0
        if name == "TRAILER!!!":
            return found
        assert name not in found
        assert str(Path(name).parent) in (".", *found), "a folder comes before what is in it"
        found[name] = (fields[1], archive[data_at : data_at + fields[6]])
        at = (data_at + fields[6] + 3) // 4 * 4


def libraries_of(program):
    """What the loader itself says."""
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", told)}


class TestWhatIsPacked:
    def test_a_static_program_and_the_init(self, vmibridge, build, tmp_path):
        program = build("prog", "int main(void) { return 0; }", "-static")
        done = vmibridge("qemu", "initramfs", "prog", "-o", "some initrd")
        assert (done.returncode, done.stdout, done.stderr) == (0, "some initrd\n", "")
        found = members_of((tmp_path / "some initrd").read_bytes())
        files = {name: data for name, (mode, data) in found.items() if mode == 0o100755}
        assert files == {
            "init": (ROOT / "guest/init/init").read_bytes(),
            "bin/prog": program.read_bytes(),
            "etc/programs": b"/bin/prog\0",
        }
        assert {name for name, (mode, _) in found.items() if mode == 0o020600} == {
            "dev/console",
            "dev/null",
        }

    def test_a_dynamic_program_has_its_loader_and_its_libraries(self, vmibridge, build, tmp_path):
        program = build(
            "prog", "#include <math.h>\nint main(int n, char **a) { return sin(n); }", "-lm"
        )
        assert vmibridge("qemu", "initramfs", "prog", "-o", "initrd").returncode == 0
        found = members_of((tmp_path / "initrd").read_bytes())
        packed = {data for _, data in found.values()}
        libraries = libraries_of(program)
        assert len(libraries) == 3
        assert {path.read_bytes() for path in libraries} <= packed
        assert {"lib64/ld-linux-x86-64.so.2", "lib/libc.so.6", "lib/libm.so.6"} <= set(found)

    def test_a_library_from_the_folder_of_the_program(self, vmibridge, build, tmp_path):
        build("libmine.so.1", "int mine(void) { return 7; }", "-shared", "-fPIC")
        code = "int mine(void);\nint main(void) { return mine(); }"
        build("prog", code, "libmine.so.1", "-Wl,-rpath,$ORIGIN")
        assert vmibridge("qemu", "initramfs", "prog", "-o", "initrd").returncode == 0
        assert "lib/libmine.so.1" in members_of((tmp_path / "initrd").read_bytes())

    def test_programs_run_in_order_and_one_may_run_twice(self, vmibridge, build, tmp_path):
        for name in ("one", "two"):
            build(name, "int main(void) { return 0; }", "-static")
        vmibridge("qemu", "initramfs", "two", "one", "two", "-o", "initrd")
        found = members_of((tmp_path / "initrd").read_bytes())
        assert found["etc/programs"][1] == b"/bin/two\0/bin/one\0/bin/two\0"

    def test_the_same_programs_give_the_same_bytes(self, vmibridge, build, tmp_path):
        build("prog", "int main(void) { return 0; }")
        for name in ("first", "second"):
            vmibridge("qemu", "initramfs", "prog", "-o", name)
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.no_cover
class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["none"], "none: No such file"),
            (["."], ".: Is a directory"),
            (["script"], "script: is a script"),
            (["text"], "text: is not an ELF program"),
            (["empty"], "empty: is not an ELF program"),
            (["arm"], "arm: is not a program for x86"),
            (["object"], "object: is not a program for x86"),
            (["cut"], "cut: is a damaged ELF file"),
            (["prog", "other/prog"], "other/prog: prog is /bin/prog already"),
            (["homeless"], "homeless: its library libmine.so.1 is not found"),
            (["prog", "-o", "prog"], "prog: is one of the programs"),
            ([], "PROGRAMS"),
        ],
        ids=str,
    )
    def test_2_in_one_line(self, vmibridge, build, tmp_path, arguments, told):
        program = build("prog", "int main(void) { return 0; }", "-static").read_bytes()
        (tmp_path / "other").mkdir()
        build("other/prog", "int main(void) { return 1; }", "-static")
        build("libmine.so.1", "int mine(void) { return 7; }", "-shared", "-fPIC")
        build("homeless", "int mine(void);\nint main(void) { return mine(); }", "libmine.so.1")
        (tmp_path / "libmine.so.1").unlink()
        (tmp_path / "script").write_text("#!/bin/sh\n")
        (tmp_path / "text").write_text("a text")
        (tmp_path / "empty").touch()
        (tmp_path / "arm").write_bytes(program[:18] + struct.pack("<H", 183) + program[20:])
        (tmp_path / "object").write_bytes(program[:16] + struct.pack("<H", 1) + program[18:])
        (tmp_path / "cut").write_bytes(program[:80])
        options = [] if "-o" in arguments else ["-o", "initrd"]
        done = vmibridge("qemu", "initramfs", *arguments, *options)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("vmibridge: ")
        assert told in line
        assert not (tmp_path / "initrd").exists()
        assert (tmp_path / "prog").read_bytes() == program

    def test_1_when_it_cannot_be_written(self, vmibridge, build, tmp_path):
        build("prog", "int main(void) { return 0; }", "-static")
        done = vmibridge("qemu", "initramfs", "prog", "-o", "none/initrd")
        assert done.returncode == 1
        assert done.stderr == "vmibridge: none/initrd: cannot be written: there is no folder none\n"
        assert {path.suffix for path in tmp_path.iterdir()} <= {"", ".c", ".asm", ".bin"}


class TestInLinux:
    @pytest.fixture
    def boot(self, tmp_path, qemu):
        """`boot(OPTION..., kernel=...)` boots `initrd` by `vmibridge qemu run`."""
        if not KERNEL.exists():
            pytest.skip("no Linux guest: run `make linux`")
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "VMIBRIDGE_QEMU": qemu}

        def boot(*options, kernel=""):
            machine = ["-M", "pc", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]
            machine += ["-serial", "stdio", "-kernel", str(KERNEL), "-initrd", "initrd"]
            machine += ["-append", f"console=ttyS0 quiet panic=-1 no_timer_check {kernel}"]
            return subprocess.run(
                command("qemu", "run", *options, "--", *machine),
                capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
                stdin=subprocess.DEVNULL, env={**os.environ, **cache},
            )  # fmt: skip

        return boot

    def lines(self, done):
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if not line.startswith("[")]

    def test_a_handler_answers_static_and_dynamic_programs(self, vmibridge, build, boot):
        build("still", GREET, "-static")
        build("moving", GREET)
        vmibridge("qemu", "initramfs", "still", "moving", "-o", "initrd")
        done = boot(
            "--handlers", "vmibridge.handlers.hello", "--json", kernel="mode=quick -- loud"
        )  # fmt: skip
        assert self.lines(done) == [
            "Hello, guest! /bin/still loud quick",
            "vmibridge: /bin/still ended with 0",
            "Hello, guest! /bin/moving loud quick",
            "vmibridge: /bin/moving ended with 0",
            "vmibridge: all right",
        ]
        assert '"handled":2' in done.stderr.splitlines()[-1]

    def test_without_a_host_and_with_programs_that_fail(self, vmibridge, build, boot, tmp_path):
        build("alone", GREET, "-static")
        build("trap", TRAP, "-static")
        program = bytearray((tmp_path / "trap").read_bytes())
        struct.pack_into("<H", program, 56, 0)  # no program header: nothing to load
        (tmp_path / "hollow").write_bytes(program)
        vmibridge("qemu", "initramfs", "alone", "trap", "hollow", "-o", "initrd")
        assert self.lines(boot("--socket", "nobody.sock")) == [
            "nobody",
            "vmibridge: /bin/alone ended with 3",
            "vmibridge: /bin/trap was ended by signal 4",
            "vmibridge: /bin/hollow cannot be started, error 8",
            "vmibridge: /bin/hollow ended with 127",
            "vmibridge: WRONG",
        ]
