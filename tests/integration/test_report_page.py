"""The page of `vmibridge report`, in a real browser: Debian's Chromium without a window.

Each test fails when the page has told of any error, or asked for anything but itself.
"""

import math
import re
import struct
from contextlib import contextmanager, suppress

import anyio
import msgspec
import pytest
from needs import needs
from playwright.sync_api import expect, sync_playwright

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
from vmibridge.cli import main
from vmibridge.recording.file.chunk import ChunkBuilder
from vmibridge.recording.file.reader import RecordingReader
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
from vmibridge.recording.traps import recorded_traps
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
        await anyio.sleep(0.08)
        return BridgeResponse(value1=7)

    @method(5, timeout=0.05)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


def ask(code, value1=0, request=1, **more):
    return BridgePacket(MAGIC, request, code, value1, **more)


async def everything(vm):
    for value in range(5):
        await vm.call(ask(1, value))
    await vm.call(ask(1, 0x10, value2=BIG, value4=1))
    await vm.call(ask(2), vcpu=1)
    await vm.call(ask(3), vcpu=1)
    await vm.call(ask(9))
    await vm.call(ask(1, request=0x77))
    await vm.call(ask(5), vcpu=1)
    while (await vm.call(ask(4))).rax == Gate.WAIT:
        await anyio.sleep(0.01)


async def a_few(vm):
    for value in range(3):
        await vm.call(ask(1, value))
        await anyio.sleep(0.02)


def record(path):
    async def run():
        async with (
            Recorder(path, redact=["0x0077:value2"]) as recorder,
            FakeGuest(everything, vm="red", memory=MEMORY_OF_GUEST) as red,
            FakeGuest(a_few, vm="blue") as blue,
        ):
            server = BridgeServer([red, blue], lambda vm: Bridge(Probe()), taps=[recorder])
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


@pytest.fixture(scope="module")
def files(tmp_path_factory, uncounted):
    """Recordings and their reports. Made before there is a browser, whose loop is in the way."""
    folder = tmp_path_factory.mktemp("reports")
    record(folder / "run.mcap")
    write(folder / "hostile.mcap", hostile())
    limited = folder / "limited.html"
    title = f"Title {HOSTILE[0]}"
    assert main(["report", str(folder / "run.mcap"), "-o", str(folder / "run.html")]) == 0
    assert main(["report", str(folder / "hostile.mcap"), "--title", title]) == 0
    large = str(folder / "large.mcap")
    with uncounted():
        write(folder / "large.mcap", hundred_thousand())
        assert main(["report", large]) == 0
        assert main(["report", large, "--limit", "500", "-o", str(limited)]) == 0
    return folder


@pytest.fixture(scope="module")
def traps(files):
    with RecordingReader(files / "run.mcap") as reader:
        return list(recorded_traps(reader.messages()))


# --- the browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(files):
    path = needs("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM)
        yield browser
        browser.close()


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


@pytest.fixture
def page(browser, files):
    with opened(browser, files / "run.html") as page:
        yield page


def shown(page):
    """How many traps the list says that it shows."""
    return int(page.locator("#count").inner_text().partition(" of ")[0].replace(",", ""))


def expect_shown(page, number, of):
    expect(page.locator("#count")).to_have_text(f"{number:,} of {of:,} shown")


def row(page, place):
    """The row of a trap, by its place in the recording."""
    cell = page.locator(".place").get_by_text(str(place), exact=True)
    return page.locator("#list-body [role=row]").filter(has=cell)


def cells(page, table):
    """The cells of a table: the others by the first of each row."""
    rows = page.locator(f"{table} tbody tr")
    found = [rows.nth(at).locator("td").all_inner_texts() for at in range(rows.count())]
    return {first: rest for first, *rest in found}


def place_of(traps, code, kind):
    return next(
        at
        for at, trap in enumerate(traps, 1)
        if trap.packet.method == code and trap.reply.kind is kind
    )


# --- what it tells ----------------------------------------------------------------------


class TestOverview:
    def test_tells_the_totals(self, page, traps):
        tiles = dict(
            reversed(text.split("\n", 1)) for text in page.locator(".tile").all_inner_texts()
        )
        kinds = [trap.reply.kind.value for trap in traps]
        expected = {kind: str(kinds.count(kind)) for kind in set(kinds)}
        assert {name.strip(): number.strip() for name, number in tiles.items()} == {
            "all traps": str(len(traps)),
            **expected,
        }

    def test_tells_the_sessions(self, page):
        for handlers in page.locator("#sessions summary").all():
            handlers.click()
        text = page.locator("#sessions").inner_text()
        for told in ("red", "blue", "asyncio", "0x0077:value2", "0x12345678", "0x0001 add"):
            assert told in text
        assert f"{__name__.rpartition('.')[2]}.py" in text
        expect(page.locator("#problems")).to_be_hidden()

    def test_counts_by_handler_and_method(self, page, traps):
        rows = page.locator("#groups tbody tr").all_inner_texts()
        by_method = {tuple(text.split("\t")[:3]): text.split("\t") for text in rows}
        assert by_method["probe", "0x0001", "add"][3] == "9"
        assert by_method["(none)", "0x0077", "0x0001"][3] == "1"
        assert sum(int(cells[3]) for cells in by_method.values()) == len(traps)

    def test_shows_latencies_of_all_and_of_one_handler(self, page, traps):
        longest = page.locator("[data-quantile=max]")
        bars = page.locator("#histogram rect")

        def drawn():
            titles = page.locator("#histogram rect title").all_text_contents()
            return sum(int(title.split()[0]) for title in titles)

        assert re.fullmatch(r"[\d.]+ ms", longest.inner_text())
        assert drawn() == len(traps)
        page.locator("#latency-of").select_option(label="0x0077 (1)")
        assert bars.count() == 1
        assert drawn() == 1

    def test_has_the_slowest_first_and_opens_them(self, page, traps):
        slowest = max(range(len(traps)), key=lambda at: traps[at].reply.duration)
        first = page.locator("#slowest tbody tr").first
        assert first.locator("td").nth(1).inner_text() == str(slowest + 1)
        first.locator("button").click()
        expect(page.locator("#detail-title")).to_have_text(f"Trap {slowest + 1} of {len(traps)}")


class TestFilters:
    def test_by_handler_or_request(self, page, traps):
        page.locator("#filter-what").select_option("0x0077")
        expect_shown(page, 1, len(traps))
        page.locator("#filter-what").select_option("probe")
        expect_shown(page, sum(trap.reply.handler == "probe" for trap in traps), len(traps))

    def test_by_outcome(self, page, traps):
        page.locator("#filter-outcome").select_option("handled")
        handled = sum(trap.reply.kind is OutcomeKind.HANDLED for trap in traps)
        expect_shown(page, handled, len(traps))

    def test_by_a_click_on_a_total(self, page, traps):
        page.locator("[data-outcome=timeout]").click()
        expect_shown(page, 1, len(traps))
        expect(page.locator("#filter-outcome")).to_have_value("timeout")
        page.locator("[data-outcome=timeout]").click()
        expect_shown(page, len(traps), len(traps))

    def test_by_vm_and_by_vcpu(self, page, traps):
        page.locator("#filter-lane").select_option("vm:blue")
        expect_shown(page, 3, len(traps))
        page.locator("#filter-lane").select_option("red/1")
        expect_shown(page, 3, len(traps))

    @pytest.mark.parametrize(
        ("text", "number"),
        [("told to", 1), (f"{BIG:#X}", 1), ("HELLO <b>", 1), ('{"sum":3}', 2), ("no such", 0)],
    )
    def test_by_text(self, page, traps, text, number):
        page.locator("#filter-text").fill(text)
        expect_shown(page, number, len(traps))

    def test_by_duration(self, page, traps):
        page.locator("#filter-min").fill("30000")
        slow = sum(trap.reply.duration >= 0.03 for trap in traps)
        expect_shown(page, slow, len(traps))

    def test_by_what_the_timeline_shows(self, page, traps):
        page.locator("#filter-within").check()
        expect_shown(page, len(traps), len(traps))
        for _ in range(4):
            page.locator("#zoom-in").click()
        expect(page).to_have_url(re.compile("from="))
        expect(page.locator("#count")).not_to_have_text(re.compile(f"^{len(traps)} "))
        begin = min(trap.time for trap in traps)
        given = dict(part.split("=") for part in page.url.partition("#")[2].split("&"))
        low, high = int(given["from"]), int(given["to"])
        inside = [
            trap for trap in traps if trap.time - begin <= high and trap.reply_time - begin >= low
        ]
        expect_shown(page, len(inside), len(traps))

    def test_together_and_all_again(self, page, traps):
        page.locator("#filter-lane").select_option("red/1")
        page.locator("#filter-outcome").select_option("failed")
        expect_shown(page, 1, len(traps))
        page.get_by_role("button", name="Show all").click()
        expect_shown(page, len(traps), len(traps))
        expect(page.locator("#filter-lane")).to_have_value("")


class TestTrap:
    def test_has_all_values(self, page, traps):
        place = next(at for at, trap in enumerate(traps, 1) if trap.packet.value2 == BIG)
        row(page, place).click()
        assert cells(page, "#detail-packet") == {
            "magic": ["0x12345678", "305,419,896"],
            "request": ["0x0001", "1"],
            "method": ["0x0001", "1"],
            "value1": ["0x10", "16"],
            "value2": [f"{BIG:#x}", f"{BIG:,}"],
            "value3": ["0x0", "0"],
            "value4": ["0x1", "1"],
        }
        answer = cells(page, "#detail-answer")
        assert answer["value1"] == ["0x11", "17"]
        assert answer["value3"] == ["left alone", ""]
        expect(page.locator("#detail-output")).to_have_text('{"sum":17}')
        expect(page.locator(".registers")).to_contain_text(f"r9{BIG:016x}")

    def test_tells_an_error(self, page, traps):
        row(page, place_of(traps, 3, OutcomeKind.FAILED)).click()
        expect(page.locator("#detail-error")).to_have_text("RuntimeError: as it was told to")

    def test_dumps_the_memory_that_was_accessed(self, page, traps):
        row(page, place_of(traps, 2, OutcomeKind.HANDLED)).click()
        text = page.locator("#detail-body").inner_text()
        assert "68 65 6c 6c 6f 20 3c 62 3e" in text
        assert "hello <b>world" in text
        assert "000000002010  10 11 12" in text
        assert re.search(r"Read 3\d\d bytes at physical 0x2000, the first 256 shown", text)
        assert "Wrote 7 bytes at physical 0x2000" in text
        assert "failed, not mapped" in text

    def test_links_the_traps_of_one_request(self, page, traps):
        seqs = [trap.event.seq for trap in traps if trap.packet.method == 4]
        row(page, place_of(traps, 4, OutcomeKind.HANDLED)).click()
        links = page.locator("#detail-retries li")
        assert links.count() == len(seqs) > 2
        links.first.locator("button").click()
        expect(page.locator("#detail-body")).to_contain_text(f"trap number {seqs[0]} of the VM")
        expect(page.locator("#detail-body .outcome").first).to_have_text("waiting")
        expect(links.first).to_contain_text("(this one)")

    def test_steps_to_the_next_and_the_previous_of_the_list(self, page, traps):
        page.locator("#filter-lane").select_option("vm:blue")
        expect_shown(page, 3, len(traps))
        blue = [at for at, trap in enumerate(traps, 1) if trap.event.vm == "blue"]
        row(page, blue[0]).click()
        title = page.locator("#detail-title")
        expect(page.locator("#previous")).to_be_disabled()
        page.locator("#next").click()
        expect(title).to_have_text(f"Trap {blue[1]} of {len(traps)}")
        page.locator("#next").click()
        expect(page.locator("#next")).to_be_disabled()
        page.locator("#close").click()
        expect(page.locator("#detail")).to_be_hidden()


class TestTimeline:
    def at(self, page, traps, trap, vm_order=("blue/0", "red/0", "red/1")):
        """The middle of a trap on the canvas, when all is shown."""
        begin = min(each.time for each in traps)
        end = max(each.reply_time for each in traps) - begin
        gutter = page.evaluate(
            """() => {
                const paint = document.createElement("canvas").getContext("2d");
                paint.font = "12px system-ui, sans-serif";
                const widths = ["blue/0", "red/0"].map((t) => paint.measureText(t).width);
                return 12 + Math.max(20, ...widths);
            }"""
        )
        width = page.locator("#timeline").bounding_box()["width"]
        middle = (trap.time + trap.reply_time) / 2 - begin
        lane = vm_order.index(f"{trap.event.vm}/{trap.event.vcpu}")
        return {"x": gutter + middle / end * (width - gutter), "y": 24 + 26 * lane + 13}

    def test_tells_of_a_trap_and_opens_it(self, page, traps):
        place = place_of(traps, 5, OutcomeKind.TIMEOUT)
        point = self.at(page, traps, traps[place - 1])
        page.locator("#timeline").hover(position=point)
        expect(page.locator("#tip")).to_contain_text(f"Trap {place} of red/1: timeout")
        page.locator("#timeline").click(position=point)
        expect(page.locator("#detail-title")).to_have_text(f"Trap {place} of {len(traps)}")

    def test_zooms_by_dragging_the_wheel_and_keys(self, page, traps):
        timeline = page.locator("#timeline")
        timeline.scroll_into_view_if_needed()
        box = timeline.bounding_box()
        y = box["y"] + 40

        def span():
            expect(page).to_have_url(re.compile("from="))
            given = dict(part.split("=") for part in page.url.partition("#")[2].split("&"))
            return int(given["to"]) - int(given["from"])

        page.mouse.move(box["x"] + 400, y)
        page.mouse.down()
        page.mouse.move(box["x"] + 700, y)
        page.mouse.up()
        dragged = span()
        page.mouse.wheel(0, -300)
        expect(page).not_to_have_url(page.url)
        assert span() < dragged
        timeline.focus()
        page.keyboard.press("0")
        expect(page).not_to_have_url(re.compile("from="))


class TestAddress:
    def test_restores_the_view(self, page, traps):
        page.locator("#filter-outcome").select_option("handled")
        page.locator("#filter-lane").select_option("vm:red")
        page.locator("#filter-text").fill("sum")
        expect_shown(page, 6, len(traps))
        place = next(at for at, trap in enumerate(traps, 1) if trap.packet.value2 == BIG)
        row(page, place).click()
        expect(page.locator("#detail")).to_be_visible()
        shared = page.url
        page.goto("about:blank")
        page.goto(shared)
        expect(page.locator("#detail-title")).to_have_text(f"Trap {place} of {len(traps)}")
        expect_shown(page, 6, len(traps))
        expect(page.locator("#filter-text")).to_have_value("sum")
        page.locator("#close").click()
        expect(page).not_to_have_url(re.compile("trap="))

    def test_is_taken_back_by_the_browser(self, page, traps):
        row(page, 2).click()
        expect(page.locator("#detail")).to_be_visible()
        page.go_back()
        expect(page.locator("#detail")).to_be_hidden()

    @pytest.mark.parametrize(
        "hash_", ["#trap=99999", "#trap=x&from=9&to=1", "#min=-1&lane=%00&what=%", "#%E0%A4%A"]
    )
    def test_that_makes_no_sense_does_no_harm(self, browser, files, traps, hash_):
        with opened(browser, files / "run.html") as page:
            page.evaluate("(hash) => { location.hash = hash; }", hash_)
            expect(page.locator("#detail")).to_be_hidden()
            assert shown(page) in (0, len(traps))


class TestKeyboard:
    def test_moves_in_the_list_and_opens(self, page, traps):
        page.locator("#list").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        expect(page.locator("#detail-title")).to_have_text(f"Trap 2 of {len(traps)}")
        page.keyboard.press("Escape")
        expect(page.locator("#detail")).to_be_hidden()
        expect(page.locator("#list")).to_be_focused()
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        expect(page.locator("#detail-title")).to_have_text(f"Trap {len(traps)} of {len(traps)}")

    def test_reaches_every_control(self, page):
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        assert reached >= {
            *("timeline", "zoom-in", "latency-of", "list"),
            *("filter-what", "filter-outcome", "filter-lane", "filter-text", "filter-min"),
        }


class TestHostileRecording:
    def test_runs_nothing_and_shows_it_as_text(self, browser, files):
        with opened(browser, files / "hostile.html") as page:
            assert page.title() == f"Title {HOSTILE[0]}"
            for text in HOSTILE[:5]:
                page.locator("#filter-what").select_option(text)
                expect_shown(page, 2, 2 * len(HOSTILE) + 1)
                page.locator("#list-body [role=row]").first.click()
                expect(page.locator("#detail-output")).to_have_text(text)
                expect(page.locator("#detail-error")).to_have_text(text)
                page.locator("#close").click()
                expect(page.locator("#detail")).to_be_hidden()
            assert page.locator("img, iframe, object, a, link").count() == 0
            assert page.locator("script").count() == 6
            assert "src=x" in page.locator("#problem-list").inner_text()

    def test_may_have_numbers_that_are_none(self, browser, files):
        with opened(browser, files / "hostile.html") as page:
            page.locator("#filter-outcome").select_option("none")
            page.locator("#list-body [role=row]").first.click()
            text = page.locator("#detail-body").inner_text()
            assert "ffffffffffffffff" in text
            assert "no reply" in text


class TestLargeRecording:
    def test_opens_filters_and_scrolls(self, browser, files):
        with opened(browser, files / "large.html") as page:
            expect_shown(page, 100_000, 100_000)
            assert page.locator("#list-body [role=row]").count() < 100
            page.locator("#filter-outcome").select_option("failed")
            expect_shown(page, 100, 100_000)
            page.locator("#filter-outcome").select_option("")
            page.locator("#filter-text").fill("output 77777")
            expect_shown(page, 1, 100_000)
            page.locator("#filter-text").fill("")
            expect_shown(page, 100_000, 100_000)
            page.locator("#list").focus()
            page.keyboard.press("End")
            page.keyboard.press("Enter")
            expect(page.locator("#detail-title")).to_have_text("Trap 100000 of 100,000")
            expect(page.locator("#detail-output")).to_have_text("output 100000")

    def test_beyond_the_limit_is_counted_and_its_failures_are_shown(self, browser, files):
        with opened(browser, files / "limited.html") as page:
            tile = page.locator("[data-outcome=handled]")
            expect(tile).to_contain_text("99,900")
            expect(page.locator("#shown")).to_contain_text("the first 500 and")
            expect_shown(page, 600, 600)
            page.locator("#filter-outcome").select_option("failed")
            expect_shown(page, 100, 600)
            row(page, 1000).click()
            expect(page.locator("#detail-title")).to_have_text("Trap 1000 of 100,000")


class TestAppearance:
    @pytest.mark.parametrize("width", [1280, 800, 480])
    def test_nothing_is_wider_than_the_page(self, browser, files, width):
        with opened(browser, files / "run.html") as page:
            page.set_viewport_size({"width": width, "height": 800})
            row(page, 1).click()
            wide = "document.documentElement.scrollWidth - innerWidth"
            assert page.evaluate(wide) <= 0
            assert (
                page.evaluate("document.getElementById('detail').getBoundingClientRect().left") >= 0
            )

    def test_follows_the_choice_of_light_and_dark(self, browser, files):
        grounds = set()
        for scheme in ("light", "dark"):
            with opened(browser, files / "run.html", color_scheme=scheme) as page:
                grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2
