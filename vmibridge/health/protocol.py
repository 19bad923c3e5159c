r"""Question and answer of the health socket, as bytes. No I/O.

One question a connection, one answer, then the answering side hangs up:

    {"check": "ready"}\n
    fail not ready: server-unreachable: vm web: tcp:127.0.0.1:7000: Connection refused\n
    {"check": "ready", "ok": false, "live": true, ...}\n

The first line of an answer is its verdict, `pass` or `fail`, and one line for people; the second
one is the report as JSON. So who asks needs no decoder (`ask`), and a carrier over HTTP makes of
the verdict its status, and of a line its body.
"""

import msgspec

from vmibridge.health.state import Check, Health, Report

__all__ = ["MAX_ANSWER", "MAX_ASK", "Ask", "AskReader", "answer", "encode_ask", "encode_report"]

MAX_ASK = 256
"""Bytes of a question; JSON by hand may have blanks."""
MAX_ANSWER = 64 << 10
"""Bytes that an answer never has, with the bounds of a report."""


class Ask(msgspec.Struct, frozen=True):
    """A question."""

    check: Check


class _Malformed(msgspec.Struct, frozen=True):
    error: str


_ask_decoder = msgspec.json.Decoder(Ask)


class AskReader:
    """Takes the bytes of one peer."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Ask | None:
        """Take what came; gives the question when it is whole.

        Raises `ValueError` for what is none, and for one that is too long.
        """
        self._data += data[: MAX_ASK + 1 - len(self._data)]
        line, ended, _ = self._data.partition(b"\n")
        if not ended:
            if len(self._data) > MAX_ASK:
                raise ValueError(f"a question has at most {MAX_ASK} bytes")
            return None
        return _ask_decoder.decode(line)


def encode_ask(check: Check) -> bytes:
    """A question."""
    return msgspec.json.encode(Ask(check)) + b"\n"


def encode_report(report: Report) -> bytes:
    """The answer to a question."""
    verdict = "pass" if report.ok else "fail"
    return f"{verdict} {report.line}\n".encode() + msgspec.json.encode(report) + b"\n"


def answer(health: Health, reader: AskReader, data: bytes) -> bytes | None:
    """What to send to a peer that has sent `data`, before it is hung up on; `None`: more has to
    come. Raises nothing."""
    try:
        asked = reader.feed(data)
    except ValueError as error:
        why = str(error)[:200]
        return f"fail malformed question: {why}\n".encode() + msgspec.json.encode(_Malformed(why))
    return None if asked is None else encode_report(health.report(asked.check))
