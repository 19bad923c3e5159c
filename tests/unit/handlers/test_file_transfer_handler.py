"""Guests of vmi-rs that send files: what counts, what is refused, and what is left behind."""

import logging

import msgspec
import pytest
from file_parts import FilesGuest, leftovers, noise, open_files, tree
from upstream_guests import (
    BEGIN,
    BUFFER,
    CHUNK,
    CHUNK_SIZE,
    CLOSE,
    EXIT,
    FILE_TRANSFER,
    MEMORY,
    NAME,
    SET_BUFFER,
    FileTransferGuest,
)

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    Bridge,
    BridgePacket,
    BridgeServer,
    Gate,
    OutcomeKind,
    Status,
)
from vmibridge.handlers import _file_ends, file_transfer
from vmibridge.handlers.file_transfer import FileTransfer
from vmibridge.testing import FakeGuest, drive

pytestmark = pytest.mark.anyio
SLOW = pytest.mark.slow
STAMPS = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)


def make(folder, **settings):
    return FileTransfer(FileTransfer.Settings(folder=str(folder), sync=False, **settings))


async def send(folder, files, **settings):
    """Send files, and give the guest and the outcomes."""
    guest = FileTransferGuest(files)
    async with FakeGuest(guest.run, memory=MEMORY) as backend:
        server = BridgeServer(backend, Bridge(make(folder, **settings)), soft_timeout=0.0001)
        outcomes = [outcome async for outcome in server.run()]
    # However slow it is, this guest is never told to wait.
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.HANDLED}
    return guest, outcomes


class Sender(FilesGuest):
    """A guest that sends what a test says."""

    async def call(self, method, *values):
        outcome = await self.send(method, *values)
        assert outcome.kind is OutcomeKind.HANDLED
        assert outcome.response.values[1:] == (None, *STAMPS)
        return outcome.response.value1

    async def start(self, name, size):
        raw = name if isinstance(name, bytes) else name.encode("utf-16-le", "surrogatepass")
        self.place(NAME, raw)
        return await self.call(BEGIN, 0x40, size, NAME, len(raw))

    async def started(self, name, size):
        begun = await self.start(name, size)
        assert begun >> 12 == CHUNK_SIZE
        assert 1 <= begun & 0xFFF <= 4095
        assert await self.call(SET_BUFFER, begun & 0xFFF, BUFFER) == Gate.CONTINUE
        return begun & 0xFFF

    async def chunk(self, handle, data):
        self.place(BUFFER, data)
        return await self.call(CHUNK, handle, len(data))


@pytest.mark.parametrize(
    "size", [1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE, 1_000_000]
)
async def test_a_guest_sends_a_file(tmp_path, anyio_backend, size):
    data = noise(size)
    guest, outcomes = await send(tmp_path, {"a.bin": data})
    assert guest.sent == {"a.bin": True}
    assert tree(tmp_path) == {"a.bin": data}
    assert [each.output for each in outcomes if each.output is not None] == ["a.bin", Status(3)]


async def test_a_file_that_is_there_stays_as_it_is(tmp_path, anyio_backend):
    (tmp_path / "a.txt").write_bytes(b"of the host")
    files = {"a.txt": b"one", "C:\\Temp\\a.txt": b"two", "/x/a.txt": b"three", "b": b"four"}
    guest, _ = await send(tmp_path, files)
    assert all(guest.sent.values())
    assert tree(tmp_path) == {
        "a.txt": b"of the host",
        "a.1.txt": b"one",
        "a.2.txt": b"two",
        "a.3.txt": b"three",
        "b": b"four",
    }


HOSTILE = [
    "..",
    "a\\..",
    "NUL",
    "com1.txt",
    "a:b",
    "a.",
    "a ",
    "",
    "C:\\",
    "a\nb",
    "\ud800",
    "x" * 256,
]


async def test_a_hostile_name_is_refused_and_the_next_file_is_taken(
    tmp_path, anyio_backend, caplog
):
    folder = tmp_path / "folder"
    folder.mkdir()
    files = dict.fromkeys(HOSTILE, b"x")
    guest, _ = await send(folder, {**files, "good": b"x"})
    assert guest.sent == {**dict.fromkeys(HOSTILE, False), "good": True}
    assert tree(tmp_path) == {"folder": None, "folder/good": b"x"}
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == len(HOSTILE)
    assert all(each.startswith("vm fake: a file was refused: ") for each in warnings)


async def test_a_folder_above_is_cut_off_and_leads_nowhere(tmp_path, anyio_backend):
    folder = tmp_path / "folder"
    folder.mkdir()
    guest, _ = await send(folder, {"..\\..\\etc\\passwd": b"x", "../up": b"y"})
    assert all(guest.sent.values())
    assert tree(tmp_path) == {"folder": None, "folder/passwd": b"x", "folder/up": b"y"}


@pytest.mark.no_cover
@pytest.mark.parametrize(("handles", "ended"), [(15, 4), pytest.param(4095, 1024, marks=SLOW)])
async def test_handles_are_used_again(tmp_path, anyio_backend, monkeypatch, handles, ended):
    assert (file_transfer.MAX_HANDLE, _file_ends.MAX_ENDED) == (4095, 1024)
    monkeypatch.setattr(file_transfer, "MAX_HANDLE", handles)
    monkeypatch.setattr(_file_ends, "MAX_ENDED", ended)
    async with make(tmp_path) as handler:
        guest = Sender(handler)
        seen = set()
        for _ in range(handles + 5):
            begun = await guest.start("a", 1)
            seen.add(begun & 0xFFF)
            assert await guest.call(CLOSE, begun & 0xFFF, 0xFF) == Gate.CONTINUE
        assert seen == set(range(1, handles + 1))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("sent", "closed", "kept"),
    [
        pytest.param(b"hello", 0, True, id="whole"),
        pytest.param(b"hell", 0, False, id="short"),
        pytest.param(b"", 0, False, id="nothing"),
        pytest.param(b"hello", 0xFF, False, id="given up"),
        pytest.param(b"hello", 1 << 40, False, id="given up in its upper half"),
    ],
)
async def test_a_file_counts_in_its_size_and_closed_with_success(
    tmp_path, anyio_backend, caplog, sent, closed, kept
):
    async with make(tmp_path) as handler:
        guest = Sender(handler)
        handle = await guest.started("a", 5)
        if sent:
            assert await guest.chunk(handle, sent) == Gate.CONTINUE
        gate = Gate.CONTINUE if kept or closed else Gate.ABORT
        assert await guest.call(CLOSE, handle, closed) == gate
        assert tree(tmp_path) == ({"a": b"hello"} if kept else {})
        # Its handle is none any more.
        for method in (SET_BUFFER, CHUNK, CLOSE):
            assert await guest.call(method, handle, 0) == Gate.ABORT


@pytest.mark.parametrize(
    ("values", "place"),
    [
        pytest.param((6,), BUFFER, id="more than its size"),
        pytest.param((CHUNK_SIZE + 1,), BUFFER, id="more than a chunk"),
        pytest.param(((1 << 64) - 1,), BUFFER, id="endless"),
        pytest.param((5,), 0xDEAD_0000, id="a buffer that is not there"),
        pytest.param((5,), (1 << 64) - 1, id="a buffer around the end of memory"),
        pytest.param((5,), None, id="no buffer"),
    ],
)
async def test_a_chunk_that_is_wrong_ends_the_transfer(
    tmp_path, anyio_backend, caplog, values, place
):
    before = open_files()
    async with make(tmp_path) as handler:
        guest = Sender(handler)
        begun = await guest.start("a", 5)
        handle = begun & 0xFFF
        guest.place(BUFFER, bytes(8))
        if place is not None:
            assert await guest.call(SET_BUFFER, handle, place) == Gate.CONTINUE
        assert await guest.call(CHUNK, handle, *values) == Gate.ABORT
        assert await guest.call(CLOSE, handle, 0) == Gate.ABORT
        assert tree(tmp_path) == {}
    assert open_files() == before


@pytest.mark.parametrize(
    "size", [(1 << 64) - 1, 1 << 63, 101], ids=["negative", "least", "over the limit"]
)
async def test_a_size_that_may_not_be_is_refused(tmp_path, anyio_backend, caplog, size):
    async with make(tmp_path, max_file=100) as handler:
        assert await Sender(handler).start("a", size) == 0


@pytest.mark.parametrize(
    "values",
    [(0x40, 1, 0xDEAD_0000, 2), (0x40, 1, NAME, 4098), (0x40, 1, NAME, 3), (0x40, 1, NAME, 0)],
)
async def test_a_name_that_cannot_be_read_is_refused(tmp_path, anyio_backend, caplog, values):
    async with make(tmp_path) as handler:
        guest = Sender(handler)
        guest.place(NAME, "abcd".encode("utf-16-le"))
        assert await guest.call(BEGIN, *values) == 0


async def test_limits_are_those_of_files(tmp_path, anyio_backend, caplog):
    async with make(tmp_path, max_bytes=10, max_files=3, max_open=2) as handler:
        guest = Sender(handler)
        assert await guest.start("a", 11) == 0
        first, second = [await guest.started("a", 5) for _ in range(2)]
        assert first != second
        assert await guest.start("a", 0) == 0
        for handle in (first, second):
            assert await guest.chunk(handle, b"hello") == Gate.CONTINUE
            assert await guest.call(CLOSE, handle, 0) == Gate.CONTINUE
        assert await guest.start("a", 1) == 0
        last = await guest.started("a", 0)
        assert await guest.call(CLOSE, last, 0) == Gate.CONTINUE
        assert await guest.start("a", 0) == 0
    assert tree(tmp_path) == {"a": b"hello", "a.1": b"hello", "a.2": b""}


async def test_a_transfer_belongs_to_its_address_space(tmp_path, anyio_backend):
    async with make(tmp_path) as handler:
        guest, stranger = Sender(handler), Sender(handler, 0x2000)
        handle = await guest.started("a", 5)
        assert await stranger.call(SET_BUFFER, handle, 0) == Gate.ABORT
        assert await stranger.chunk(handle, b"x") == Gate.ABORT
        assert await stranger.call(CLOSE, handle, 0xFF) == Gate.ABORT
        assert await guest.chunk(handle, b"hello") == Gate.CONTINUE
        assert await guest.call(CLOSE, handle, 0) == Gate.CONTINUE
    assert tree(tmp_path) == {"a": b"hello"}


async def test_nothing_is_left_when_the_guest_ends(tmp_path, anyio_backend):
    before = open_files()
    async with make(tmp_path) as handler:
        guest = Sender(handler)
        for _ in range(5):
            await guest.chunk(await guest.started("a", 50), b"hello")
        assert len(leftovers(tmp_path)) == 5
    assert tree(tmp_path) == {}
    assert open_files() == before


async def test_without_a_folder_each_file_is_refused(anyio_backend, caplog):
    async with FileTransfer() as handler:
        assert await Sender(handler).start("a", 1) == 0


@pytest.mark.parametrize(
    ("values", "output"),
    [
        ((0xC000_000D_0002_FE03, 0), Status(3, 0xFE, 2, 0xC000_000D)),
        ((0x0002_FE03, 0xC000_000D), Status(3, 0xFE, 2, 0xC000_000D)),
    ],
)
async def test_an_exit_is_answered_with_stamps_alone(anyio_backend, values, output):
    packet = BridgePacket(STANDARD_MAGIC, FILE_TRANSFER, EXIT, *values)
    outcome = await drive(FileTransfer(), packet)
    assert outcome.response.values == (None, None, *STAMPS)
    assert outcome.output == output


async def test_an_unknown_method_is_rejected(anyio_backend):
    outcome = await drive(FileTransfer(), BridgePacket(STANDARD_MAGIC, FILE_TRANSFER, 5))
    assert outcome.kind is OutcomeKind.REJECTED


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(msgspec.ValidationError, match="max_open"):
        msgspec.convert({"max_open": 0}, FileTransfer.Settings)
    with pytest.raises(msgspec.ValidationError, match="replace"):
        msgspec.convert({"replace": True}, FileTransfer.Settings)
