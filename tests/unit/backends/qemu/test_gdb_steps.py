"""One instruction of a vCPU, on a stub whose steps run nothing, or that says what it must not.

QEMU reports the end of a step that has run nothing when something kicks the vCPU as it begins.
"""

import anyio
import pytest
from fake_gdbstub import ADD, MAGIC, SITE, VMCALL

from vmibridge.backends.qemu.gdb import steps
from vmibridge.backends.qemu.gdb.packets import encode

pytestmark = pytest.mark.anyio

STEP = b"vCont;s:p01.01"
AWAY, AGAIN = b"z0,401000,1", b"Z0,401000,1"
NOP, BACK = b"M401000,3:666690", b"M401000,3:0f01c1"
IN_SHADOW = {SITE - 8: b"\x90" * 7 + b"\xfb"}
"""A STI before the trap: its answer ends with an instruction that does nothing."""
MOST = steps._TRIES


def said_of_step(said):
    """What was said to step, without what was looked at before."""
    steps_and_more = [packet for packet in said if packet[:1] in b"zZvcGM" or packet == b"g"]
    return steps_and_more[steps_and_more.index(AWAY) :]


@pytest.mark.parametrize("idle", [0, 1, MOST - 1])
async def test_an_answered_trap_ends_once_however_often_a_step_runs_nothing(stage, idle):
    stage.stub.memory |= IN_SHADOW
    async with stage.run() as stub:
        await stub.runs()
        begin = len(stub.said)
        stub.idle_steps = idle
        await stub.call(ADD, 41)
        await stub.runs()
        away, written, nop, *stepped, back, again, goes_on = said_of_step(stub.said[begin:])
        assert (away, written[:1], nop) == (AWAY, b"G", NOP)
        assert stepped == [STEP, b"g"] * (idle + 1)
        assert (back, again, goes_on) == (BACK, AGAIN, b"c")
        assert stub.answer == (42, 0, SITE)
        await stub.stop(b"W00")
    assert stub.memory[SITE] == VMCALL
    assert stage.outcomes == ["handled"]


async def test_an_answer_is_not_lost_if_no_step_runs_the_end_of_its_instruction(stage):
    stage.stub.memory |= IN_SHADOW
    async with stage.run() as stub:
        stub.idle_steps = MOST
        await stub.call(ADD, 41)
        await stub.runs()
        assert stub.said.count(STEP) == MOST
        assert stub.answer == (42, 0, SITE + 3)
        await stub.stop(b"W00")
    assert stub.memory[SITE] == VMCALL
    assert stage.outcomes == ["handled"]


@pytest.mark.parametrize("idle", [0, 1, MOST - 1, MOST])
async def test_a_trap_that_is_not_ours_is_stepped_over_before_its_breakpoint_is_back(stage, idle):
    """As a jump to itself does, an instruction may stay where it is: then the vCPU goes on."""
    async with stage.run() as stub:
        await stub.runs()
        begin = len(stub.said)
        stub.idle_steps = idle
        await stub.call(ADD, rcx=MAGIC + 1)
        await stub.runs()
        tries = min(idle + 1, MOST)
        assert said_of_step(stub.said[begin:]) == [AWAY, *[STEP, b"g"] * tries, AGAIN, b"c"]
        await stub.stop(b"W00")
    assert not stage.outcomes


async def test_a_pause_in_a_later_try_is_left_to_whom_it_is_of(stage):
    async with stage.run() as stub:
        await stub.runs()
        begin = len(stub.said)
        stub.idle_steps = 1
        stub.replies[STEP] = []
        ends = iter([b"T05thread:p01.01;", b"T02thread:p01.01;"])
        is_left = anyio.Event()

        async def before_reply(packet):
            if packet == STEP:
                await stub.stream.send(encode(next(ends)))
            elif packet.startswith(b"vCont;x"):
                is_left.set()

        stub.before_reply = before_reply
        await stub.call(ADD, rcx=MAGIC + 1)
        await is_left.wait()
        said = said_of_step(stub.said[begin:])
        assert said[:5] == [AWAY, STEP, b"g", STEP, AGAIN]
        assert b"c" not in said
        await stub.stream.send(encode(b"W00"))


@pytest.mark.parametrize("is_ours", [False, True])
@pytest.mark.parametrize(
    ("begin", "reply"), [(b"g", b"E01"), (b"g", b"0011"), (b"Z", b"E22"), (b"Z", b"what")]
)
async def test_what_a_stub_must_not_say_in_a_step_ends_at_most_its_run(
    stage, is_ours, begin, reply, caplog
):
    stage.stub.memory |= IN_SHADOW
    async with stage.run() as stub:
        stepped = anyio.Event()

        async def before_reply(packet):
            if packet == STEP:
                stub.replies[begin] = reply
                stepped.set()

        stub.before_reply = before_reply
        await stub.call(ADD, 41, rcx=MAGIC + (not is_ours))
        await stepped.wait()
        if begin == b"Z" and is_ours:
            await stub.runs()
            await stub.stop(b"W00")
    if begin == b"Z" and is_ours:
        assert "no end of the instruction" in caplog.text
        assert stage.outcomes == ["handled"]
    else:
        assert {reason for _, reason in stage.ends} == {"lost"}
