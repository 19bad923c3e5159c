"""Commands of GDB's remote protocol, and what their replies say."""

import pytest

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.commands import Exit, ReplyError, Stop, StubError


@pytest.mark.parametrize(
    ("reply", "stop"),
    [
        (b"T05thread:p01.02;", Stop(5, "p01.02")),
        (b"T05core:01;", Stop(5)),
        (b"T02thread:01;", Stop(2, "01")),
        (b"T0506:0*,;07:10;thread:p1a.2f;core:1;", Stop(5, "p1a.2f")),
        (b"S05", Stop(5)),
        (b"W00", Exit(0, killed=False)),
        (b"W2a;process:1", Exit(42, killed=False)),
        (b"X09", Exit(9, killed=True)),
    ],
)
def test_stop_replies(reply, stop):
    assert commands.is_stop(reply)
    assert commands.parse_stop(reply) == stop


@pytest.mark.parametrize("reply", [b"OK", b"E01", b"m1", b"", b"l", b"0000"])
def test_other_replies_do_not_begin_like_a_stop(reply):
    assert not commands.is_stop(reply)
    with pytest.raises(ReplyError):
        commands.parse_stop(reply)


@pytest.mark.parametrize(
    "reply", [b"T", b"Tzz", b"T05thread:;", b"T05thread:p1.;", b"T05thread:q1.1;"]
)
def test_a_stop_that_makes_no_sense(reply):
    with pytest.raises(ReplyError):
        commands.parse_stop(reply)


def test_threads():
    assert commands.parse_threads(b"mp01.01,p01.02") == ["p01.01", "p01.02"]
    assert commands.parse_threads(b"l") == []
    assert [commands.thread_number(name) for name in ("p01.02", "1f")] == [2, 31]
    for reply in (b"x", b"m", b"m1,", b"m" + b"1," * 5000 + b"1", b"m1\xff"):
        with pytest.raises(ReplyError):
            commands.parse_threads(reply)


def test_features():
    told = commands.parse_features(b"PacketSize=20020;qXfer:features:read+;QStartNoAckMode-")
    assert told == {
        "PacketSize": "20020",
        "qXfer:features:read": "+",
        "QStartNoAckMode": "-",
    }
    assert commands.packet_size(told) == 0x20000
    assert commands.packet_size({}) == 400
    for size in ("10", "x", "", "-1", "f" * 17):
        with pytest.raises(ReplyError):
            commands.packet_size({"PacketSize": size})


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (commands.read_memory(0x401136, 16), b"m401136,10"),
        (commands.write_memory(0x10, b"\x01\xff"), b"M10,2:01ff"),
        (commands.set_breakpoint(0x10021C, hardware=False), b"Z0,10021c,1"),
        (commands.remove_breakpoint(0x10021C, hardware=True), b"z1,10021c,1"),
        (commands.write_registers(b"\x00\x12"), b"G0012"),
        (commands.step("p01.02"), b"vCont;s:p01.02"),
        (commands.read_feature("target.xml", 16, 255), b"qXfer:features:read:target.xml:10,ff"),
        (commands.monitor("info kvm"), b"qRcmd,696e666f206b766d"),
    ],
)
def test_commands(command, data):
    assert command == data


@pytest.mark.parametrize(
    ("reply", "why"), [(b"E14", "14"), (b"E.no such thing", "no such thing"), (b"", "not know")]
)
def test_errors_of_the_stub(reply, why):
    for ask in (
        commands.check,
        commands.check_ok,
        commands.parse_threads,
        commands.parse_part,
        commands.parse_output,
    ):
        with pytest.raises(StubError, match=why):
            ask(reply)


def test_memory():
    assert commands.parse_memory(b"0Fa2", 2) == b"\x0f\xa2"
    for reply in (b"0f", b"0fa200", b"0xa2", b"\xff\xff00", b"OK"):
        with pytest.raises(ReplyError):
            commands.parse_memory(reply, 2)
    with pytest.raises(StubError):
        commands.parse_memory(b"E14", 2)


def test_parts_of_an_object_and_text_of_the_monitor():
    assert commands.parse_part(b"mabc") == (b"abc", False)
    assert commands.parse_part(b"l") == (b"", True)
    assert commands.parse_output(b"O6869") == "hi"
    assert commands.parse_output(b"OK") is None
    for ask in (commands.parse_part, commands.parse_output, commands.check_ok):
        with pytest.raises(ReplyError):
            ask(b"what")
