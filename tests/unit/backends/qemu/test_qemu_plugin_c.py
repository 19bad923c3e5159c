"""The plugin's C code under AddressSanitizer and UBSan, against hosts that do what they must not.

QEMU is a fake here, `plugin_c/fake_qemu.c`: one vCPU that makes the traps that a test asks for.
`inside` says whether it exports functions beyond the plugin API.
"""

import random
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from vmibridge.backends.qemu.plugin.build import SOURCES

UNITS = [source for source in SOURCES if source.suffix == ".c"]
FAKE = Path(__file__).parent / "plugin_c/fake_qemu.c"
STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PATIENT = 60.0
"""Seconds that nothing here takes."""
AT = 0x40_1000
CPUID, VMCALL, VMMCALL = 1, 2, 3
MAGIC, TF = 0x4249_4D56, 0x100
HELLO, TRAP, MEMORY, WELCOME, REFUSED, ANSWER, NATIVE, READ, WRITE = (1, 2, 3, *range(16, 22))
WELCOMED = struct.pack("<5I", 3, 0b1110, 0, 1, MAGIC)
MAX_ACCESS = 16 << 20


@pytest.fixture(scope="module", params=["inside", "outside"])
def fake(request, tmp_path_factory):
    """The fake with the plugin in it; whether it exports functions."""
    target = tmp_path_factory.mktemp("fake") / request.param
    defines = [] if request.param == "inside" else ["-DNO_INSIDE"]
    command = ["gcc", *STRICT, *SANITIZED, *defines, "-o", target, FAKE, *UNITS]
    subprocess.run(command, check=True)
    return target, request.param == "inside"


class Vcpu:
    """The fake, running."""

    def __init__(self, program, socket_path, *arguments):
        command = [program, f"socket={socket_path}", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def trap(self, kind=VMCALL, flags=0):
        self.process.stdin.write(f"{kind} {AT:x} {flags:x}\n")
        self.process.stdin.flush()

    def goes_on(self):
        """How, where, RAX, RBX, RCX, RDX."""
        how, *numbers = self.process.stdout.readline().split()
        return (how, *(int(number, 0) for number in numbers))

    def end(self):
        """What it said. A sanitizer that found something ends it with another status than 0."""
        _, said = self.process.communicate(timeout=PATIENT)
        assert self.process.returncode == 0, said
        return said


class Connection:
    """A vCPU's, at the host's end."""

    def __init__(self, connected):
        self.socket = connected
        connected.settimeout(PATIENT)

    def receive(self):
        kind, size = struct.unpack("<II", self._exactly(8))
        return kind, self._exactly(size)

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            assert piece, "the plugin has closed the connection"
            data += piece
        return data

    def send(self, kind, body=b""):
        self.send_bytes(struct.pack("<II", kind, len(body)) + body)

    def send_bytes(self, data):
        self.socket.sendall(data)

    def is_hung_up_on(self):
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionError:
            pass
        self.socket.close()

    def close(self):
        self.socket.close()


class Stage:
    """A vCPU and the host that it finds."""

    def __init__(self, folder, program):
        self.path, self.program = folder / "s", program
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.listener.settimeout(PATIENT)
        self.vcpus, self.connections = [], []

    def vcpu(self, *arguments):
        self.vcpus.append(Vcpu(self.program, self.path, *arguments))
        return self.vcpus[-1]

    def accept(self, welcome=WELCOMED):
        connection = Connection(self.listener.accept()[0])
        self.connections.append(connection)
        assert connection.receive()[0] == HELLO
        if welcome is not None:
            connection.send(WELCOME, welcome)
        return connection

    def close(self):
        for connection in self.connections:
            connection.close()
        self.listener.close()
        for vcpu in self.vcpus:
            if vcpu.process.poll() is None:
                vcpu.process.kill()
                vcpu.process.communicate()


@pytest.fixture
def stage(fake, tmp_path):
    stage = Stage(tmp_path, fake[0])
    stage.inside = fake[1]
    yield stage
    stage.close()


def test_the_plugin_names_its_architecture(stage):
    vcpu = stage.vcpu()
    vcpu.trap()
    connection = Connection(stage.listener.accept()[0])
    stage.connections.append(connection)
    kind, body = connection.receive()
    told = struct.unpack_from("<I20x16s12sI", body)
    assert kind == HELLO
    assert told == (3, b"x86_64".ljust(16, b"\0"), b"x86".ljust(12, b"\0"), 1)
    assert body[56:].startswith(b"rax,rbx,")
    connection.send(WELCOME, WELCOMED)
    connection.receive()
    connection.send(NATIVE)
    vcpu.goes_on()
    assert vcpu.end() == ""


def behind(kind):
    return AT + (2 if kind == CPUID else 3)


def answer(kind, mask=0b1101):
    return struct.pack("<QII4Q", behind(kind), mask, 0, 0xA, 0xB, 0xC, 0xD)


@pytest.mark.parametrize("kind", [CPUID, VMCALL, VMMCALL])
def test_an_answer_is_written_and_the_vcpu_goes_on_behind(stage, kind):
    vcpu = stage.vcpu()
    host = stage.accept()
    for _ in range(3):
        vcpu.trap(kind, flags=0x41)
        frame, body = host.receive()
        assert (frame, len(body)) == (TRAP, 192)
        ip, told, length, width, ring, flags, *registers = struct.unpack("<QBBBBI22Q", body)
        assert (ip, told, length, width, ring) == (AT, kind, behind(kind) - AT, 64, 0)
        assert flags == (0 if stage.inside else 2)
        assert registers[16] == 0x43
        host.send(ANSWER, answer(kind))
        assert vcpu.goes_on() == ("behind", behind(kind), 0xA, 0x2000, 0xC, 0xD)
    assert vcpu.end() == ""


@pytest.mark.parametrize("kind", [CPUID, VMCALL])
def test_a_trap_that_is_stepped_over_ends_with_a_step(stage, kind):
    vcpu = stage.vcpu()
    host = stage.accept()
    vcpu.trap(kind, flags=TF)
    host.receive()
    host.send(ANSWER, answer(kind))
    assert vcpu.goes_on()[0] == ("step" if stage.inside else "behind")
    vcpu.end()


@pytest.mark.parametrize("kind", [CPUID, VMCALL])
def test_what_is_not_answered_runs_natively_once(stage, kind):
    vcpu = stage.vcpu()
    host = stage.accept()
    for _ in range(2):
        vcpu.trap(kind)
        assert host.receive()[0] == TRAP
        host.send(NATIVE)
        assert vcpu.goes_on()[:2] == ("native", AT)
    vcpu.end()


def test_a_host_reads_and_writes_memory_while_the_vcpu_waits(stage):
    vcpu = stage.vcpu()
    host = stage.accept()
    vcpu.trap()
    host.receive()
    host.send(WRITE, struct.pack("<QII", 0xFF0, 16, 0) + b"sixteen bytes!!!")
    assert host.receive() == (MEMORY, b"\0\0\0\0")
    host.send(READ, struct.pack("<QII", 0xFF7, 6, 0))
    assert host.receive() == (MEMORY, b"\0\0\0\0 bytes")
    for address, size in [(1 << 20, 1), ((1 << 64) - 1, 2), (0, MAX_ACCESS)]:
        host.send(READ, struct.pack("<QII", address, size, 0))
        assert host.receive() == (MEMORY, b"\1\0\0\0")
    host.send(READ, struct.pack("<QII", 0, MAX_ACCESS + 1, 0))
    assert host.receive() == (MEMORY, b"\1\0\0\0")
    host.send(ANSWER, answer(VMCALL))
    assert vcpu.goes_on()[0] == "behind"
    vcpu.end()


WRONG = {
    "an unknown type": struct.pack("<II", 99, 0),
    "its own type": struct.pack("<II", TRAP, 192) + bytes(192),
    "a short answer": struct.pack("<II", ANSWER, 47) + bytes(47),
    "a long answer": struct.pack("<II", ANSWER, 0xFFFF_FFFF) + bytes(64),
    "a native with a body": struct.pack("<II", NATIVE, 1) + b"\0",
    "a short read": struct.pack("<II", READ, 15) + bytes(15),
    "a long read": struct.pack("<IIQII", READ, 17, 0, 1, 0) + b"\0",
    "a write of another size": struct.pack("<IIQII", WRITE, 20, 0, 5, 0) + bytes(5),
    "a write that wraps": struct.pack("<IIQII", WRITE, 15, 0, 0xFFFF_FFFF, 0),
    "a write that is too large": struct.pack(
        "<IIQII", WRITE, MAX_ACCESS + 17, 0, MAX_ACCESS + 1, 0
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_host_that_sends_what_it_must_not_is_hung_up_on(stage, wrong):
    vcpu = stage.vcpu()
    host = stage.accept()
    vcpu.trap()
    host.receive()
    host.send_bytes(wrong)
    host.is_hung_up_on()
    assert vcpu.goes_on()[:2] == ("native", AT)
    vcpu.end()


def test_a_host_that_goes_away_at_any_byte_is_done_without(stage):
    whole = struct.pack("<IIQII", WRITE, 24, 0x100, 8, 0) + b"01234567"
    whole += struct.pack("<II", ANSWER, 48) + answer(VMCALL)
    for cut in range(0, len(whole), 3):
        vcpu = stage.vcpu()
        host = stage.accept()
        vcpu.trap()
        host.receive()
        host.send_bytes(whole[:cut])
        host.close()
        assert vcpu.goes_on()[:2] == ("native", AT)
        vcpu.end()


def test_random_bytes_do_no_harm(stage):
    chance = random.Random(15)
    kinds = [*range(15, 24), 0, 2, 3, 0xFFFF_FFFF]
    lengths = [*range(20), 47, 48, 49, MAX_ACCESS, MAX_ACCESS + 16, 0xFFFF_FFFF]
    for _ in range(40):
        data = b""
        for _ in range(chance.randrange(1, 4)):
            head = (chance.choice(kinds), chance.choice(lengths))
            data += struct.pack("<II", *head) + chance.randbytes(chance.randrange(60))
        vcpu = stage.vcpu("absent=skip")
        host = stage.accept()
        vcpu.trap(chance.choice([CPUID, VMCALL, VMMCALL]))
        host.receive()
        host.send_bytes(data)
        host.socket.shutdown(socket.SHUT_WR)
        assert vcpu.goes_on()[0] in ("behind", "native")
        host.close()
        vcpu.end()


WRONG_WELCOMES = {
    "another version": struct.pack("<5I", 1, 14, 0, 1, MAGIC),
    "too short": bytes(15),
    "too many magics": struct.pack("<4I", 3, 14, 0, 65) + bytes(260),
    "a count that wraps": struct.pack("<4I", 3, 14, 0, 0x4000_0001) + bytes(4),
    "fewer magics than it says": struct.pack("<4I", 3, 14, 0, 3) + bytes(4),
}


@pytest.mark.parametrize("welcome", WRONG_WELCOMES.values(), ids=WRONG_WELCOMES.keys())
def test_a_host_of_another_protocol_is_told_and_left(stage, welcome):
    vcpu = stage.vcpu()
    stage.accept(welcome).is_hung_up_on()
    vcpu.trap()
    assert vcpu.goes_on()[:2] == ("native", AT)
    assert vcpu.end() == "vmibridge plugin: the host speaks another protocol\n"


@pytest.mark.parametrize("why", ["100%s %n%n", "x" * 511, ""])
def test_a_refusal_is_said_and_holds(stage, why):
    vcpu = stage.vcpu("absent=wait")
    host = stage.accept(None)
    host.send(REFUSED, why.encode())
    vcpu.trap()
    assert vcpu.goes_on()[:2] == ("native", AT)
    assert vcpu.end() == f"vmibridge plugin: the host refuses this plugin: {why}\n"


def never(host):
    """It has taken the trap, and says nothing."""


def in_single_bytes(host):
    try:
        for byte in (
            struct.pack("<II", WELCOME, 272) + struct.pack("<4I", 3, 14, 0, 64) + bytes(256)
        ):
            host.send_bytes(bytes([byte]))
            host.socket.settimeout(0.1)
            try:
                host.socket.recv(1)
            except TimeoutError:
                continue
            return
    except ConnectionError:
        pass


def in_a_loop(host):
    try:
        while True:
            host.send(READ, struct.pack("<QII", 0, 8, 0))
            host.receive()
    except (ConnectionError, AssertionError):
        pass


def with_much_that_it_does_not_read(host):
    try:
        while True:
            host.send(READ, struct.pack("<QII", 0, 1 << 20, 0))
    except (ConnectionError, TimeoutError):
        pass


@pytest.mark.parametrize("absent", ["native", "skip", "wait"])
@pytest.mark.parametrize(
    "holds", [never, in_single_bytes, in_a_loop, with_much_that_it_does_not_read]
)
def test_a_host_that_holds_a_trap_loses_it_when_patience_ends(stage, absent, holds):
    vcpu = stage.vcpu("patience=0.6", f"absent={absent}")
    host = stage.accept()
    stage.listener.close()
    vcpu.trap()
    host.receive()
    holds(host)
    host.is_hung_up_on()
    assert vcpu.goes_on()[0] == ("behind" if absent == "skip" else "native")
    vcpu.end()


@pytest.mark.parametrize("holds", [never, in_single_bytes])
def test_a_host_that_does_not_welcome_is_left_when_patience_ends(stage, holds):
    vcpu = stage.vcpu("patience=0.6", "absent=skip")
    host = stage.accept(None)
    holds(host)
    host.is_hung_up_on()
    vcpu.trap()
    assert vcpu.goes_on()[:2] == ("behind", AT + 3)
    vcpu.end()


@pytest.mark.parametrize("kind", [CPUID, VMCALL, VMMCALL])
def test_a_trap_that_is_skipped_leaves_the_registers_as_they_were(stage, kind):
    vcpu = stage.vcpu("absent=skip")
    stage.accept().close()
    vcpu.trap(kind)
    was = [0x1000, 0x2000, 0x3000, 0x4000]
    was[0 if kind == CPUID else 2] = MAGIC
    assert vcpu.goes_on() == ("behind", behind(kind), *was)
    vcpu.end()


def test_code_that_is_translated_leaves_nothing_behind(stage):
    """However much there is, and at however many addresses: what is known of it does not grow."""
    vcpu = stage.vcpu()
    stage.accept()
    vcpu.process.stdin.write("0 30000 0\n")  # in hex, so 196,608 blocks
    vcpu.process.stdin.flush()
    # Three kinds, first in its block or behind a NOP; and null, for the checks between.
    assert int(vcpu.process.stdout.readline()) <= 7
    vcpu.end()


WRONG_ARGUMENTS = "socket magic=-1 magic=0x1ffffffff patience=nan patience=-1 patience=1e99"
WRONG_ARGUMENTS += " compat=0x10000 absent= inside=maybe cpuid= ="


@pytest.mark.parametrize("wrong", [*WRONG_ARGUMENTS.split(), "", "x" * 4000, "socket=" + "x" * 108])
def test_a_wrong_argument_is_refused(fake, wrong):
    done = subprocess.run(
        [fake[0], wrong], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vmibridge plugin: wrong argument")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_analyzer_of_gcc_finds_nothing(unit):
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-fanalyzer", "-c"]
    subprocess.run([*command, "-o", "/dev/null", unit], check=True)
