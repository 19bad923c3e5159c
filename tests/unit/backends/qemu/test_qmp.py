"""QMP: the protocol over bytes, and a connection to a monitor that is played here."""

import socket

import anyio
import msgspec
import pytest
from anyio.abc import UNIXSocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.backends.qemu import qmp as module
from vmibridge.backends.qemu.qmp import Qmp, QmpEvent, QmpLines, QmpReply
from vmibridge.errors import QmpError

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "x"},'
    b' "capabilities": ["oob"]}}\r\n'
)
EVENT = (
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESET", "data": {"guest": true}}\n'
)
RETURN = b'{"return": {"status": "running"}, "id": 7}\n'
ERROR = b'{"id": 8, "error": {"class": "GenericError", "desc": "no such thing"}}\n'


class Status(msgspec.Struct):
    status: str


@given(st.sets(st.integers(0, len(GREETING + EVENT + RETURN + ERROR))))
def test_lines_come_whole_however_the_stream_is_cut(cuts):
    stream, lines, found = GREETING + EVENT + RETURN + ERROR, QmpLines(), []
    ends = sorted(cuts)
    for start, end in zip([0, *ends], [*ends, len(stream)], strict=True):
        found += lines.feed(stream[start:end])
    event, returned, error = found
    assert lines.version == (11, 1, 3)
    assert (event.event, bytes(event.data)) == ("RESET", b'{"guest": true}')
    assert (returned.id, bytes(returned.result)) == (7, b'{"status": "running"}')
    assert error == QmpReply(8, error="no such thing")


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"return": {}}\n',
        b'{"id": 1}\n',
        b'{"id": "one", "return": {}}\n',
        b'{"event": 1}\n',
        b'{"QMP": {}}\n',
        b"\xff\xff\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_no_qmp_is_one_error(line):
    with pytest.raises(QmpError, match=r"QEMU sent (invalid QMP|neither a reply)"):
        QmpLines().feed(line)


def test_a_line_has_a_limit(monkeypatch):
    monkeypatch.setattr(module, "_MAX_LINE", 100)
    lines = QmpLines()
    assert lines.feed(b" " * 100) == []
    with pytest.raises(QmpError, match="a line of more than 100 bytes"):
        lines.feed(b" ")


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_one_error(data):
    try:
        for message in QmpLines().feed(data + b"\n"):
            assert isinstance(message, QmpEvent | QmpReply)
    except QmpError:
        pass


class FakeMonitor:
    """The other end of a monitor's connection."""

    def __init__(self, stream):
        self.stream, self.lines = stream, BufferedByteReceiveStream(stream)
        self.greeted = anyio.Event()

    async def command(self):
        return msgspec.json.decode(await self.lines.receive_until(b"\n", 4096))

    async def greet(self):
        await self.stream.send(GREETING)
        assert await self.command() == {"execute": "qmp_capabilities", "arguments": {}, "id": 0}
        await self.stream.send(EVENT + b'{"return": {}, "id": 0}\n')
        self.greeted.set()


@pytest.fixture
async def ends():
    ours, theirs = socket.socketpair()
    stream = await UNIXSocketStream.from_socket(theirs)
    async with stream:
        ours.setblocking(False)
        yield Qmp(ours), FakeMonitor(stream)
        ours.close()


@pytest.mark.anyio
async def test_a_command_has_its_result(ends):
    qmp, monitor = ends
    found = []

    async def ask():
        async with qmp:
            assert qmp.version == (11, 1, 3)
            found.append(await qmp.execute("query-status", Status))
            found.append(await qmp.execute("device_add", id="a", bus_name="b"))
            with pytest.raises(QmpError, match=r"^nonsense: no such thing$"):
                await qmp.execute("nonsense")
            with pytest.raises(QmpError, match="another result than expected"):
                await qmp.execute("query-status", Status)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await monitor.greet()
        assert await monitor.command() == {"execute": "query-status", "arguments": {}, "id": 1}
        await monitor.stream.send(b'{"return": {"status": "paused"}, "id": 1}\n')
        assert (await monitor.command())["arguments"] == {"id": "a", "bus-name": "b"}
        await monitor.stream.send(b'{"return": {}, "id": 2}\n')
        await monitor.command()
        await monitor.stream.send(b'{"id": 3, "error": {"class": "x", "desc": "no such thing"}}\n')
        await monitor.command()
        await monitor.stream.send(b'{"return": [], "id": 4}\n')
    assert found == [Status("paused"), None]


@pytest.mark.anyio
async def test_events_are_for_who_asked_for_them(ends):
    qmp, monitor = ends
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(monitor.greet)
        async with qmp, qmp.events("SHUTDOWN") as some, qmp.events() as every:
            await monitor.greeted.wait()
            await monitor.stream.send(EVENT + b'{"event": "SHUTDOWN"}\n')
            assert (await some.receive()).event == "SHUTDOWN"
            assert [(await every.receive()).event for _ in range(2)] == ["RESET", "SHUTDOWN"]
            await monitor.stream.aclose()
            with pytest.raises(anyio.EndOfStream):
                await some.receive()
            async with qmp.events() as later:
                with pytest.raises(anyio.EndOfStream):
                    await later.receive()


@pytest.mark.anyio
async def test_events_that_nobody_takes_are_dropped(ends, caplog):
    qmp, monitor = ends
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(monitor.greet)
        async with qmp, qmp.events() as events:
            await monitor.greeted.wait()
            await monitor.stream.send(b'{"event": "A"}\n' * 300)
            await monitor.stream.aclose()
            await qmp.gone.wait()
            assert len([event async for event in events]) == 256
    assert "QMP event A is dropped" in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("says", [b"", b"what?\n"])
async def test_a_monitor_that_goes_ends_the_command_that_waits(ends, says):
    qmp, monitor = ends
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(monitor.greet)
        async with qmp:
            await monitor.greeted.wait()

            async def leave():
                await monitor.command()
                await monitor.stream.send(says) if says else await monitor.stream.aclose()

            tasks.start_soon(leave)
            with pytest.raises(
                QmpError, match=r"^query-status: QEMU (has closed its monitor|sent invalid)"
            ):
                await qmp.execute("query-status", Status)
            with pytest.raises(QmpError, match=r"^stop: QEMU"):
                await qmp.execute("stop")


@pytest.mark.anyio
async def test_a_monitor_that_is_silent_is_given_up(ends):
    qmp, monitor = ends
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(monitor.greet)
        async with qmp:
            await monitor.greeted.wait()
            with pytest.raises(QmpError, match=r"did not answer for 0\.01 seconds"):
                await qmp.execute("stop", timeout=0.01)
            await monitor.command()
            # What comes late is for nobody.
            await monitor.stream.send(b'{"return": {}, "id": 1}\n')
            tasks.start_soon(qmp.execute, "cont")
            assert (await monitor.command())["execute"] == "cont"
            await monitor.stream.send(b'{"return": {}, "id": 2}\n')
            while qmp._waiting:
                await anyio.sleep(0.001)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("says", "why"),
    [(b"", "closed its monitor at once"), (b"220 mail ready\r\n", "invalid QMP")],
)
async def test_what_is_no_monitor_is_one_error(ends, says, why):
    qmp, monitor = ends
    await monitor.stream.send(says) if says else await monitor.stream.aclose()
    with pytest.raises(QmpError, match=why):
        await qmp.__aenter__()


@pytest.mark.anyio
async def test_a_monitor_that_does_not_agree_is_one_error(ends):
    qmp, monitor = ends

    async def refuse():
        await monitor.stream.send(GREETING)
        await monitor.command()
        await monitor.stream.send(b'{"id": 0, "error": {"class": "x", "desc": "no"}}\n')

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refuse)
        with pytest.raises(QmpError, match="qmp_capabilities: no"):
            await qmp.__aenter__()


@pytest.mark.anyio
async def test_a_peer_that_does_not_greet_is_given_up(ends, monkeypatch):
    qmp, _ = ends
    monkeypatch.setattr(module, "_TIMEOUT", 0.01)
    with pytest.raises(QmpError, match="no QMP monitor: nothing within"):
        await qmp.__aenter__()


@pytest.mark.anyio
async def test_what_the_block_raises_comes_out_as_it_was(ends):
    qmp, monitor = ends
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(monitor.greet)
        with pytest.raises(LookupError):
            async with qmp:
                raise LookupError


@pytest.mark.anyio
async def test_a_monitor_that_repeats_a_reply_is_one_error(ends):
    qmp, monitor = ends

    async def ask():
        async with qmp:
            assert await qmp.execute("query-status", Status) == Status("paused")
            await qmp.gone.wait()
            with pytest.raises(
                QmpError, match=r"^cont: QEMU sent a reply twice, or to no command$"
            ):
                await qmp.execute("cont")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await monitor.greet()
        await monitor.command()
        await monitor.stream.send(b'{"return": {"status": "paused"}, "id": 1}\n' * 2)
