"""Names that a guest may give: what leads elsewhere, or is read in two ways, is refused."""

import ntpath
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.handlers._file_names import MAX_PARTS, parse_name

HOSTILE = {
    "nothing": "",
    "absolute": "/etc/passwd",
    "empty part": "a//b",
    "ends with a slash": "a/",
    "dot": ".",
    "dot inside": "a/./b",
    "parent": "..",
    "parent inside": "a/../../b",
    "backslash": "a\\b",
    "backslash and parent": "..\\b",
    "network": "\\\\server\\share",
    "drive": "C:",
    "drive and path": "C:/Windows/win.ini",
    "stream": "a.txt:hidden",
    "device namespace": "//?/C:/a",
    "NUL": "a\0b",
    "line": "a\nb",
    "escape": "\x1b[31m",
    "delete": "a\x7f",
    "C1": "a\x9bb",
    "line separator": "a\u2028b",
    "right to left": "a\u202egnp.exe",
    "isolate": "\u2066a",
    "wildcard": "*.txt",
    "question": "a?",
    "quote": 'a"b',
    "pipe": "a|b",
    "redirection": "a>b",
    "lone surrogate": "a\udc80",
    "high surrogate": "\ud800",
    "CON": "CON",
    "nul": "nul",
    "with extension": "nul.txt",
    "with extensions": "Aux.tar.gz",
    "space before extension": "COM1 .log",
    "superscript": "com\u00b9",
    "superscript with extension": "LPT\u00b3.x",
    "console": "conin$",
    "clock": "CLOCK$",
    "in a folder": "a/prn/b",
    "device and space": "con ",
    "dot at the end": "a.",
    "dots at the end": "a...",
    "space at the end": "a ",
    "space at the beginning": " a",
    "folder with dot at the end": "a./b",
    "too many bytes": "a" * 256,
    "too many bytes in UTF-8": "\u00e4" * 128,
    "too many units in UTF-16": "\U0001f989" * 128,
    "too deep": "/".join("a" * (MAX_PARTS + 1)),
    "ours": ".vmibridge-00000000000000000000000000000000.part",
    "ours on a disk without cases": ".VMIBRIDGE-x",
    "ours in a folder": "a/.vmibridge-x",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_is_refused(name):
    with pytest.raises(ValueError):
        parse_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        ".profile",
        "..a",
        "a..b",
        "a b",
        "a/b/c.tar.gz",
        "console",
        "com",
        "com10",
        "com1x.txt",
        "xcon",
        "nul-1",
        "Gr\u00fc\u00dfe.txt",
        "\U0001f989.png",
        "a" * 255,
        "\u00e4" * 127,
        "/".join("a" * MAX_PARTS),
        "-rf",
        "~",
        "$HOME",
        "%TEMP%",
    ],
)
def test_any_other_name_is_taken_as_it_is(name):
    assert parse_name(name) == tuple(name.split("/"))


@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(
                ["..", ".", "/", "\\", ":", "a", "con", "nul", " ", ".", "\0", "\ud800", "\u202e"]
            ),
            max_size=12,
        ).map("".join),
    )
)
def test_no_name_that_is_taken_leads_elsewhere_on_linux_or_windows(name):
    try:
        parts = parse_name(name)
    except ValueError:
        return
    assert posixpath.normpath(posixpath.join("/folder", name)) == f"/folder/{name}"
    windows = ntpath.normpath(ntpath.join("C:\\folder", name))
    assert windows == "C:\\folder\\" + "\\".join(parts)
    for part in parts:
        assert part.encode()
        assert part == part.rstrip(" .")
        assert not getattr(ntpath, "isreserved", lambda _: False)(part)
