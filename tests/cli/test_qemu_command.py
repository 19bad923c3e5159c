"""`vmibridge qemu`, as users run it, with a real QEMU."""

import json
import os
import signal
from pathlib import Path

import pytest
from asked_health import await_health
from children import run
from needs import needs
from probe_guest import command

GUEST = Path(__file__).parents[1] / "integration/guests/micro.asm"
ALL_RIGHT, NO_STAMPS = 33, 35
HANDLERS = """
from vmibridge import BridgeHandler, BridgeResponse
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

class Invert(BridgeHandler[None]):
    MAGIC, REQUEST = STANDARD_MAGIC, 0x0100
    VERIFY_VALUE3, VERIFY_VALUE4 = STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

    async def handle(self, vmi, packet):
        return BridgeResponse(~packet.value1 & 0xFFFF_FFFF_FFFF_FFFF)
"""
MACHINE = ["-m", "32", "-nodefaults", "-display", "none", "-no-reboot"]
MACHINE += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", "guest.bin"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "handlers.py").write_text(HANDLERS)
    return tmp_path


@pytest.fixture
def guest(folder):
    def build(count):
        target = str(folder / "guest.bin")
        defines = [f"-DCOUNT={count}", "-DHOW=1"]
        run([needs("nasm"), "-f", "bin", *defines, GUEST, "-o", target], check=True)

    return build


@pytest.fixture
def start(children, folder, qemu):
    needs("cc")
    environment = {**os.environ, "VMIBRIDGE_QEMU": qemu, "XDG_CACHE_HOME": str(folder / "cache")}

    def start(*options, machine=MACHINE):
        line = command("qemu", "run", *options, "--", *machine)
        return children.start(line, cwd=folder, env=environment)

    return start


def ended(process):
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("more", [[], ["--share-memory"], ["--async-backend", "trio"]], ids=str)
def test_it_starts_qemu_answers_and_ends_with_its_status(start, guest, folder, more):
    guest(50)
    for _ in range(2):
        status, out, err = ended(start("--handlers", "handlers.py", *more))
        assert (status, out) == (ALL_RIGHT, "")
        assert err.splitlines()[-1] == "50 traps: 50 handled"
    # The plugin was built once.
    assert len(list((folder / "cache/vmibridge").iterdir())) == 1


def test_outcomes_go_to_a_file(start, guest, folder):
    guest(5)
    options = ["--handlers", "handlers.py", "--json", "--outcomes", "o.json", "--record", "r.mcap"]
    assert ended(start(*options))[:2] == (ALL_RIGHT, "")
    *traps, summary = map(json.loads, (folder / "o.json").read_text().splitlines())
    assert [trap["outcome"] for trap in traps] == ["handled"] * 5
    assert summary["summary"]["guest"][0]["reason"] == "halted"
    assert (folder / "r.mcap").stat().st_size > 1000


@pytest.mark.parametrize("word", ["false", "true"])
def test_a_word_for_outcomes_says_whether_they_are_shown_and_is_no_file(start, guest, folder, word):
    guest(5)
    options = ["--handlers", "handlers.py", "--outcomes", word]
    status, out, err = ended(start(*options))
    assert (status, out) == (ALL_RIGHT, "")
    assert err.splitlines()[-1] == "5 traps: 5 handled"
    assert err.count("handled") == (6 if word == "true" else 1)
    assert not (folder / word).exists()
    status, _, err = ended(start(*options, "--outcomes-max-size", "1MiB"))
    assert (status, err.count("give --outcomes FILE, too")) == (2, 1)


def test_a_signal_ends_qemu_through_its_monitor(start, guest, folder):
    guest(2_000_000_000)
    process = start("--handlers", "handlers.py", "--json", "--outcomes", "/dev/stdout")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    status, out, err = ended(process)
    assert status == 143
    assert json.loads(out.splitlines()[-1])["summary"]["guest"][0]["reason"] == "stopped"
    assert "SIGTERM: stopping" in err
    assert "does not end" not in err


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "options",
    # Where the host is absent for a while the guest waits: else it would end.
    [["--handlers", "handlers.py"], ["--socket", "vmi.sock", "--absent", "wait"]],
    ids=["with its host", "with a host elsewhere"],
)
def test_it_is_ready_from_when_qemu_runs(start, guest, folder, options):
    guest(2_000_000_000)
    path = folder / "health.sock"
    process = start(*options, "--outcomes", os.devnull, "--health-socket", str(path))
    await_health(path, process=process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert not path.exists()


@pytest.mark.no_cover
def test_a_guest_that_exits_ends_qemu(start, guest, folder):
    """Its status counts, not that of QEMU: a guest without a host finds no stamps, and fails."""
    source = HANDLERS.replace("import BridgeHandler", "import GuestExit, BridgeHandler")
    gives = "return BridgeResponse(0).with_output(GuestExit(0))  # "
    (folder / "exits.py").write_text(source.replace("return BridgeResponse", gives))
    guest(2_000_000_000)
    status, _, err = ended(start("--handlers", "exits.py"))
    assert status == 0, err
    assert err.splitlines()[-1].endswith("; exited with status 0")


def test_a_host_elsewhere_answers(children, start, guest, folder):
    guest(20)
    host = children.start(
        command("run", "--backend", "qemu-plugin:unix:s", "--handlers", "handlers.py", "--json"),
        cwd=folder,
    )
    assert ended(start("--socket", "s", "--absent", "wait"))[0] == ALL_RIGHT
    assert json.loads(host.communicate()[0].splitlines()[-1])["summary"]["handled"] == 20


def test_without_a_host_the_guest_runs_natively(start, guest):
    guest(20)
    assert ended(start("--socket", "none")) == (NO_STAMPS, "", "")


def test_without_a_host_a_guest_may_go_on_behind_its_calls(start, folder):
    """Where VMCALL would be undefined: the guest comes to its end, without an answer."""
    define = ["-DHOW=2", "-DCOUNT=20"]
    run([needs("nasm"), "-f", "bin", *define, GUEST, "-o", folder / "guest.bin"], check=True)
    options = ["--socket", "none", "--absent", "skip", "--plugin-options", "verbose=on"]
    assert ended(start(*options)) == (NO_STAMPS, "", "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "absent=native,patience=30"),
        (["--timeout", "45"], "absent=native,patience=55"),
        (["--timeout", "45", "--patience", "3.5"], "absent=native,patience=3.5"),
        (["--absent", "skip", "--compat", "0x3b"], "absent=skip,patience=30,compat=59"),
        (
            ["--absent", "wait", "--plugin-options", "cpuid=off,verbose=on"],
            "absent=wait,patience=30,cpuid=off,verbose=on",
        ),
    ],
)
def test_what_is_for_the_plugin_is_passed_on(start, folder, options, told):
    qemu = folder / "qemu"
    version = "case $1 in --version) echo QEMU emulator version 11.1.0; exit;; esac"
    qemu.write_text(f'#!/bin/sh\n{version}\nprintf "%s\\n" "$@" >arguments\n')
    qemu.chmod(0o700)
    ended(start("--qemu", str(qemu), "--socket", "s", "--plugin", "p.so", *options, machine=[]))
    arguments = (folder / "arguments").read_text().splitlines()
    place = f"file={folder}/p.so,socket={folder}/s,"
    assert arguments[arguments.index("-plugin") + 1] == place + told


def test_a_signal_ends_a_qemu_that_has_its_host_elsewhere(start, guest):
    process = start(
        "--socket", "none", machine=["-S", "-m", "32", "-display", "none", "-qmp", "stdio"]
    )
    assert "QMP" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status == 130
    # What QEMU says when its monitor is not reached yet.
    ends = f"qemu-system-x86_64: terminating on signal 15 from pid {process.pid} "
    assert all(line.startswith(ends) for line in err.splitlines()), err


def test_a_qemu_that_fails_says_why_itself(start, folder):
    status, out, err = ended(start("--handlers", "handlers.py", machine=["-wrong"]))
    assert (status, out) == (1, "")
    assert "-wrong: invalid option" in err


@pytest.mark.parametrize("more", [[], ["--share-memory"]])
@pytest.mark.no_cover
def test_breakpoints_do_for_any_qemu(start, guest, folder, more):
    guest(50)
    site = 0x10_0000 + (folder / "guest.bin").read_bytes().index(b"\x0f\xa2")
    system = needs("qemu-system-x86_64")
    options = ["--handlers", "handlers.py", "--via", "gdb", "--backend-options", f"site={site:#x}"]
    for qemu in ([], ["--qemu", system]):
        status, out, err = ended(start(*options, *more, *qemu))
        assert (status, out) == (ALL_RIGHT, "")
        assert err.splitlines()[-1] == "50 traps: 50 handled"


def test_a_qemu_that_fails_before_it_listens_is_told(start, folder):
    options = ["--handlers", "handlers.py", "--via", "gdb", "--backend-options", "site=1"]
    status, _, err = ended(start(*options, machine=["-wrong"]))
    assert status == 1
    assert err.splitlines()[-1] == "vmibridge: QEMU ended with status 1"


@pytest.mark.parametrize(
    ("options", "machine", "told"),
    [
        ([], MACHINE, "give --handlers that answer, or the --socket where a host listens"),
        (["--socket", "s"], ["-enable-kvm"], "with KVM the plugin is loaded and never trapped to"),
        (["--socket", "s", "--accel", "kvm"], MACHINE, "use TCG, --via gdb or --via device"),
        (["--socket", "s", "--via", "gdb"], MACHINE, "--handlers are needed here"),
        (
            ["--handlers", "handlers.py", "--via", "gdb", "--patience", "1"],
            MACHINE,
            "--patience, --compat and --plugin-options go with --via plugin only",
        ),
        (
            ["--handlers", "handlers.py", "--via", "gdb", "--absent", "native"],
            MACHINE,
            "--plugin, --absent, --patience, --compat and --plugin-options go with",
        ),
        (["--handlers", "handlers.py", "--backend-options", "x=1"], MACHINE, "no option 'x'"),
        (["--handlers", "handlers.py", "--share-memory"], ["-m", "much"], "is not a memory size"),
    ],
)
@pytest.mark.no_cover
def test_wrong_usage_is_told(start, options, machine, told):
    status, _, err = ended(start(*options, machine=machine))
    assert status in (1, 2)
    assert told in err
    assert len(err.splitlines()) == 1


def test_an_old_qemu_is_told(start, folder):
    old = folder / "old"
    old.write_text("#!/bin/sh\necho QEMU emulator version 7.2.1\n")
    old.chmod(0o700)
    status, _, err = ended(start("--handlers", "handlers.py", "--qemu", str(old)))
    assert status == 1
    assert f"no QEMU of 11.1 or later ({old} is 7.2)" in err
    assert "--via gdb works with older ones" in err
    assert "--qemu PATH" not in err, "that is given"
    options = ["--handlers", "handlers.py", "--via", "device"]
    status, _, err = ended(start(*options, "--qemu", str(old)))
    assert status == 1
    assert "the backend ivshmem: works with older ones" in err


def test_the_plugin_is_built(folder):
    needs("cc")
    built = run(command("qemu", "build-plugin", "-o", "p.so"), cwd=folder, check=True)
    assert built.stdout == f"{folder / 'p.so'}\n"
    assert (folder / "p.so").read_bytes()[:4] == b"\x7fELF"
