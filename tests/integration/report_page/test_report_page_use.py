"""The page of `vmibridge report`, in a real browser: addresses, keys, hostile and large
recordings, looks.
"""

import re

import pytest
from playwright.sync_api import expect
from report_page_parts import BIG, HOSTILE, expect_shown, opened, row


def shown(page):
    """How many traps the list says that it shows."""
    return int(page.locator("#count").inner_text().partition(" of ")[0].replace(",", ""))


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
