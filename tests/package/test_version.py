"""One version: of the package, of the changelog, and in the pages."""

import re
from datetime import date
from pathlib import Path

import vmibridge

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
SECTIONS = re.findall(r"^## \[([^\]]+)\](.*)$", CHANGELOG, re.MULTILINE)


def test_the_newest_dated_version_is_that_of_the_package() -> None:
    (unreleased, nothing), (newest, _), *_ = SECTIONS
    assert (unreleased, nothing) == ("Unreleased", "")
    assert newest == vmibridge.__version__


def test_versions_and_dates_go_down() -> None:
    versions = [tuple(map(int, version.split("."))) for version, _ in SECTIONS[1:]]
    dates = [date.fromisoformat(when.removeprefix(" - ")) for _, when in SECTIONS[1:]]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)


def test_a_page_that_prints_the_version_prints_this_one() -> None:
    shown = re.findall(
        r"^\$ vmibridge --version\n(.+)$", (ROOT / "docs/guide.md").read_text("utf-8"), re.MULTILINE
    )
    assert shown == [vmibridge.__version__]
