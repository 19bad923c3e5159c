"""Debian's gdbserver as a stub that is not QEMU's: registers, memory and breakpoints.

A program of three calls is stopped at each; its cell is set to 1, and it ends with 1 + 2 * 3.
"""

import struct
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from children import opened, run
from needs import needs
from patience import HUNG

from vmibridge.backends import open_backend
from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import GdbClient, connect, reading
from vmibridge.backends.qemu.gdb.commands import Exit, Stop
from vmibridge.backends.qemu.gdb.packets import encode
from vmibridge.errors import BackendError
from vmibridge.vm.trap import RegisterWrites

pytestmark = pytest.mark.anyio
GUESTS = Path(__file__).parent / "guests"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("traps") / "traps"
    command = [needs("gcc"), "-O1", "-g0", "-no-pie", str(GUESTS / "traps.c"), "-o", str(path)]
    run(command, check=True)
    told = run([needs("nm"), path], check=True).stdout
    rows = [line.split() for line in told.splitlines()]
    symbols = {row[2]: int(row[0], 16) for row in rows if len(row) == 3 and row[1] in "TD"}
    return path, symbols


@asynccontextmanager
async def gdbserver(program):
    """Where it listens; it stopped the program before its first instruction."""
    command = [needs("gdbserver"), "--no-startup-with-shell", "127.0.0.1:0", str(program)]
    async with opened(command) as process:
        said = b""
        while b"Listening on port " not in said or not said.endswith(b"\n"):
            said += await process.stderr.receive()
        port = int(said.rpartition(b"port ")[2])
        yield f"tcp:127.0.0.1:{port}", process


async def test_registers_memory_and_breakpoints_of_a_program(program):
    path, symbols = program
    send, stops = anyio.create_memory_object_stream(10)
    with anyio.fail_after(HUNG):
        async with gdbserver(path) as (where, process):
            client = GdbClient(await connect(where))
            async with reading(client), send, stops:
                await client.shake_hands()
                assert client.features["QStartNoAckMode"] == "+"
                assert {"rax", "rip", "eflags", "cs", "fs_base"} <= client.layout.fields.keys()
                assert (client.layout.is_wide, client.layout.has_control) == (True, False)
                assert len(await client.threads()) == 1
                client.on_stop = send.send_nowait
                point = commands.set_breakpoint(symbols["trap"], hardware=False)
                commands.check_ok(await client.ask(point))
                for number in (1, 2, 3):
                    client.send(encode(commands.CONTINUE))
                    stop = await stops.receive()
                    assert isinstance(stop, Stop)
                    assert stop.signal == commands.SIGTRAP
                    data = commands.parse_hex((await client.ask(b"g"))[: 2 * client.layout.size])
                    registers, cs = client.layout.read(data)
                    assert (registers.rip, registers.rdi) == (symbols["trap"], number)
                    assert cs & 3 == 3
                    code = await client.read_memory(registers.rip, 4)
                    assert code[:1] != b"\xcc", "a breakpoint shows in memory"
                    if number == 1:
                        cell = await client.read_memory(symbols["cell"], 8)
                        assert struct.unpack("<Q", cell) == (0x1122334455667788,)
                        await client.write_memory(symbols["cell"], struct.pack("<Q", 1))
                    # The program goes on behind the breakpoint when that has been taken away.
                    away = commands.remove_breakpoint(symbols["trap"], hardware=False)
                    commands.check_ok(await client.ask(away))
                    client.send(encode(commands.step(stop.thread)))
                    assert (await stops.receive()).signal == commands.SIGTRAP
                    commands.check_ok(await client.ask(point))
                client.send(encode(commands.CONTINUE))
                assert await stops.receive() == Exit(42, killed=False)
            client.close()
            await process.wait()


async def test_a_register_that_is_written_is_what_the_program_goes_on_with(program):
    path, symbols = program
    send, stops = anyio.create_memory_object_stream(10)
    with anyio.fail_after(HUNG):
        async with gdbserver(path) as (where, _):
            client = GdbClient(await connect(where))
            async with reading(client), send, stops:
                await client.shake_hands()
                client.on_stop = send.send_nowait
                commands.check_ok(
                    await client.ask(commands.set_breakpoint(symbols["main"], hardware=False))
                )
                client.send(encode(commands.CONTINUE))
                await stops.receive()
                whole = commands.parse_hex(await client.ask(b"g"))
                registers, _ = client.layout.read(whole)
                writes = RegisterWrites(registers.rip, rax=7, rbx=None, rcx=0x55)
                after = client.layout.write(whole, writes)
                commands.check_ok(
                    await client.ask(commands.write_registers(after + whole[len(after) :]))
                )
                again, _ = client.layout.read(commands.parse_hex(await client.ask(b"g")))
                assert (again.rax, again.rbx, again.rcx) == (7, registers.rbx, 0x55)
                with pytest.raises(commands.StubError):
                    await client.read_memory(0x10, 4)
            client.close()


async def test_it_is_no_backend_because_it_has_no_physical_memory(program):
    path, symbols = program
    with anyio.fail_after(HUNG):
        async with gdbserver(path) as (where, _):
            backend = open_backend(f"qemu-gdb:{where}?site={symbols['trap']:#x}")
            with pytest.raises(BackendError, match="not QEMU's"):
                await backend.__aenter__()
