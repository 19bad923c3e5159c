"""The backend of a gdbstub, against a stub that is played here, and at times misbehaves."""

import struct
from contextlib import asynccontextmanager, suppress

import anyio
import pytest

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, GuestMemoryError
from vmibridge.backends import open_backend
from vmibridge.backends.qemu.gdb import backend as module
from vmibridge.backends.qemu.gdb import client as client_module
from vmibridge.backends.qemu.gdb import steps
from vmibridge.backends.qemu.gdb.client import ClientLostError, GdbClient, connect, reading
from vmibridge.backends.qemu.gdb.packets import PacketReader, encode
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio
MAGIC, SITE, HANDLER, STACK, DATA = 0x1234_5678, 0x40_1000, 0x50_0000, 0x60_0000, 0x7000
ADD, WAIT, COPY, FILL = 1, 2, 3, 4
VMCALL = b"\x0f\x01\xc1" + b"\x90" * 12
LONG_MODE = {"cr0": 0x8000_0011, "cr4": 0x20, "efer": 0x500}
NAMES = [
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{number}" for number in range(8, 16)),
]
HANG_UP = object()


def packet_of(registers):
    general = [registers.get(name, 0) for name in NAMES]
    head = struct.pack("<17Q", *general, registers["rip"])
    segments = struct.pack("<7I", 0x202, registers.get("cs", 8), 16, 0, 0, 0, 0)
    control = [registers.get(name, 0) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")]
    return head + segments + bytes(24) + struct.pack("<6Q", *control) + bytes(372)


class Connection:
    """A stream whose bytes go out as they are sent; one of anyio's may wake up twice on uvloop."""

    def __init__(self, stream):
        self.stream = stream
        self.socket = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        self.aclose = stream.aclose

    async def receive(self):
        await anyio.wait_readable(self.socket)
        data = self.socket.recv(1 << 16)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, data):
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self.socket)


class FakeStub:
    """A QEMU's gdbstub with one or more vCPUs, which stops when it is told to."""

    def __init__(self, path):
        self.path = str(path)
        self.said = []
        """The commands, without the probes."""
        self.memory = {SITE: VMCALL, DATA: b"abcd"}
        self.unmapped = {0x9000}
        self.registers = packet_of({"rip": SITE, **LONG_MODE})
        self.threads = b"mp01.01,p01.02"
        self.replies = {}
        self.texts = {"info mtree -f": "", "info kvm": "kvm support: disabled\r\n"}
        self.running = anyio.Event()
        self.written = None
        self.drops = False
        self.packets = PacketReader()

    async def serve(self, *, task_status):
        listener = await anyio.create_unix_listener(self.path)
        async with listener:
            task_status.started()
            async with await listener.accept() as stream:
                self.stream = Connection(stream)
                with suppress(anyio.EndOfStream, anyio.ClosedResourceError, OSError, ValueError):
                    while True:
                        await self.take(await self.stream.receive())

    async def take(self, data):
        self.packets.feed(data.replace(b"\x03", b""))
        while (packet := self.packets.next()) is not None:
            if self.drops:
                # As QEMU does with what comes while the VM runs.
                self.drops = False
                continue
            if packet != b"qC":
                self.said.append(packet)
            await self.stream.send(b"+")
            for reply in self.reply(packet):
                if reply is HANG_UP:
                    await self.stream.aclose()
                    return
                await self.stream.send(reply if reply[:1] == b"!" else encode(reply))

    def reply(self, packet):
        for begin, reply in self.replies.items():
            if packet.startswith(begin):
                return reply if isinstance(reply, list) else [reply]
        if packet == b"c":
            self.running.set()
            return []
        if packet.startswith(b"vCont;s"):
            return [b"T05thread:p01.01;"]
        if packet.startswith(b"G"):
            self.written = bytes.fromhex(packet[1:].decode())
        if packet.startswith(b"qRcmd,"):
            text = self.texts.get(bytes.fromhex(packet[6:].decode()).decode(), "")
            half = len(text) // 2
            parts = [part for part in (text[:half], text[half:]) if part]
            return [*(b"O" + part.encode().hex().encode() for part in parts), b"OK"]
        if packet.startswith(b"m"):
            at, size = (int(part, 16) for part in packet[1:].split(b","))
            return [self.read(at, size)]
        if packet.startswith(b"M"):
            place, _, data = packet[1:].partition(b":")
            self.write(int(place.split(b",")[0], 16), bytes.fromhex(data.decode()))
        known = {
            b"qSupported": b"PacketSize=1000;vContSupported+",
            b"?": b"T05thread:p01.01;",
            b"qC": b"QCp01.01",
            b"qfThreadInfo": self.threads,
            b"qsThreadInfo": b"l",
            b"g": self.registers.hex().encode(),
        }
        for begin, answer in known.items():
            if packet.startswith(begin):
                return [answer]
        return [b"OK"]

    def write(self, at, data):
        for start, before in self.memory.items():
            if start <= at < start + len(before):
                offset = at - start
                self.memory[start] = before[:offset] + data + before[offset + len(data) :]
                return
        self.memory[at] = data

    def read(self, at, size):
        if at in self.unmapped or at >= 1 << 51:
            return b"E14"
        found = bytearray(size)
        for start, data in self.memory.items():
            for index, byte in enumerate(data, start - at):
                if 0 <= index < size:
                    found[index] = byte
        return found.hex().encode()

    async def stop(self, reply=b"T05thread:p01.01;", **registers):
        """The VM runs; it stops at the site, and so on."""
        await self.runs()
        self.running = anyio.Event()
        if registers:
            self.registers = packet_of({**LONG_MODE, "rip": SITE, **registers})
        await self.stream.send(reply if reply[:1] == b"!" else encode(reply))

    async def call(self, code, value=0, thread=1, **registers):
        what = {"rcx": MAGIC, "rdx": 1 | code << 16, "r8": value, **registers}
        await self.stop(b"T05thread:p01.%02x;" % thread, **what)

    async def runs(self):
        await self.running.wait()

    @property
    def answer(self):
        """RAX, RBX and RIP as they were written last."""
        return (
            *struct.unpack_from("<2Q", self.written),
            *struct.unpack_from("<Q", self.written, 128),
        )


class Work(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.begun, self.end = anyio.Event(), anyio.Event()
        self.where, self.errors = [], []
        self.size = 1

    async def handle(self, vmi, packet):
        self.where.append((vmi.vcpu, vmi.event.ip, vmi.event.width, vmi.event.ring))
        try:
            if packet.method == WAIT:
                self.begun.set()
                await self.end.wait()
            elif packet.method == COPY:
                data = await vmi.memory.read_physical(packet.value1, 4)
                await vmi.memory.write_physical(packet.value1 + 4, data.upper())
            elif packet.method == FILL:
                await vmi.memory.write_physical(packet.value1, bytes(self.size))
        except GuestMemoryError as error:
            self.errors.append((error.address, error.reason))
        return BridgeResponse(packet.value1 + 1, len(self.errors))


class Stage:
    """A server that runs in a block, which plays the guest."""

    def __init__(self, path):
        self.stub, self.work = FakeStub(path), Work()
        self.options = f"site={SITE:#x}"

    @asynccontextmanager
    async def playing(self):
        with anyio.fail_after(60):
            async with anyio.create_task_group() as outside:
                await outside.start(self.stub.serve)
                yield self.stub
                outside.cancel_scope.cancel()

    @asynccontextmanager
    async def serving(self):
        async with self.backend() as self.opened, anyio.create_task_group() as tasks:
            self.server = BridgeServer(self.opened, Bridge(self.work), timeout=60)
            tasks.start_soon(self.consume)
            yield

    @asynccontextmanager
    async def run(self):
        async with self.playing() as stub, self.serving():
            yield stub
        self.ends = [(end.vcpu, end.reason) for end in self.server.summary.guest.vcpus]
        self.details = {end.detail for end in self.server.summary.guest.vcpus}

    async def consume(self):
        self.outcomes = [outcome.kind.value async for outcome in self.server.run()]

    async def fails_to_open(self, match):
        async with self.playing():
            with pytest.raises(BackendError, match=match):
                await self.backend().__aenter__()

    def backend(self):
        return open_backend(f"qemu-gdb:unix:{self.stub.path}?{self.options}")


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "s")


HALTED = [(0, "halted"), (1, "halted")]


async def test_a_trap_is_a_read_and_its_answer_a_write_behind_a_look(stage):
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
async def test_a_site_without_a_trap_instruction_is_stepped_over_and_told(stage, code, caplog):
    stage.stub.memory[SITE] = code
    async with stage.run() as stub:
        for _ in range(3):
            await stub.call(ADD)
        await stub.stop(b"W00")
    assert not stage.outcomes
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
                        await stub.stream.send(
                            encode(b"W00" if end == "exit" else b"T05thread:p01.01;")
                        )
    # What goes on is the detaching's.
    lets_go = [b"Z0,401000,1", b"c", b"Hgp0.0", b"z0,401000,1"]
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
        assert stub.said[-4:] == [b"z0,500000,1", b"vCont;s:p01.01", b"Z0,500000,1", b"c"]
        await stub.stop(b"W00")
    assert not stage.outcomes


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
        ({b"qfThread": b"x"}, "", "no list of threads"),
        ({b"qfThread": b"E01"}, "", "error 01"),
        ({b"qSupported": HANG_UP}, "", "hung up"),
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
    assert "was taken out of a trap by somebody else" in caplog.text


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
        with pytest.raises(ClientLostError, match="hung up"):
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
