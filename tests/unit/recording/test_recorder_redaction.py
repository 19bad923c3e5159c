"""What a recorder leaves out."""

import pytest
from recorder_parts import MAGIC, SECRET, SECRET_BYTES, UNMAPPED, as_told, ask, read, record, serve

from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Reply, Session
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeBackend
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

pytestmark = pytest.mark.anyio


def unpacked(path):
    with RecordingReader(path) as reader:
        return b"".join(data for _, data in reader.chunks())


X64, X86 = ["r8", "r9", "r10", "r11"], ["rsi", "rdi"]
FORMS = {
    (TrapReason.VMCALL, 64): ("rcx", "rdx", *X64),
    (TrapReason.CPUID, 64): ("rax", "rcx", *X64),
    (TrapReason.VMCALL, 32): ("rbp", "rdx", *X86),
    (TrapReason.VMMCALL, 32): ("rbp", "rdx", *X86),
    (TrapReason.CPUID, 32): ("rax", "rcx", "rbx", "rdx", *X86),
}
VALUES = ["value1", "value2", "value3", "value4"]


class TestRedaction:
    def absent(self, path):
        content = unpacked(path)
        texts = (str(SECRET).encode(), SECRET_BYTES.hex().encode())
        assert not any(form in content for form in (SECRET_BYTES, SECRET_BYTES[::-1], *texts))

    async def test_of_memory_leaves_address_and_size(self, path):
        async def guest(vm):
            for code in (2, 4):
                await vm.call(ask(code))

        await record(path, guest, redact=["memory"])
        self.absent(path)
        accesses = read(path, MemoryAccess)
        assert [as_told(access) for access in accesses] == [
            ("read", 1, 0x2000, 8, None, None),
            ("wrote", 1, 0x3000, 8, None, None),
            ("read", 2, UNMAPPED, 8, None, "not mapped"),
            ("wrote", 2, UNMAPPED, 8, None, "not mapped"),
        ]
        assert [reply.output for reply in read(path, Reply)] == [None, None]

    @pytest.mark.parametrize("code", [1, 3], ids=["answer", "error"])
    @pytest.mark.parametrize("what", VALUES)
    async def test_of_a_value_is_of_its_answer_output_and_error_too(self, path, what, code):
        packet = ask(code, **{what: SECRET})
        outcomes, _ = await record(path, lambda vm: vm.call(packet), redact=[what])
        self.absent(path)
        (reply,) = read(path, Reply)
        assert (reply.packet, reply.output) == (ask(code), None)
        assert (reply.handler, reply.kind) == ("probe", outcomes[0].kind)
        assert reply.error == (None if code == 1 else "left out")
        assert outcomes[0].packet == packet, "the consumer of the outcomes gets it all"

    async def test_of_one_request_leaves_the_others(self, path):
        async def guest(vm):
            for request in (2, 3):
                await vm.call(ask(1, 1, 2, 3, 4, request=request))

        await record(path, guest, redact=["0x0002:value3"])
        traps, replies = read(path, TrapEvent), read(path, Reply)
        assert [trap.registers.r10 for trap in traps] == [0, 3]
        assert [trap.registers.r11 for trap in traps] == [4, 4]
        assert [reply.packet.values for reply in replies] == [(1, 2, 0, 4), (1, 2, 3, 4)]
        assert [reply.writes.rcx for reply in replies] == [None, 3]
        assert [reply.output for reply in replies] == [None, '{"values":[1,2,3,4]}']
        (rule,) = read(path, Session)[0].redaction
        assert str(rule) == "0x0002:value3"

    @pytest.mark.parametrize("what", VALUES)
    @pytest.mark.parametrize(("reason", "width"), FORMS, ids=lambda part: str(part).lower())
    async def test_knows_the_registers_of_each_form(self, path, reason, width, what):
        magic, code, *values = FORMS[reason, width]
        secret = SECRET & 0xFFFF_FFFF if width == 32 else SECRET
        given = dict(zip(values, range(101, 105), strict=False))
        register = dict(zip(VALUES, values, strict=False)).get(what)
        held = {**given, register: secret} if register else given
        registers = Registers(**{magic: MAGIC, code: 2 | 1 << 16}, **held)
        event = TrapEvent(1, reason, registers, length=2, width=width)
        async with Recorder(path, redact=[what]) as recorder, FakeBackend([event]) as vm:
            await serve(vm, recorder)
        kept = {**given, register: 0} if register else given
        (trap,) = read(path, TrapEvent)
        assert trap.registers == Registers(**{magic: MAGIC, code: 2 | 1 << 16}, **kept)
        assert secret.to_bytes(width // 8, "big") not in unpacked(path)

    @pytest.mark.parametrize(
        "rule",
        ["", "value5", "value0", "magic", "Memory", "memory ", "0x10000:memory", "2:", "-1:memory"],
    )
    def test_by_a_rule_that_makes_no_sense_is_refused(self, path, rule):
        with pytest.raises(ConfigError, match="is not a redaction"):
            Recorder(path, redact=[rule])
        assert not path.exists()
