"""The backend of a gdbstub, against a stub that is played: traps, memory, and how it lets go."""

import math
import struct

import anyio
import pytest
from fake_gdbstub import ADD, COPY, DATA, FILL, HALTED, HANDLER, MAGIC, SITE, STACK, WAIT, FakeStub

from vmibridge.backends.qemu.gdb import stops
from vmibridge.backends.qemu.gdb.packets import encode

pytestmark = pytest.mark.anyio


async def test_a_trap_is_a_read_and_its_answer_a_write_behind_a_look(stage, monkeypatch):
    # A machine with other work may take longer than that for a trap, which is one look more.
    monkeypatch.setattr(stops, "_AT_ONCE", math.inf)
    async with stage.run() as stub:
        await stub.call(ADD, 41)
        await stub.runs()
        assert stub.answer == (42, 0, SITE + 3)
        await stub.call(ADD, 41)
        await stub.runs()
        begin = len(stub.said)
        await stub.call(ADD, 1)
        await stub.runs()
        said = [packet[:1] for packet in stub.said[begin:]]
        assert said == [b"m", b"g", b"g", b"G", b"c"]
        await stub.call(ADD, 1, thread=2)
        await stub.runs()
        await stub.stop(b"W00")
    assert (stage.ends, stage.outcomes) == (HALTED, ["handled"] * 4)
    assert stage.work.where == [*[(0, SITE, 64, 0)] * 3, (1, SITE, 64, 0)]


async def test_a_trap_that_is_not_ours_is_stepped_over_by_its_own_vcpu(stage):
    async with stage.run() as stub:
        await stub.runs()
        begin = len(stub.said)
        await stub.call(ADD, thread=2, rcx=MAGIC + 1)
        await stub.runs()
        done = [packet for packet in stub.said[begin:] if packet[:1] in b"zZvcG"]
        assert done == [b"z0,401000,1", b"vCont;s:p01.02", b"Z0,401000,1", b"c"]
        await stub.stop(b"W00")
    assert not stage.outcomes


@pytest.mark.parametrize("code", [b"\x90" * 15, b"", b"\x0f\x01"])
async def test_a_site_without_a_trap_instruction_is_stepped_over_and_fails_the_run(
    stage, code, caplog
):
    stage.stub.memory[SITE] = code
    with pytest.raises(ExceptionGroup) as raised:
        async with stage.run() as stub:
            for _ in range(3):
                await stub.call(ADD)
            await stub.stop(b"W00")
    error = raised.value
    while isinstance(error, ExceptionGroup):  # a group for each task group of the loop
        (error,) = error.exceptions
    assert "site=0x401000 held no CPUID, VMCALL or VMMCALL" in str(error)
    seen = code.ljust(15, b"\0")[:3].hex(" ")
    assert [record.message for record in caplog.records if "no trap" in record.message] == [
        f"vm vm: at {SITE:#x}: no trap instruction there, but {seen}"
    ]


async def test_a_stop_for_a_breakpoint_that_is_not_ours_goes_on(stage, caplog):
    async with stage.run() as stub:
        await stub.call(ADD, rip=0xDEAD)
        await stub.call(ADD, 1)
        await stub.runs()
        assert stub.answer == (2, 0, SITE + 3)
        await stub.stop(b"W00")
    assert stage.outcomes == ["handled"]
    assert "0xdead: stopped where there is no site of ours" in caplog.text


async def test_a_pause_by_somebody_else_is_left_to_them(stage):
    async with stage.run() as stub:
        await stub.stop(b"T02thread:p01.01;")
        # They let it go on, and it comes to the site.
        stub.running.set()
        await stub.call(ADD, 1)
        await stub.runs()
        assert b"D;1" not in stub.said
        await stub.stop(b"T02thread:p01.01;")
        stage.server.stop()
    assert (stage.outcomes, stage.ends) == (["handled"], [(0, "stopped"), (1, "stopped")])
    assert b"z0,401000,1" in stub.said
    assert b"D;1" not in stub.said


async def test_a_shutdown_ends_the_run(stage):
    async with stage.run() as stub:
        await stub.stop(b"T03thread:p01.01;")
    assert stage.ends == HALTED


async def test_a_vm_that_qemu_cannot_run_any_further_has_crashed(stage):
    async with stage.run() as stub:
        await stub.stop(b"T06thread:p01.01;")
    assert stage.ends == [(0, "crashed"), (1, "crashed")]
    assert b"D;1" not in stub.said


@pytest.mark.parametrize("end", ["stop", "cancel", "exit", "hang up"])
async def test_a_step_is_waited_for_before_the_guest_is_let_go(stage, end):
    """QEMU would finish it afterwards, and stop for nobody."""
    stage.stub.replies[b"vCont;s"] = []
    async with stage.playing() as stub:
        with anyio.CancelScope() as scope:
            async with stage.serving():
                await stub.call(ADD, rcx=MAGIC + 1)
                while b"vCont;s:p01.01" not in stub.said:
                    await anyio.sleep(0.001)
                begin = len(stub.said)
                if end == "cancel":
                    scope.cancel()
                elif end == "stop":
                    stage.server.stop()
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)
                    assert len(stub.said) == begin
                    if end == "hang up":
                        await stub.stream.aclose()
                    else:
                        stub.run_instruction()
                        await stub.stream.send(
                            encode(b"W00" if end == "exit" else b"T05thread:p01.01;")
                        )
    # What goes on is the detaching's.
    lets_go = [b"g", b"Z0,401000,1", b"c", b"Hgp0.0", b"z0,401000,1"]
    said = [packet for packet in stub.said[begin:] if not packet.startswith(b"Qqemu")]
    assert said == ([*lets_go, b"D;1"] if end in ("stop", "cancel") else [])


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_stop_leaves_nothing_armed_and_the_guest_running(stage, cancelled):
    async with stage.run() as stub:
        await stub.call(COPY, DATA)
        await stub.runs()
        begin = len(stub.said)
        if cancelled:
            await stub.call(WAIT)
            await stage.work.begun.wait()
            stage.server.stop(now=True)
        else:
            stage.server.stop()
    said = stub.said[begin:]
    end = said.index(b"z0,401000,1")
    assert said[end:] == [
        b"z0,401000,1",
        *([] if b"Qqemu.PhyMemMode:0" in said[:end] else [b"Qqemu.PhyMemMode:0"]),
        b"D;1",
    ]
    assert stage.ends == [(0, "stopped"), (1, "stopped")]


async def test_a_run_that_is_cancelled_in_a_trap_lets_go_of_the_guest(stage):
    async with stage.playing() as stub:
        with anyio.CancelScope() as scope:
            async with stage.serving():
                await stub.call(WAIT)
                await stage.work.begun.wait()
                scope.cancel()
    assert stub.said[-2:] == [b"z0,401000,1", b"D;1"]


async def test_a_backend_that_never_ran_lets_go_of_a_guest_that_had_begun(stage):
    for status, last in (("running", b"D;1"), ("paused (prelaunch)", None)):
        stage.stub = FakeStub(f"{stage.stub.path}-{bool(last)}")
        stage.stub.texts["info status"] = f"VM status: {status}\r\n"
        async with stage.playing(), stage.backend():
            pass
        assert (stage.stub.said[-1] == b"D;1") == (last is not None)


# --- memory ------------------------------------------------------------------------


async def test_memory_is_read_and_written_by_physical_address(stage):
    async with stage.run() as stub:
        await stub.call(COPY, DATA)
        await stub.runs()
        assert stub.answer[:2] == (DATA + 1, 0)
        await stub.call(COPY, 0x9000)
        await stub.runs()
        await stub.stop(b"W00")
    assert stub.memory[DATA + 4] == b"ABCD"
    assert stage.work.errors == [(0x9000, "the VM has no memory there")]


@pytest.mark.parametrize("reply", [b"61", b"OK", b"xyzw"])
async def test_memory_that_makes_no_sense_is_an_error_of_the_handler(stage, reply):
    stage.stub.replies[b"m%x," % DATA] = reply
    async with stage.run() as stub:
        await stub.call(COPY, DATA)
        await stub.runs()
        await stub.stop(b"W00")
    assert [address for address, _ in stage.work.errors] == [DATA]


MTREE = """FlatView #0
 AS "I/O", root: io
  0000000000000000-000000000000ffff (prio 0, ram): other
FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
  0000000000000000-0000000000007fff (prio 0, ram): pc.ram
  0000000000008000-0000000000009fff (prio 0, ram): pc.ram @0000000000008000
  000000000000a000-000000000000afff (prio 0, rom): bios
  000000000000b000-000000000000bfff (prio 0, i/o): device
"""


@pytest.mark.parametrize(
    ("tells", "at", "size", "wrong"),
    [
        (False, 0x7FFF, 2, False),
        (False, 0x9FFF, 2, True),
        (False, 0xB000, 1, True),
        (True, 0x1000, 0x8000, False),
        (True, 0x1000, 0x9001, True),
        (True, 0xFFFF, 1, False),
    ],
)
async def test_a_write_where_there_is_no_ram_writes_nothing(stage, tells, at, size, wrong):
    """What the stub does not tell, or tells after a part was written, the monitor does."""
    stage.stub.texts["info mtree -f"] = MTREE
    if not tells:
        stage.stub.replies[b"mffffffff"] = b"00"
    stage.work.size = size
    async with stage.run() as stub:
        await stub.call(FILL, at)
        await stub.runs()
        assert any(packet.startswith(b"M") for packet in stub.said) != wrong
        await stub.stop(b"W00")
    assert stage.work.errors == [(at, "the VM has no memory there")] * wrong


async def test_without_a_monitor_all_memory_is_tried(stage):
    stage.stub.replies = {b"qRcmd": b"", b"mffffffff": b"00"}
    async with stage.run() as stub:
        await stub.call(COPY, DATA)
        await stub.runs()
        await stub.stop(b"W00")
    assert not stage.work.errors


# --- width -------------------------------------------------------------------------


CPU = "CPU#{}\nEAX=0\n{}LDT=0028 00002000 00000067 00008200 DPL=0 LDT\nGDT=     00003000 00000037\n"


@pytest.mark.parametrize(
    ("cs", "descriptor", "registers", "width"),
    [
        (0x08, 0x00AF9B000000FFFF, {}, 64),
        (0x23, 0x00CFFB000000FFFF, {}, 32),
        (0x0C, 0x00CFFB000000FFFF, {}, 32),
        (0x08, 0x00CF9B000000FFFF, {"efer": 0}, 32),
        (0x08, 0x000F9B000000FFFF, {"efer": 0}, 16),
        (0x08, 0, {"cr0": 0x10, "efer": 0}, 16),
    ],
)
async def test_the_code_segment_says_how_wide_a_trap_is(stage, cs, descriptor, registers, width):
    high = descriptor >> 32 if descriptor else 0x9B00
    loaded = f"CS ={cs:04x} 00000000 ffffffff {high:08x} DPL=0 CS32 [-RA]\n"
    stage.stub.texts["info registers -a"] = CPU.format(0, "") + CPU.format(1, loaded).replace(
        "3000", "4000"
    )
    place = (0x2000 if cs & 4 else 0x4000) + (cs & ~7)
    stage.stub.memory[place] = struct.pack("<Q", descriptor)
    magic = {"rbp": MAGIC, "rsi": 5, "r8": 0} if width != 64 else {}
    async with stage.run() as stub:
        for _ in range(2):
            await stub.call(ADD, 5, thread=2, cs=cs, **registers, **magic)
            await stub.runs()
        await stub.stop(b"W00")
    ring = 0 if registers.get("cr0") == 0x10 else cs & 3
    assert stage.work.where == ([] if width == 16 else [(1, SITE, width, ring)] * 2)


# --- #UD ---------------------------------------------------------------------------


async def test_the_undefined_instruction_of_a_user_is_answered_behind_it(stage):
    stage.options = f"ud-handler={HANDLER:#x}"
    pushed = struct.pack("<5Q", SITE, 0x33, 0x10246, 0x7FFF_0000, 0x2B)
    stage.stub.memory[STACK] = pushed
    async with stage.run() as stub:
        await stub.call(ADD, 5, rip=HANDLER, rsp=STACK)
        await stub.runs()
        assert stub.answer == (6, 0, SITE + 3)
        assert len(stub.written) == 148
        assert struct.unpack_from("<Q", stub.written, 56) == (0x7FFF_0000,)
        # Resume flag off: the instruction is done.
        assert struct.unpack_from("<III", stub.written, 136) == (0x246, 0x33, 0x2B)
        await stub.stop(b"W00")
    assert stage.work.where == [(0, SITE, 64, 3)]


@pytest.mark.parametrize(
    ("memory", "registers"),
    [
        ({SITE: b"\x0f\x0b".ljust(15, b"\x90")}, {}),
        ({SITE: b"\x0f\xa2".ljust(15, b"\x90")}, {}),
        ({}, {"efer": 0}),
        ({}, {"rsp": 0x9000}),
        ({}, {"rcx": MAGIC + 1}),
    ],
)
async def test_an_undefined_instruction_that_is_not_ours_is_the_guests(stage, memory, registers):
    stage.options = f"ud-handler={HANDLER:#x}"
    stage.stub.memory[STACK] = struct.pack("<5Q", SITE, 8, 0x246, 0x8000, 0x10)
    stage.stub.memory |= memory
    async with stage.run() as stub:
        await stub.call(ADD, 5, **{"rip": HANDLER, "rsp": STACK, **registers})
        await stub.runs()
        stepped = [b"z0,500000,1", b"vCont;s:p01.01", b"g", b"Z0,500000,1", b"c"]
        assert stub.said[-5:] == stepped
        await stub.stop(b"W00")
    assert not stage.outcomes
