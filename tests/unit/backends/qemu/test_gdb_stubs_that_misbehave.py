"""The backend of a gdbstub, against stubs that hang up, say nothing, or say what they must not."""

import anyio
import pytest
from fake_gdbstub import ADD, DATA, HALTED, HANG_UP, MAGIC, SITE, VMCALL, WAIT, packet_of

from vmibridge import Bridge, BridgeServer
from vmibridge.backends import open_backend
from vmibridge.backends.qemu.gdb import backend as module
from vmibridge.backends.qemu.gdb import client as client_module
from vmibridge.backends.qemu.gdb import steps
from vmibridge.backends.qemu.gdb.client import ClientLostError, GdbClient, connect, reading
from vmibridge.backends.qemu.gdb.packets import encode
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio


# --- stubs that misbehave ----------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"!$T05thread:p01.01;#00", "lost"),
        (b"!garbage", "lost"),
        (b"OK", "lost"),
        (b"T05thread:;", "lost"),
    ],
)
async def test_a_stub_that_says_what_it_must_not_is_lost(stage, said, reason):
    async with stage.run() as stub:
        await stub.runs()
        await stub.stream.send(said[1:] if said[:1] == b"!" else encode(said))
    assert stage.ends == [(0, reason), (1, reason)]


@pytest.mark.parametrize(
    ("begin", "reply"), [(b"G", b"E22"), (b"g", b"E01"), (b"g", b"0011"), (b"G", b"what")]
)
async def test_registers_that_cannot_be_had_are_the_end(stage, begin, reply):
    async with stage.run() as stub:
        stub.replies[begin] = reply
        await stub.call(ADD)
    assert {reason for _, reason in stage.ends} == {"lost"}


@pytest.mark.parametrize("piece", [b"", b"$T05thr"])
async def test_a_stub_that_hangs_up_has_ended_unless_in_the_middle_of_a_packet(stage, piece):
    async with stage.run() as stub:
        await stub.runs()
        if piece:
            await stub.stream.send(piece)
        await stub.stream.aclose()
    assert {reason for _, reason in stage.ends} == {"lost" if piece else "halted"}


async def test_a_stub_that_hangs_up_in_a_trap_has_lost_its_vcpu(stage):
    async with stage.run() as stub:
        await stub.call(WAIT, thread=2)
        await stage.work.begun.wait()
        await stub.stream.aclose()
        while stage.server.summary.guest is None:
            await anyio.sleep(0.001)
        stage.work.end.set()
    assert stage.ends == [(0, "halted"), (1, "lost")]


async def test_pieces_of_a_packet_are_put_together(stage):
    async with stage.run() as stub:
        await stub.call(ADD, 1)
        await stub.runs()
        for byte in encode(b"T05thread:p01.01;"):
            await stub.stream.send(bytes((byte,)))
        stub.running = anyio.Event()
        await stub.runs()
        await stub.stop(b"W00")
    assert stage.outcomes == ["handled"] * 2


@pytest.mark.parametrize(
    ("begin", "when"), [(b"g", "has not replied"), (b"vCont", "does not stop")]
)
async def test_a_stub_that_goes_silent_is_lost(stage, begin, when, monkeypatch):
    # One limit is short in each case: on a busy machine another one would expire first.
    patience, stops = (0.1, 60) if begin == b"g" else (60, 0.1)
    monkeypatch.setattr(module, "_DETACH", 0.1)
    monkeypatch.setattr(steps, "_STEP", stops)
    monkeypatch.setattr(steps, "_STOP", stops)
    monkeypatch.setattr(client_module.GdbClient, "patience", patience)
    async with stage.run() as stub:
        stub.replies[begin] = []
        await stub.call(ADD, rcx=MAGIC if begin == b"g" else 0)
    assert {reason for _, reason in stage.ends} == {"lost"}
    assert all(when in detail for detail in stage.details)


@pytest.mark.parametrize(
    ("replies", "options", "match"),
    [
        ({b"Qqemu": b""}, "", "not QEMU's"),
        ({b"qSupported": b"PacketSize=1"}, "", "packets of 1 bytes"),
        ({b"qfThread": b"x"}, "", "not a list of threads"),
        ({b"qfThread": b"E01"}, "", "error 01"),
        ({b"qSupported": HANG_UP}, "", "closed the connection"),
        ({b"qSupported": b"qXfer:features:read+", b"qXfer": b"E00"}, "", "error 00"),
        ({b"qSupported": b"qXfer:features:read+", b"qXfer": b"m"}, "", "no end"),
        (
            {b"qSupported": b"qXfer:features:read+", b"qXfer": b'l<t><xi:include href="t"/></t>'},
            "",
            "too many parts",
        ),
        ({}, "&breakpoints=hardware&site=1&site=2&site=3&site=4", "4 hardware breakpoints"),
    ],
)
async def test_a_stub_that_cannot_be_served_is_told(stage, replies, options, match):
    stage.stub.replies = replies
    stage.options += options
    await stage.fails_to_open(match)


async def test_with_kvm_breakpoints_are_the_hardwares(stage):
    stage.stub.texts["info kvm"] = "kvm support: enabled\r\n"
    async with stage.run() as stub:
        await stub.stop(b"W00")
    assert b"Z1,401000,1" in stub.said


async def test_with_kvm_software_breakpoints_hide_the_code(stage):
    stage.stub.texts["info kvm"] = "kvm support: enabled\r\n"
    stage.options += "&breakpoints=software"
    async with stage.run() as stub:
        await stub.runs()
        stub.memory[SITE] = b"\xcc" + VMCALL[1:]
        await stub.call(ADD, 1)
        await stub.runs()
        await stub.stop(b"W00")
    assert b"Z0,401000,1" in stub.said
    assert stage.outcomes == ["handled"]


async def test_with_kvm_software_breakpoints_need_the_code(stage):
    stage.stub.texts["info kvm"] = "kvm support: enabled\r\n"
    stage.stub.unmapped.add(SITE)
    stage.options += "&breakpoints=software"
    await stage.fails_to_open("use breakpoints=hardware")


async def test_a_breakpoint_that_is_refused_ends_the_run(stage):
    stage.stub.replies[b"Z0"] = b"E22"
    async with stage.playing(), stage.backend() as backend:
        server = BridgeServer(backend, Bridge(stage.work))
        with pytest.raises(BackendError, match="no breakpoint at 0x401000: error 22"):
            async for _ in server.run():
                pass
    assert stage.stub.said[-1] == b"D;1"


async def test_the_answer_to_a_trap_that_a_reset_took_only_goes_on(stage):
    async with stage.run() as stub:
        await stub.call(WAIT)
        await stage.work.begun.wait()
        stage.opened.was_reset()
        stage.work.end.set()
        await stub.runs()
        assert stub.written is None
        await stub.stop(b"W00")
    assert stage.ends == HALTED


async def test_nobody_there(tmp_path):
    for where in (f"unix:{tmp_path / 'none'}", "tcp:127.0.0.1:1"):
        with pytest.raises(BackendError, match=r"No such file|refused"):
            await open_backend(f"qemu-gdb:{where}?site=1").__aenter__()


@pytest.mark.parametrize("status", ["shutdown", "internal-error"])
async def test_a_vm_that_cannot_go_on_is_refused_with_what_to_do(stage, status):
    stage.stub.texts["info status"] = f"VM status: paused ({status})\r\n"
    await stage.fails_to_open(f"status '{status}' and cannot go on: reset it by QMP")


@pytest.mark.parametrize("status", ["debug", "io-error"])
async def test_a_vm_that_was_left_in_a_state_is_told_and_goes_on(stage, status, caplog):
    stage.stub.texts["info status"] = f"VM status: paused ({status})\r\n"
    async with stage.run() as stub:
        await stub.call(ADD, 1)
        await stub.runs()
        await stub.stop(b"W00")
    assert stage.outcomes == ["handled"]
    assert f"'{status}'" in caplog.text


async def test_an_answer_that_met_other_registers_is_undone(stage, caplog):
    async with stage.run() as stub:
        await stub.call(WAIT, 1)
        await stage.work.begun.wait()
        stub.registers = packet_of({"rip": 0xFFF0, "rax": 77})
        stub.running = anyio.Event()
        stage.work.end.set()
        await stub.runs()
        assert stub.answer == (77, 0, 0xFFF0)
        await stub.stop(b"W00")
    assert "was taken out of a trap by another client" in caplog.text


async def test_a_command_that_is_dropped_because_the_vm_ran_is_made_up_for(stage):
    async with stage.run() as stub:
        await stub.call(ADD, 1)
        await stub.runs()
        stub.drops = True
        # The registers alone come: the guess of the code, or the probe, has paused the VM.
        await stub.call(ADD, 2)
        await stub.runs()
        assert not stub.drops
        await stub.call(ADD, 3)
        await stub.runs()
        assert stub.answer == (4, 0, SITE + 3)
        await stub.stop(b"W00")
    assert stage.outcomes == ["handled"] * 2


# --- the client by itself ----------------------------------------------------------


async def test_replies_that_were_not_waited_for_are_dropped(stage):
    """What nobody reads piles up, and then goes out."""
    async with stage.playing():
        client = GdbClient(await connect(f"unix:{stage.stub.path}"))
        async with reading(client):
            await client.shake_hands()
            with anyio.move_on_after(0):
                await client.ask(b"m7000,4")
            assert await client.ask(b"m7000,2") == b"6162"
            await client.write_memory(DATA, b"x" * 4_000_000)
            assert await client.read_memory(DATA, 2) == b"xx"
        client.close()
        with pytest.raises(ClientLostError, match="closed the connection"):
            await client.ask(b"g")


async def test_tcp(stage):
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)

        async def serve(stream):
            stage.stub.stream = stream
            async with stream:
                async for data in stream:
                    await stage.stub.take(data)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            with anyio.fail_after(60):
                async with open_backend(f"qemu-gdb:tcp:127.0.0.1:{port}?site=1"):
                    pass
            tasks.cancel_scope.cancel()
    assert stage.stub.said[-1] == b"D;1"
