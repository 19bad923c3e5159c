"""The documents, their blocks, sections and tables, and how commands of theirs are run."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from children import run as run_child

ROOT = Path(__file__).parents[2]


SECONDS = 60


class Block(NamedTuple):
    """A fenced block, and the comment on the line before it."""

    line: int
    language: str
    note: str
    text: str


def blocks(document: Path) -> list[Block]:
    found, note, opened = [], "", None
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if opened is not None:
            if line != "```":
                opened[3].append(line)
                continue
            at, language, before, lines = opened
            found.append(Block(at, language, before, "\n".join([*lines, ""])))
            opened, note = None, ""
        elif line.startswith("```"):
            opened = (number, line.removeprefix("```"), note, [])
        else:
            comment = re.fullmatch(r"<!-- (.*) -->", line)
            note = comment[1] if comment else ""
    assert opened is None, f"{document.name}: a block is not closed"
    return found


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def section(document: str, heading: str) -> str:
    """What is below a heading, up to the next one of its level or above."""
    text = prose(ROOT / document)
    level = heading.partition(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}$\n(.*?)(?=^#{{1,{len(level)}}} |\Z)",
        text,
        re.DOTALL | re.MULTILINE,
    )
    assert found, f"{document} has no {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of all table rows, by the name (or names) in code in their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {
        code: row for row in cells for code in re.findall(r"`(?:await )?([\w-]+)[^`]*`", row[0])
    }


def run(command, folder, environment):
    """Its output is that of both streams, as on a terminal."""
    return run_child(
        command, seconds=SECONDS, cwd=folder, env=environment, stderr=subprocess.STDOUT
    )
