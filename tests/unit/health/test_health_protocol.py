"""Question and answer of the health socket, as bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.health.protocol import MAX_ANSWER, MAX_ASK, AskReader, answer, encode_ask
from vmibridge.health.state import Health, Reason


def health_of(*reasons):
    health = Health()
    health.add(lambda: reasons)
    return health


@pytest.mark.parametrize("check", ["live", "started", "ready"])
def test_a_question_in_pieces_has_one_answer(check):
    reader, asked = AskReader(), encode_ask(check)
    health = health_of(Reason("server-unreachable", "gone"))
    for at in range(len(asked) - 1):
        assert answer(health, reader, asked[at : at + 1]) is None
    line, report, rest = answer(health, reader, asked[-1:]).split(b"\n")
    assert rest == b""
    verdict, _, told = line.partition(b" ")
    assert verdict == (b"fail" if check == "ready" else b"pass")
    assert json.loads(report)["check"] == check
    assert told.startswith((check.encode(), f"not {check}".encode()))


@pytest.mark.parametrize(
    "data",
    [
        b"\n", b"ready\n", b"GET / HTTP/1.1\r\n", b"{}\n", b'{"check":"alive"}\n',
        b"[" * MAX_ASK + b"\n", b'{"check":"re\xff"}\n', b"x" * (MAX_ASK + 1),
    ],
    ids=["empty", "word", "http", "none", "other", "deep", "bytes", "long"],
)  # fmt: skip
def test_what_is_no_question_is_told_so(data):
    told = answer(health_of(), AskReader(), data)
    assert told.startswith(b"fail malformed question: ")
    assert json.loads(told.split(b"\n")[1]).keys() == {"error"}


@given(st.binary(max_size=600), st.integers(1, 50))
def test_no_bytes_raise_or_are_kept_beyond_the_bound(data, step):
    reader = AskReader()
    for at in range(0, len(data), step):
        told = answer(health_of(), reader, data[at : at + step])
        if told is not None:
            assert told.startswith((b"pass ", b"fail "))
            return
    assert len(data) <= MAX_ASK


@given(st.lists(st.text(max_size=2000), max_size=40))
def test_an_answer_is_two_lines_and_bounded(texts):
    health = health_of(*(Reason("vm-failed", text) for text in texts))
    told = answer(health, AskReader(), encode_ask("ready"))
    assert len(told) < MAX_ANSWER
    assert len(told.decode().splitlines()) == 2
