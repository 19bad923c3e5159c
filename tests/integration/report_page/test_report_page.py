"""The page of `vmibridge report`, in a real browser: what it tells, filters, one trap, the
timeline.
"""

import re

import pytest
from playwright.sync_api import expect
from report_page_parts import BIG, expect_shown, row

from vmibridge.bridge.outcome import OutcomeKind


def cells(page, table):
    """The cells of a table: the others by the first of each row."""
    rows = page.locator(f"{table} tbody tr")
    found = [rows.nth(at).locator("td").all_inner_texts() for at in range(rows.count())]
    return {first: rest for first, *rest in found}


def span_of(url):
    """From when to when its timeline shows, in nanoseconds; without an end where it shows all."""
    given = dict(part.split("=") for part in url.partition("#")[2].split("&"))
    return int(given.get("from", 0)), float(given.get("to", "inf"))


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
        assert "report_page_parts.py" in text
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
        begin = min(trap.time for trap in traps)
        # The last of the four, each of which shows half of what was shown before.
        shown = (max(trap.reply_time for trap in traps) - begin) / 2**4
        page.wait_for_url(
            lambda url: span_of(url)[1] - span_of(url)[0] < 1.5 * shown, timeout=60_000
        )
        low, high = span_of(page.url)
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
