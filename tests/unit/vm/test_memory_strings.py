"""Strings in guest memory: what stands before the NUL, and what need not be mapped behind it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_memory import (
    BEHIND,
    FIRST,
    FRAMES,
    PAGE,
    SECOND,
    THIRD,
    TOP,
    P,
    finish,
    laws,
    paged,
    refused,
    unpaged,
)

from vmibridge.vm.memory import MAX_ACCESS

# --- strings ------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raw", "limit", "text"),
    [
        pytest.param(b"hello\0world", 4096, "hello", id="ends at a NUL"),
        pytest.param(b"\0hello", 4096, "", id="may be empty"),
        pytest.param(b"hello\0world", 5, "hello", id="ends at the limit, NUL not included"),
        pytest.param(b"hello\0world", 3, "hel", id="ends at the limit"),
        pytest.param(b"hello\0world", 6, "hello", id="ends at a NUL that the limit includes"),
        pytest.param("grüße".encode() + b"\0", 4096, "grüße", id="is UTF-8"),
        pytest.param("grüße".encode() + b"\0", 3, "gr\ufffd", id="may be cut in a character"),
        pytest.param(b"a\xff\xc3(\0", 4096, "a\ufffd\ufffd(", id="may be no text at all"),
        pytest.param(b"\xed\xa0\x80\0", 4096, "\ufffd" * 3, id="has no surrogates"),
        pytest.param(b"\xf4\x90\x80\x80\0", 4096, "\ufffd" * 4, id="ends with Unicode"),
    ],
)
async def test_a_string(raw, limit, text):
    vmi, _ = paged({FRAMES[FIRST]: raw})
    assert await vmi.memory.read_string(FIRST, limit) == text


@pytest.mark.anyio
async def test_a_string_may_have_another_encoding():
    vmi, _ = paged({FRAMES[FIRST]: "grüße".encode("cp1252") + b"\x81\0"})
    assert await vmi.memory.read_string(FIRST, encoding="cp1252") == "grüße\ufffd"


@pytest.mark.anyio
async def test_a_string_without_nul_ends_at_the_limit():
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"a" * PAGE))
    for limit in (1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE):
        assert await vmi.memory.read_string(FIRST, limit) == "a" * limit
    with refused(BEHIND, "not mapped"):
        await vmi.memory.read_string(FIRST, 3 * PAGE + 1)


@pytest.mark.anyio
async def test_a_string_has_at_most_4096_bytes_unless_the_handler_asks_for_more():
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"a" * PAGE))
    assert await vmi.memory.read_string(FIRST) == "a" * 4096
    assert await vmi.memory.read_utf16(FIRST) == "\u6161" * 2048


@pytest.mark.anyio
async def test_a_string_may_cross_pages():
    vmi, _ = paged(
        {
            FRAMES[FIRST]: b"beg".rjust(PAGE, b"#"),
            FRAMES[SECOND]: b"-" * PAGE,
            FRAMES[THIRD]: b"end\0garbage",
        }
    )
    assert await vmi.memory.read_string(SECOND - 3, 5000) == "beg" + "-" * PAGE + "end"


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["", "x", "ends right before a page that is not mapped"])
async def test_what_lies_behind_the_end_of_a_string_need_not_be_mapped(text):
    raw = text.encode() + b"\0"
    vmi, _ = paged({FRAMES[THIRD]: raw.rjust(PAGE, b"#")})
    assert await vmi.memory.read_string(BEHIND - len(raw), 4096) == text
    wide = (text + "\0").encode("utf-16-le")
    vmi, _ = paged({FRAMES[THIRD]: wide.rjust(PAGE, b"#")})
    assert await vmi.memory.read_utf16(BEHIND - len(wide), 4096) == text


@pytest.mark.anyio
async def test_what_lies_behind_the_end_of_a_string_need_not_be_memory():
    # Without paging, and in large pages, the end of memory is within one page.
    vmi, _ = unpaged({0x8000: b"last words\0".rjust(PAGE)})
    assert await vmi.memory.read_string(0x9000 - 11, 4096) == "last words"
    vmi, _ = unpaged({0x8000: "last words\0".encode("utf-16-le").rjust(PAGE)})
    assert await vmi.memory.read_utf16(0x9000 - 22, 4096) == "last words"


@pytest.mark.anyio
async def test_what_lies_behind_the_end_of_a_string_need_not_be_an_address():
    last = TOP - PAGE
    vmi, _ = paged({0x5_0000: b"last words\0".rjust(PAGE)}, pages={last: 0x5_0000 | P})
    assert await vmi.memory.read_string(TOP - 11, 4096) == "last words"
    assert await vmi.memory.read_string(TOP - 11, 4) == "last"
    # One that has no end before it is no string of the guest's.
    await vmi.memory.write_physical(0x5_0000 + PAGE - 1, b"!")
    with refused(TOP, "beyond 64 bits"):
        await vmi.memory.read_string(TOP - 11, 4096)
    assert await vmi.memory.read_string(TOP - 11, 11) == "last words!"


@laws
@given(st.binary(max_size=64), st.integers(0, 80), st.integers(0, 40))
def test_a_string_is_what_stands_before_its_first_nul(raw, limit, before):
    address = SECOND - before
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"\x00" * PAGE))
    finish(vmi.memory.write(address, raw))
    expected = (raw + bytes(80))[:limit].split(b"\0")[0]
    assert finish(vmi.memory.read_string(address, limit)) == expected.decode("utf-8", "replace")


@pytest.mark.anyio
async def test_a_c_string_is_the_bytes_before_its_nul_and_never_cut_short():
    vmi, _ = paged({FRAMES[FIRST]: b"caf\xe9\0more", FRAMES[THIRD]: b"end\0".rjust(PAGE, b"#")})
    for limit in (4, 5, 4096):
        assert await vmi.memory.read_c_string(FIRST, limit) == b"caf\xe9"
    for limit in (0, 1, 3):
        with refused(FIRST, f"no NUL within {limit} bytes"):
            await vmi.memory.read_c_string(FIRST, limit)
    assert await vmi.memory.read_c_string(BEHIND - 4, 4096) == b"end"
    assert await vmi.memory.read_c_string(FIRST + 4, 0) == b""
    with refused(BEHIND, "not mapped"):
        await vmi.memory.read_c_string(BEHIND, 0)
    with refused(FIRST, f"{MAX_ACCESS} is the most"):
        await vmi.memory.read_c_string(FIRST, MAX_ACCESS)


# --- UTF-16 -------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raw", "limit", "text"),
    [
        pytest.param("hello\0world".encode("utf-16-le"), 4096, "hello", id="ends at a NUL"),
        pytest.param(b"\0\0h\0", 4096, "", id="may be empty"),
        pytest.param(b"h\0i\0!\0", 4, "hi", id="ends at the limit, which is in bytes"),
        pytest.param(b"h\0i\0!\0", 5, "hi", id="ends at the last whole character"),
        pytest.param(b"h\0i\0!\0", 1, "", id="has no half characters"),
        # Two zero bytes, of which one ends a character and one begins the next.
        pytest.param(b"a\0\0\1b\0\0\0", 4096, "aĀb", id="is not ended at an odd offset"),
        pytest.param(b"\1\0\0\2\0\3\0\0", 4096, "\1Ȁ\u0300", id="nor at a later one"),
        pytest.param(b"a\0\0\0\0b\0\0", 4096, "a", id="ends at the first even one"),
        pytest.param(b"=\xd8\0\xde\0\0", 4096, "\U0001f600", id="has surrogate pairs"),
        pytest.param(b"=\xd8\0\xde\0\0", 2, "\ufffd", id="may be cut in a pair"),
        pytest.param(b"a\0=\xd8b\0\0\0", 4096, "a\ufffdb", id="may have a lone high surrogate"),
        pytest.param(b"a\0\0\xdeb\0\0\0", 4096, "a\ufffdb", id="may have a lone low surrogate"),
        pytest.param(b"\xff\xfea\0\0\0", 4096, "\ufeffa", id="keeps a byte order mark"),
    ],
)
async def test_a_utf16_string(raw, limit, text):
    vmi, _ = paged({FRAMES[FIRST]: raw})
    assert await vmi.memory.read_utf16(FIRST, limit) == text


@pytest.mark.anyio
@pytest.mark.parametrize("before", range(1, 8))
async def test_a_utf16_string_may_cross_pages_at_any_byte(before):
    # Also between the two bytes of its last NUL, and of a character like U+0100.
    vmi, _ = paged(dict.fromkeys(FRAMES.values(), b"#" * PAGE))
    await vmi.memory.write(SECOND - before, "aĀb\0".encode("utf-16-le"))
    assert await vmi.memory.read_utf16(SECOND - before) == "aĀb"


@laws
@given(
    st.lists(st.sampled_from([0, 1, 0x41, 0xD8, 0xDC]) | st.integers(0, 255), max_size=40),
    st.integers(0, 60),
    st.integers(0, 30),
)
def test_a_utf16_string_is_what_stands_before_its_first_nul(raw, limit, before):
    address = SECOND - before
    vmi, _ = paged()
    finish(vmi.memory.write(address, bytes(raw)))
    whole = (bytes(raw) + bytes(60))[: limit & ~1]
    units = [whole[at : at + 2] for at in range(0, len(whole), 2)]
    text = b"".join(units[: [*units, b"\0\0"].index(b"\0\0")])
    assert finish(vmi.memory.read_utf16(address, limit)) == text.decode("utf-16-le", "replace")
