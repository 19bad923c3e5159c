"""Files put and got by words: sizes, repetitions, modes, what is refused, what is left behind."""

import errno
import os
import struct

import msgspec
import pytest
from file_parts import (
    ABORT,
    BEGIN,
    BYTES,
    END,
    GET,
    LENGTH,
    LIST,
    NAME,
    PUT,
    ROOM,
    STAT,
    FilesGuest,
    files_guest,
    leftovers,
    noise,
    open_files,
    pieces,
    sha256,
    tree,
)

from vmibridge import OutcomeKind, StatusKind
from vmibridge.errors import ConfigError
from vmibridge.handlers.files import MAX_PIECE, Files, Mode

pytestmark = pytest.mark.anyio
ENTRY = struct.Struct("<QqII")
KIB = 1 << 10
SIZES = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1]


@pytest.mark.parametrize("size", [*SIZES, pytest.param(100_000_000, marks=pytest.mark.slow)])
async def test_what_is_put_is_what_is_got(folder, anyio_backend, size):
    data = noise(size)
    piece = 64 * KIB if size < 1_000_000 else MAX_PIECE
    async with files_guest(folder) as guest:
        assert await guest.put_file("a.bin", data, Mode.CREATE | Mode.HASH, piece) == 0
        assert sha256((folder / "a.bin").read_bytes()) == sha256(data)
        assert sha256(await guest.get_file("a.bin", piece)) == sha256(data)
        assert list(tree(folder)) == ["a.bin"]


@pytest.mark.parametrize("how", ["not in memory", "not told", "in part", "all", "another error"])
async def test_what_is_not_in_memory_is_read_in_a_thread(folder, anyio_backend, monkeypatch, how):
    data, asked = noise(10_000), []
    (folder / "a").write_bytes(data)

    def preadv(descriptor, buffers, offset, flags):
        asked.append(flags)
        if how == "not in memory":
            raise BlockingIOError(errno.EAGAIN, "")
        if how == "not told":
            raise OSError(errno.EOPNOTSUPP, "")
        if how == "another error":
            raise OSError(errno.EIO, "")
        (buffer,) = buffers
        count = len(buffer) // 2 if how == "in part" else len(buffer)
        buffer[:count] = os.pread(descriptor, count, offset)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    async with files_guest(folder) as guest:
        assert await guest.get_file("a", 4000) == data
    assert asked == [os.RWF_NOWAIT] * (1 if how == "not told" else 3)


async def test_every_call_may_be_repeated(folder, anyio_backend):
    data = noise(100_000)
    async with files_guest(folder) as guest:
        for name, digest in (("hashed", sha256(data)), ("plain", None)):
            handles = [(await guest.begin(name, len(data))).value for _ in range(3)]
            assert len(set(handles)) == 1
            for at, size in pieces(len(data), 30_000):
                for _ in range(3):
                    told = await guest.put(handles[0], at, data[at : at + size])
                    assert (told.error, told.value) == (0, size)
            assert [(await guest.end(handles[0], digest)).error for _ in range(3)] == [0, 0, 0]
            handle = (await guest.begin(name, 0, Mode.READ)).value
            assert (await guest.begin(name, 0, Mode.READ)).value == handle
            for _ in range(3):
                assert (await guest.get(handle, 50_000, 70_000))[1] == data[50_000:]
                assert (await guest.get(handle, len(data), 10))[1] == b""
            assert [(await guest.end(handle, digest)).error for _ in range(3)] == [0, 0, 0]
        handle = (await guest.begin("c", 5)).value
        assert [(await guest.ask(ABORT, handle)).error for _ in range(3)] == [0, 0, 0]
    assert tree(folder) == {"hashed": data, "plain": data}


async def test_a_repeated_begin_has_one_handle_and_one_file(folder, anyio_backend):
    async with files_guest(folder, max_open=1) as guest:
        before = open_files()
        for _ in range(50):
            assert (await guest.begin("a", 10)).error == 0
        assert open_files() == before + 1
        assert len(leftovers(folder)) == 1
        assert (await guest.begin("b", 10)).error == errno.EMFILE


async def test_pieces_come_in_any_order_and_may_overlap(folder, anyio_backend):
    data = noise(10_000)
    async with files_guest(folder) as guest:
        handle = (await guest.begin("a", len(data), Mode.CREATE | Mode.HASH)).value
        for start, end in [(9000, 10_000), (0, 100), (5000, 9500), (50, 5000)]:
            assert (await guest.end(handle, sha256(data))).error == errno.ENODATA
            assert (await guest.put(handle, start, data[start:end])).value == end - start
        assert await guest.length(handle) == len(data)
        assert (await guest.end(handle, sha256(data))).error == 0
    assert tree(folder) == {"a": data}


async def test_bytes_that_change_after_they_were_hashed_are_hashed_again(folder, anyio_backend):
    first, second = noise(3_000_000, 1), noise(3_000_000, 2)
    async with files_guest(folder, replace=True) as guest:
        for digest, error in ((sha256(first), errno.EBADMSG), (sha256(second), 0)):
            handle = (await guest.begin("a", len(first), Mode.REPLACE | Mode.HASH)).value
            for data in (first, second):
                for at, size in pieces(len(data), MAX_PIECE):
                    assert (await guest.put(handle, at, data[at : at + size])).error == 0
            assert (await guest.end(handle, digest)).error == error
            assert tree(folder) == ({} if error else {"a": second})


@pytest.mark.parametrize("hashes", [Mode(0), Mode.HASH])
async def test_another_hash_fails_and_leaves_nothing(folder, anyio_backend, hashes):
    async with files_guest(folder) as guest:
        handle = (await guest.begin("a/b", 5, Mode.CREATE | hashes)).value
        await guest.put(handle, 0, b"hello")
        assert (await guest.end(handle, bytes(32))).error == errno.EBADMSG
        assert (await guest.end(handle, bytes(32))).error == errno.EBADMSG
        assert (await guest.end(handle, sha256(b"hello"))).error == errno.EBADF
        assert tree(folder) == {}
        (folder / "c").write_bytes(b"hello")
        handle = (await guest.begin("c", 0, Mode.READ | hashes)).value
        assert (await guest.end(handle, bytes(32))).error == errno.EBADMSG


async def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(folder, anyio_backend):
    (folder / "a").write_bytes(b"old")
    async with files_guest(folder, replace=True) as guest:
        assert (await guest.begin("a", 3)).error == errno.EEXIST
        handle = (await guest.begin("a", 3, Mode.REPLACE)).value
        await guest.put(handle, 0, b"new")
        assert tree(folder)["a"] == b"old"
        reader = (await guest.begin("a", 0, Mode.READ)).value
        assert (await guest.end(handle)).error == 0
        # Who has it open reads on in what was there.
        assert (await guest.get(reader, 0, 10))[1] == b"old"
    assert tree(folder) == {"a": b"new"}


async def test_a_name_that_is_taken_meanwhile_stays_as_it_is(folder, anyio_backend):
    async with files_guest(folder) as guest:
        handle = (await guest.begin("a", 3)).value
        await guest.put(handle, 0, b"new")
        (folder / "a").write_bytes(b"of another")
        assert (await guest.end(handle)).error == errno.EEXIST
        assert (await guest.end(handle)).error == errno.EEXIST
        assert tree(folder) == {"a": b"of another"}


async def test_a_program_that_was_killed_goes_on_where_it_was(folder, anyio_backend):
    data = noise(100_000)
    async with files_guest(folder) as guest:
        handle = (await guest.begin("a", len(data), Mode.CREATE | Mode.HASH)).value
        await guest.put(handle, 0, data[:60_000])
        again = guest.program(0x2000)
        taken = (await again.begin("a", len(data))).value
        assert taken != handle
        assert await again.length(taken) == 60_000
        # The one before may still live: it cannot write any more, and not end it either.
        assert (await guest.put(handle, 0, b"x")).error == errno.ESTALE
        assert (await guest.ask(LENGTH, handle)).error == errno.ESTALE
        assert (await guest.end(handle)).error == errno.ESTALE
        assert (await guest.ask(ABORT, handle)).error == errno.ESTALE
        assert await again.put_file("a", data) == 0
    assert tree(folder) == {"a": data}


async def test_a_handle_belongs_to_its_address_space_and_to_the_kernel(folder, anyio_backend):
    (folder / "r").write_bytes(b"hello")
    async with files_guest(folder) as guest:
        handle = (await guest.begin("a", 3)).value
        reader = (await guest.begin("r", 0, Mode.READ)).value
        stranger, kernel = guest.program(0x2000), guest.program(0x3000, ring=0)
        assert (await stranger.put(handle, 0, b"abc")).error == errno.EBADF
        assert (await stranger.get(reader, 0, 5))[0].error == errno.EBADF
        assert (await stranger.end(handle)).error == errno.EBADF
        assert (await stranger.ask(ABORT, handle)).error == errno.EBADF
        assert (await stranger.begin("r", 0, Mode.READ)).value != reader
        assert (await kernel.put(handle, 0, b"abc")).error == 0
        assert (await kernel.end(handle)).error == 0
        # Not what another one has ended, either.
        assert (await stranger.end(handle)).error == errno.EBADF
    assert tree(folder)["a"] == b"abc"


@pytest.mark.parametrize(
    ("mode", "size"),
    [(0, 1), (Mode.READ, 1), (Mode.READ | Mode.CREATE, 0), (Mode.CREATE | Mode.REPLACE, 1), (8, 0)],
)
async def test_a_mode_is_one_of_three(folder, anyio_backend, mode, size):
    async with files_guest(folder, replace=True) as guest:
        assert (await guest.begin("a", size, mode)).error == errno.EINVAL


async def test_limits_are_of_a_file_of_all_bytes_of_files_and_of_handles(folder, anyio_backend):
    limits = {"max_file": 100, "max_bytes": 150, "max_files": 4, "max_open": 2}
    async with files_guest(folder, replace=True, **limits) as guest:
        assert (await guest.begin("a", 101)).error == errno.EFBIG
        assert (await guest.begin("a", 1 << 63)).error == errno.EFBIG
        first = (await guest.begin("a", 100)).value
        assert (await guest.begin("b", 51)).error == errno.EDQUOT
        second = (await guest.begin("b", 50)).value
        assert (await guest.begin("c", 0)).error == errno.EMFILE
        await guest.ask(ABORT, second)
        assert (await guest.put(first, 1, bytes(100))).error == errno.EFBIG
        assert (await guest.put(first, (1 << 64) - 1, b"x")).error == errno.EFBIG
        assert (await guest.put(first, 0, bytes(100))).error == 0
        assert (await guest.end(first)).error == 0
        # What is replaced counts once.
        for _ in range(3):
            assert await guest.put_file("a", bytes(50), Mode.REPLACE) == 0
        assert await guest.put_file("b", bytes(100)) == 0
        assert await guest.put_file("c", b"x") == errno.EDQUOT
        assert await guest.put_file("d/e/f", b"") == errno.EDQUOT
        assert await guest.put_file("d/e", b"") == 0
        assert await guest.put_file("f", b"") == errno.EDQUOT


async def test_what_the_host_takes_away_counts_no_more(folder, anyio_backend):
    async with files_guest(folder, max_files=3) as guest:
        for name in ("sub/a", "b"):
            assert await guest.put_file(name, b"x") == 0
        (folder / "b").unlink()
        assert await guest.put_file("c", b"x") == 0
        assert await guest.put_file("d", b"x") == errno.EDQUOT


async def test_a_file_to_get_has_a_limit_too(folder, anyio_backend):
    (folder / "a").write_bytes(bytes(101))
    async with files_guest(folder, max_file=100) as guest:
        before = open_files()
        assert (await guest.begin("a", 0, Mode.READ)).error == errno.EFBIG
        assert open_files() == before


@pytest.mark.parametrize(
    ("settings", "put", "replace", "get"),
    [
        ({}, 0, errno.EACCES, 0),
        ({"replace": True}, 0, 0, 0),
        ({"put": False, "replace": True}, errno.EACCES, errno.EACCES, 0),
        ({"get": False}, 0, errno.EACCES, errno.EACCES),
    ],
)
async def test_settings_say_what_a_guest_may(folder, anyio_backend, settings, put, replace, get):
    (folder / "there").write_bytes(b"x")
    async with files_guest(folder, **settings) as guest:
        assert (await guest.begin("a", 1, Mode.CREATE)).error == put
        assert (await guest.begin("a", 1, Mode.REPLACE)).error == replace
        assert (await guest.begin("there", 0, Mode.READ)).error == get
        assert (await guest.ask(STAT, guest.text("there"), 0, 0)).error == get
        guest.place(ROOM, bytes(64))
        assert (await guest.ask(LIST, guest.text(""), 0, ROOM, 64)).error == get


async def test_without_a_folder_nothing_is_allowed(anyio_backend):
    async with Files() as files:
        guest = FilesGuest(files)
        for mode in (Mode.CREATE, Mode.REPLACE):
            assert (await guest.begin("a", 1, mode)).error == errno.EACCES
        assert (await guest.begin("a", 0, Mode.READ)).error == errno.EACCES
        assert (await guest.put(1, 0, b"x")).error == errno.EACCES
        assert (await guest.ask(STAT, guest.text("a"), 0, 0)).error == errno.EACCES


async def test_a_folder_that_is_not_there_is_named(tmp_path, anyio_backend):
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"files: folder '.*missing': No such file"):
        async with Files(Files.Settings(folder=missing)):
            pass


async def test_it_answers_while_it_is_entered(folder, anyio_backend):
    outcome = await FilesGuest(Files(Files.Settings(folder=str(folder)))).send(ABORT, 1)
    assert outcome.kind is OutcomeKind.FAILED
    assert "between __aenter__ and __aexit__" in str(outcome.error)


async def test_nothing_is_left_when_the_guest_ends(folder, anyio_backend):
    before = open_files()
    async with files_guest(folder) as guest:
        for number in range(5):
            handle = (await guest.begin(f"a/{number}", 100, Mode.CREATE | Mode.HASH)).value
            await guest.put(handle, 0, bytes(number))
    assert tree(folder) == {}
    assert open_files() == before


async def test_stat_tells_size_time_and_kind(folder, anyio_backend):
    (folder / "sub").mkdir()
    file = folder / "sub/a"
    file.write_bytes(bytes(300))
    os.utime(file, ns=(1, 1_700_000_000_123_456_789))
    async with files_guest(folder) as guest:
        guest.place(ROOM, bytes(64))
        told = await guest.ask(STAT, guest.text("sub/a"), ROOM, 64)
        assert (told.error, told.value) == (0, 300)
        about = ENTRY.unpack_from(guest.backend.memory[ROOM])
        assert about == (300, 1_700_000_000_123_456_789, 1, 0)
        for name in ("", "sub"):
            told = await guest.ask(STAT, guest.text(name), ROOM, 24)
            assert (told.error, told.value) == (0, 0)
            assert ENTRY.unpack_from(guest.backend.memory[ROOM])[2] == 2
        assert (await guest.ask(STAT, guest.text("sub/a"), ROOM, 23)).error == errno.ERANGE
        assert (await guest.ask(STAT, guest.text("none"), 0, 0)).error == errno.ENOENT


async def test_a_folder_is_listed_piece_by_piece(folder, anyio_backend):
    names = sorted(
        [f"file{number:03}" for number in range(40)] + ["sub", "Gr\u00fc\u00dfe", "z" * 255]
    )
    for name in names:
        if name == "sub":
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(bytes(len(name)))
    for hidden in ("con", "a:b", "a\nb", b"\xff".decode("utf-8", "surrogateescape")):
        (folder / hidden).write_bytes(b"x")
    async with files_guest(folder) as guest:
        await guest.begin("under way", 1)
        found, after = [], ""
        while True:
            guest.place(ROOM, bytes(400))
            last = guest.text(after, 0x2_0000) if after else 0
            told = await guest.ask(LIST, guest.text(""), last, ROOM, 400)
            assert told.error == 0
            if not told.value:
                break
            page, at = guest.backend.memory[ROOM][: told.value], 0
            while at < len(page):
                size, _, kind, length = ENTRY.unpack_from(page, at)
                after = page[at + 24 : at + 24 + length].decode()
                assert page[at + 24 + length] == 0
                assert (size, kind) == ((0, 2) if after == "sub" else (len(after), 1))
                found.append(after)
                at += (24 + length + 8) // 8 * 8
        assert found == names
        guest.place(ROOM, bytes(24))
        assert (await guest.ask(LIST, guest.text(""), 0, ROOM, 24)).error == errno.ERANGE


@pytest.mark.parametrize(
    ("method", "values", "number"),
    [
        pytest.param(BEGIN, (0xDEAD_0000, 1, 2), 1, id="name"),
        pytest.param(BEGIN, (NAME, 1, 16), 3, id="mode"),
        pytest.param(PUT, (1 << 32, 0, BYTES, 1), 1, id="handle"),
        pytest.param(PUT, (1, 0, BYTES, MAX_PIECE + 1), 3, id="too many bytes"),
        pytest.param(PUT, (1, 0, 0xDEAD_0000, 1), 3, id="bytes"),
        pytest.param(GET, (1, 0, 0xDEAD_0000, 1), 3, id="room"),
        pytest.param(END, (1, BYTES, 33), 2, id="hash"),
    ],
)
async def test_a_wrong_parameter_is_told_by_its_number(
    folder, anyio_backend, method, values, number
):
    async with files_guest(folder) as guest:
        guest.text("a")
        guest.place(BYTES, bytes(64))
        told = await guest.ask(method, *values)
        assert (told.status.kind, told.status.code) == (StatusKind.INVALID_PARAMETERS, number)


async def test_a_short_hash_is_none(folder, anyio_backend):
    async with files_guest(folder) as guest:
        handle = (await guest.begin("a", 0)).value
        assert (await guest.end(handle, bytes(31))).error == errno.EINVAL
        assert (await guest.end(handle)).error == 0


async def test_handles_are_for_one_direction(folder, anyio_backend):
    (folder / "r").write_bytes(b"x")
    async with files_guest(folder) as guest:
        reader = (await guest.begin("r", 0, Mode.READ)).value
        writer = (await guest.begin("w", 1)).value
        assert (await guest.put(reader, 0, b"x")).error == errno.EBADF
        assert (await guest.get(writer, 0, 1))[0].error == errno.EBADF
        assert (await guest.put(0, 0, b"x")).error == errno.EBADF
    assert tree(folder) == {"r": b"x"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"folder": ""}, "folder"),
        ({"folder": "a\0"}, "folder"),
        ({"max_file": 0}, "max_file"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"max_files": 0}, "max_files"),
        ({"max_open": 0}, "max_open"),
        ({"max_open": 1025}, "max_open"),
        ({"idle_timeout": 0}, "idle_timeout"),
        ({"idle_timeout": float("nan")}, "idle_timeout"),
        ({"put": 1}, "put"),
        ({"color": True}, "color"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, Files.Settings)


async def test_an_unknown_method_is_rejected(anyio_backend):
    assert (await FilesGuest(Files()).send(9)).kind is OutcomeKind.REJECTED
