"""The page: its template, style and scripts with the data of one recording in between.

Of the template nothing is filled in but the title, which is escaped, and what this module
makes: hashes, the package's own style and scripts, and base64.
"""

import base64
import hashlib
import re
import zlib
from collections.abc import Iterator
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import msgspec

from vmibridge.recording.report.rows import Rows

# In this order: each uses what stands above it.
_SCRIPTS = ("data.js", "summary.js", "timeline.js", "detail.js", "list.js", "page.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_GZIP = zlib.MAX_WBITS | 16


def render(facts: dict[str, Any], rows: Rows, title: str | None = None) -> bytes:
    """The whole page."""
    title = title or f"Report of {facts['file']}"
    facts = {**facts, "title": title, "version": version("vmibridge")}
    style = _file("page.css")
    scripts = [_file(name) for name in _SCRIPTS]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none';"
        f" style-src {_hashes([style])}; script-src {_hashes(scripts)}"
    )
    parts = {
        "title": escape(title),
        "policy": policy,
        "style": style,
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "data": base64.b64encode(_packed(facts, rows)).decode(),
    }
    # In one go, so that what is put in is not searched for places.
    page = _PLACE.sub(lambda place: parts[place[1]], _file("page.html"))
    return page.encode(errors="replace")


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _hashes(texts: list[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _packed(facts: dict[str, Any], rows: Rows) -> bytes:
    """Facts and rows as JSON, in gzip."""
    packer = zlib.compressobj(6, wbits=_GZIP)
    packed = [packer.compress(part) for part in _json(facts, rows)]
    return b"".join([*packed, packer.flush()])


def _json(facts: dict[str, Any], rows: Rows) -> Iterator[bytes]:
    # Column by column: all of them as one document would be several times the page.
    encode = msgspec.json.Encoder().encode
    yield b'{"facts":' + encode(facts) + b',"columns":{'
    for number, (name, column) in enumerate(rows.columns()):
        yield (b"," if number else b"") + encode(name) + b":" + encode(column)
    yield b"}}"
