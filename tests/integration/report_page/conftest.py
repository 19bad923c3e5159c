"""The recordings, their pages, and a browser."""

import pytest
from needs import needs
from playwright.sync_api import sync_playwright
from report_page_parts import CHROMIUM, HOSTILE, hostile, hundred_thousand, opened, record, write

from vmibridge.cli import main
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.traps import recorded_traps


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture
def page(browser, files):
    with opened(browser, files / "run.html") as page:
        yield page
