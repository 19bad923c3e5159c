"""The ready-made handlers, called by real guests, recorded, and replayed with the same answers."""

import time
from pathlib import Path

import pytest

from vmibridge import Bridge, BridgeServer, Gate, GuestExit, OutcomeKind, open_backend
from vmibridge.handlers.clock import Clock
from vmibridge.handlers.exec_gate import ExecGate, GateDecision, Why
from vmibridge.handlers.exit import Exit
from vmibridge.handlers.kv import Kv
from vmibridge.handlers.random import Random
from vmibridge.recording import Recorder, Replay

pytestmark = pytest.mark.anyio

# Each guest checks its answers itself: it ends by HLT where they are right, by UD2 where not.
HEAD = """
%include "bridge.inc"
%macro ASK 2                            ; a request of success; value2 of the answer is in rbx
    BRIDGE_CALL BRIDGE_VMCALL, %1, %2
    BRIDGE_CHECK_STAMPS wrong
    cmp rax, %2 & 0xff
    jne wrong
%endmacro
default rel
    jmp begin
wrong:
    ud2
name: db 'counter', 0
begin:
"""

CLOCK = """
    ASK 0x0114, 1
    mov r12, rbx
    ASK 0x0114, 2
    mov r13, rbx
    ASK 0x0114, 2
    cmp rbx, r13
    jb wrong
    mov rax, {after}
    cmp r12, rax
    jb wrong
    hlt
"""

RANDOM = """
    mov r8d, 0x200000
    mov r9d, 64
    ASK 0x0115, 1
    cmp ebx, 64
    jne wrong
    mov rax, [abs 0x200000]
    cmp rax, [abs 0x200008]
    je wrong
    hlt
"""

# Begins with a version of 0, and sets 'one'; an older version is refused.
KV = """
    lea r8, [name]
    mov r9d, 0
    lea r10, [value]
    mov r11d, 3
    ASK 0x0112, 6
    cmp rbx, 1
    jne wrong
    BRIDGE_CALL BRIDGE_VMCALL, 0x0112, 6
    BRIDGE_CHECK_STAMPS wrong
    cmp rax, 2 << 16 | 0xfe06           ; failed: another version
    jne wrong
    mov r9d, 0x200000
    mov r10d, 64
    ASK 0x0112, 1
    cmp ebx, 3
    jne wrong
    cmp word [abs 0x200000], 'on'
    jne wrong
    lea r8, [name + 7]                  ; the empty name
    ASK 0x0112, 4
    cmp ebx, 7
    jne wrong
    lea r8, [name]
    ASK 0x0112, 3
    cmp ebx, 1
    jne wrong
    hlt
value: db 'one'
"""

GATE = """
%include "gate.inc"
    lea r8, [name]
    BRIDGE_GATE BRIDGE_VMCALL, 0x0113, 1, wrong
    cmp eax, BRIDGE_ABORT
    jne wrong
    cmp ebx, 1                          ; nobody answered
    jne wrong
    hlt
"""

EXIT = """
    mov r8d, 3
    lea r9, [name]
    ASK 0x0111, 0xffff
    jmp $
"""


class RecordedRun:
    """Runs a guest with a handler, and then its recording with another one."""

    def __init__(self, guest_code, folder: Path):
        self._guest_code = guest_code
        self._file = folder / "run.mcap"

    async def outcomes(self, source: str, make, until=None):
        spec = f"unicorn:{self._guest_code(HEAD + source)}"
        handler = make()
        async with open_backend(spec) as backend, Recorder(self._file) as recorder:
            server = BridgeServer(backend, Bridge(handler), taps=[recorder])
            outcomes = [outcome async for outcome in server.run(until)]
        ends = [end.reason for end in server.summary.guest.vcpus]
        assert ends == ["stopped" if until else "halted"], server.summary.guest
        async with Replay(self._file, lambda vm: make()) as replay:
            result = await replay.run()
        assert (result.different, replay.report() if result.different else "") == (0, "")
        assert result.compared == sum(each.kind is not OutcomeKind.WAITING for each in outcomes)
        return outcomes


@pytest.fixture
def recorded(guest_code, tmp_path) -> RecordedRun:
    return RecordedRun(guest_code, tmp_path)


async def test_the_clock_of_the_host(recorded):
    outcomes = await recorded.outcomes(CLOCK.format(after=time.time_ns() - 10**9), Clock)
    assert all(each.output <= time.time_ns() + 10**9 for each in outcomes)


async def test_random_bytes(recorded):
    assert [each.output for each in await recorded.outcomes(RANDOM, Random)] == [64]


async def test_values_in_a_file_which_a_replay_does_not_open(recorded, tmp_path):
    made = []

    def make() -> Kv:
        path = tmp_path / f"values{len(made)}.sqlite"
        made.append(path)
        return Kv(Kv.Settings(path=str(path)))

    await recorded.outcomes(KV, make)
    assert [path.exists() for path in made] == [True, False]


async def test_a_gate_that_nobody_opens(recorded, tmp_path):
    settings = ExecGate.Settings(folder=str(tmp_path / "questions"), patience=0.7)
    outcomes = await recorded.outcomes(GATE, lambda: ExecGate(settings))
    assert {each.kind for each in outcomes[:-1]} == {OutcomeKind.WAITING}
    assert outcomes[-1].output == GateDecision("counter", Gate.ABORT, Why.NO_ANSWER)
    assert list((tmp_path / "questions").iterdir()) == []


async def test_the_exit_of_a_guest(recorded):
    outcomes = await recorded.outcomes(EXIT, Exit, until="exit")
    assert [each.output for each in outcomes] == [GuestExit(3, "counter")]
