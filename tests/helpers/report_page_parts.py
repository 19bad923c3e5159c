"""Recordings for the page of `vmibridge report`, and what is read from the page."""

import math
import struct
from contextlib import contextmanager, suppress
from functools import partial

import anyio
import msgspec
from playwright.sync_api import expect

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    method,
)
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.registers import read_packet
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import (
    MEMORY,
    NOTE,
    REPLY,
    SESSION,
    TRAP,
    MemoryAccess,
    Note,
    RecordedHandler,
    RecordedMethod,
    Reply,
    Session,
)
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapReason

MAGIC = 0x1234_5678
BIG = 0xFEDC_BA98_7654_3210
MEMORY_OF_GUEST = {0x1000: b"hello <b>world</b>\0", 0x2000: bytes(range(256)) * 2}
# A browser on a machine with other work; no test waits for as long.
expect.set_options(timeout=60_000)

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    '"><iframe src="https://example.invalid/">',
    "{{data}}\u2028\u202e\0\x1b[31m<!--",
]


# --- recordings -------------------------------------------------------------------------


class Probe(BridgeHandler[object]):
    MAGIC = MAGIC
    REQUEST = 1
    name = "probe"

    def __init__(self):
        self.let_go = anyio.Event()

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(value1=packet.value1 + 1).with_output({"sum": packet.value1 + 1})

    @method(2)
    async def look(self, vmi, packet):
        text = await vmi.memory.read_string(0x1000)
        await vmi.memory.read(0x2000, 300)
        await vmi.memory.write(0x2000, b"written")
        with suppress(GuestMemoryError):
            await vmi.memory.read(0x9000, 8)
        return BridgeResponse(value1=len(text)).with_output(text)

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError("as it was told to")

    @method(4, soft_timeout=0.02)
    async def slow(self, vmi, packet):
        await self.let_go.wait()
        return BridgeResponse(value1=7)

    @method(5, timeout=0.05)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


def ask(code, value1=0, request=1, **more):
    return BridgePacket(MAGIC, request, code, value1, **more)


async def everything(probe, vm):
    for value in range(5):
        await vm.call(ask(1, value))
    await vm.call(ask(1, 0x10, value2=BIG, value4=1))
    await vm.call(ask(2), vcpu=1)
    await vm.call(ask(3), vcpu=1)
    await vm.call(ask(9))
    await vm.call(ask(1, request=0x77))
    await vm.call(ask(5), vcpu=1)
    waits = 0
    while (await vm.call(ask(4))).rax == Gate.WAIT:
        waits += 1
        if waits == 3:
            probe.let_go.set()


async def a_few(vm):
    for value in range(3):
        await vm.call(ask(1, value))
        await anyio.sleep(0.02)


def record(path):
    async def run():
        probes = {"red": Probe(), "blue": Probe()}
        async with (
            Recorder(path, redact=["0x0077:value2"]) as recorder,
            FakeGuest(partial(everything, probes["red"]), vm="red", memory=MEMORY_OF_GUEST) as red,
            FakeGuest(a_few, vm="blue") as blue,
        ):
            server = BridgeServer([red, blue], lambda vm: Bridge(probes[vm]), taps=[recorder])
            async for _ in server.run():
                pass

    anyio.run(run)


def write(path, messages):
    """A recording of (channel, time, message)."""
    writer = RecordingWriter(path, "test")
    chunk = ChunkBuilder()
    for channel, time, message in messages:
        if chunk.add(channel.id, time, message) >= 1 << 20:
            writer.add(chunk.pack())
            chunk = ChunkBuilder()
    writer.add(chunk.pack())
    writer.finish()


def trap(time, seq, kind=OutcomeKind.HANDLED, *, vm="vm", duration=1e-5, error=None, output=None):
    """The messages of a trap, which reads memory once."""
    event = TrapEvent(
        seq, TrapReason.VMCALL, Registers(rcx=MAGIC, rdx=0x10001, r8=seq), vm, seq % 4, length=3
    )
    yield TRAP, time, event
    yield MEMORY, time, MemoryAccess(vm, seq, 0x1000, 8, struct.pack("<Q", seq))
    packet, writes = read_packet(event), RegisterWrites(3, seq + 1)
    reply = Reply(
        vm, seq, event.vcpu, kind, packet, writes, "probe", error, output, duration=duration
    )
    yield REPLY, time + 20_000, reply


def hundred_thousand():
    yield SESSION, 0, Session("vm")
    for number in range(1, 100_001):
        kind = OutcomeKind.FAILED if number % 1000 == 0 else OutcomeKind.HANDLED
        yield from trap(number * 50_000, number, kind, output=f"output {number}")
    yield NOTE, 1 << 40, Note("end", "the end", "vm")


def hostile():
    methods = tuple(RecordedMethod(at, text) for at, text in enumerate(HOSTILE))
    for text in HOSTILE:
        yield (
            SESSION,
            0,
            Session(
                text,
                started=text,
                versions={text: text},
                loop=text,
                handlers=(
                    RecordedHandler(
                        text, text, 1, -1, methods=methods, source=text, sha256=text * 9
                    ),
                ),
            ),
        )
        yield NOTE, 0, Note("lost", text)
        for seq in (1, 2):
            duration = math.nan if seq == 1 else math.inf
            for channel, time, message in trap(seq << 40, seq, vm=text, output=text, error=text):
                changed = {"handler": text, "duration": duration} if channel is REPLY else {}
                yield channel, time, msgspec.structs.replace(message, **changed)
    # Numbers that are none, and lanes that there are not.
    event = TrapEvent(-1, TrapReason.CPUID, Registers(rax=-1), "vm", -(1 << 63), ip=-1, width=999)
    yield TRAP, (1 << 64) - 1, event
    yield MEMORY, 0, MemoryAccess("vm", -1, -1, -1, b"", error=HOSTILE[0])


@contextmanager
def opened(browser, file, **how):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **how)
    context.set_default_timeout(30_000)
    page = context.new_page()
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    expect(page.locator("#count")).to_contain_text("of")
    yield page
    context.close()
    assert told == []
    assert {*asked} == {file.as_uri()}


def expect_shown(page, number, of):
    expect(page.locator("#count")).to_have_text(f"{number:,} of {of:,} shown")


def row(page, place):
    """The row of a trap, by its place in the recording."""
    cell = page.locator(".place").get_by_text(str(place), exact=True)
    return page.locator("#list-body [role=row]").filter(has=cell)
