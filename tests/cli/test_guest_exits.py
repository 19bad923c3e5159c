"""A guest that exits by the handler `exit`: its status is that of the command."""

import json

import pytest
from probe_guest import calls

EXIT = "vmibridge.handlers.exit"


@pytest.fixture
def exits(vmibridge, image):
    """Run a guest that exits with a status; behind it is what would be a crash."""

    def run(status, *more, handlers=EXIT):
        path = image(calls("0xffff", value=status, request="0x111", tail="ud2"))
        return vmibridge("run", "--backend", f"unicorn:{path}", "--handlers", handlers, *more)

    return run


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (3, 3), (255, 255), (256, 255)])
def test_the_status_of_a_guest_is_that_of_the_command(exits, status, ends):
    done = exits(status, "--json")
    assert done.returncode == ends, done.stderr
    trap, last = map(json.loads, done.stdout.splitlines())
    assert trap["output"] == {"status": status, "reason": None}
    assert last["summary"]["exits"] == [{"vm": "vm", "status": status, "reason": None}]
    assert "vmibridge:" not in done.stderr


def test_the_counts_tell_of_it(exits):
    done = exits(7)
    assert done.stdout.splitlines()[-1] == "1 trap: 1 handled; exited with status 7"


def test_a_status_of_more_than_32_bits_is_none(exits):
    done = exits(1 << 32, "--json")
    assert done.returncode == 1, "the guest has crashed"
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["exits"] == []


def test_a_guest_without_the_handler_ends_as_it_does(exits):
    assert exits(3, handlers="vmibridge.handlers.hello").returncode == 1


def test_the_reason_cannot_steer_a_terminal(vmibridge, image):
    code = "lea r9, [rel why]\n" + calls("0xffff", value=1, request="0x111", tail="ud2\n")
    path = image(f"{code}why: db 27, '[31mred', 10, 0")
    done = vmibridge("run", "--backend", f"unicorn:{path}", "--handlers", EXIT)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(r"; exited with status 1: \x1b[31mred\n")
    assert "vmibridge:" not in done.stderr


def test_of_several_vms_each_ends_by_itself(vmibridge, image, tmp_path, handlers):
    """The first one of `--backend` that has not said 0 counts, whoever is faster."""
    specs = []
    slow = calls(*[1] * 20, tail="")
    for name, status, before in (("a", 0, ""), ("b", 5, slow), ("c", 6, "")):
        made = image(before + calls("0xffff", value=status, request="0x111", tail="ud2"))
        (tmp_path / f"{name}.bin").write_bytes((tmp_path / made).read_bytes())
        specs += ["--backend", f"{name}=unicorn:{name}.bin"]
    done = vmibridge("run", *specs, "--handlers", EXIT, handlers, "--json")
    assert done.returncode == 5, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert {each["vm"]: each["status"] for each in summary["exits"]} == {"a": 0, "b": 5, "c": 6}
    assert summary["handled"] == 23


def test_of_several_vcpus_the_first_one_counts(vmibridge, image):
    # The others wait for the exit of vCPU 0, which stops them.
    code = """
        cmp edi, 0
        jne others
    """ + calls("0xffff", value=4, request="0x111", tail="ud2\nothers: jmp others")
    path = image(code)
    spec = f"unicorn:{path}?vcpus=2"
    done = vmibridge("run", "--backend", spec, "--handlers", EXIT, "--json")
    assert done.returncode == 4, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])["summary"]["guest"]
    assert "lost" not in {each["reason"] for each in ends}


def test_an_exit_and_a_crash_of_another_vm(vmibridge, image, tmp_path):
    """A VM that has exited has not failed; one that has not may have."""
    exiting = image(calls("0xffff", value=3, request="0x111", tail="ud2"))
    (tmp_path / "exits.bin").write_bytes((tmp_path / exiting).read_bytes())
    specs = ["--backend", "a=unicorn:exits.bin", "--backend", f"b=unicorn:{image('ud2')}"]
    done = vmibridge("run", *specs, "--handlers", EXIT)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("vmibridge:")]
    assert error.startswith("vmibridge: vm b: vcpu 0 crashed")
