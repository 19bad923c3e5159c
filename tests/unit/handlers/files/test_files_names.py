"""Names of files: in UTF-16, hostile ones, links, and folders on the way."""

import errno
import os
import struct

import pytest
from file_parts import (
    BEGIN,
    LIST,
    ROOM,
    STAT,
    files_guest,
    leftovers,
    tree,
)

from vmibridge.handlers.files import Mode

pytestmark = pytest.mark.anyio
ENTRY = struct.Struct("<QqII")


async def test_names_in_utf_16_are_the_same_names(folder, anyio_backend):
    name = "Gr\u00fc\u00dfe/\U0001f989.txt"
    async with files_guest(folder) as guest:
        wide = guest.text(name.encode("utf-16-le"))
        begun = await guest.ask(BEGIN | 0x10, wide, 5, Mode.CREATE)
        assert (await guest.begin(name, 5)).value == begun.value
        await guest.put(begun.value, 0, b"hello")
        assert (await guest.end(begun.value)).error == 0
        wide = guest.text(name.encode("utf-16-le"))
        assert (await guest.ask(STAT | 0x10, wide, 0, 0)).value == 5
        guest.place(ROOM, bytes(4096))
        wide = guest.text("Gr\u00fc\u00dfe".encode("utf-16-le"))
        listed = await guest.ask(LIST | 0x10, wide, 0, ROOM, 4096)
        assert listed.value % 8 == 0
        size, _, kind, length = ENTRY.unpack_from(guest.backend.memory[ROOM])
        raw = guest.backend.memory[ROOM][ENTRY.size : ENTRY.size + length + 2]
        assert (size, kind, raw.decode("utf-16-le")) == (5, 1, "\U0001f989.txt\0")
        lone = guest.text(b"\x00\xd8")
        assert (await guest.ask(BEGIN | 0x10, lone, 5, Mode.CREATE)).error == -1
    assert tree(folder)[name] == b"hello"


HOSTILE = ["/a", "..", "a/../b", "a\\b", "NUL.txt", "com1", "a.", "a ", "c:x", "x" * 256, ""]


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_name_is_refused_by_each_method(folder, anyio_backend, name):
    async with files_guest(folder, replace=True) as guest:
        for mode in (Mode.CREATE, Mode.REPLACE):
            assert (await guest.begin(name, 1, mode)).error == errno.EINVAL
        assert (await guest.begin(name, 0, Mode.READ)).error == errno.EINVAL
        if name:
            assert (await guest.ask(STAT, guest.text(name), 0, 0)).error == errno.EINVAL
            guest.place(ROOM, bytes(64))
            assert (await guest.ask(LIST, guest.text(name), 0, ROOM, 64)).error == errno.EINVAL
        assert tree(folder) == {}


@pytest.mark.parametrize("raw", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"a" * 4097])
async def test_a_name_that_is_no_text_is_a_wrong_parameter(folder, anyio_backend, raw):
    async with files_guest(folder) as guest:
        told = await guest.begin(raw, 1)
        assert (told.error, told.status.code) == (-1, 1)


async def test_links_and_devices_lead_nowhere(folder, anyio_backend):
    secret = folder.parent / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"secret")
    (folder / "out").symlink_to(secret)
    (folder / "key").symlink_to(secret / "key")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    async with files_guest(folder, replace=True) as guest:
        for name in ("out/key", "key", "loop", "pipe", "out"):
            told = await guest.begin(name, 0, Mode.READ)
            assert told.error in {errno.ELOOP, errno.ENOTDIR, errno.EACCES}, name
            assert (await guest.ask(STAT, guest.text(name), 0, 0)).error in {
                errno.EACCES,
                errno.ENOTDIR,
            }
        for mode in (Mode.CREATE, Mode.REPLACE):
            assert (await guest.begin("out/new", 1, mode)).error == errno.ENOTDIR
            assert (await guest.begin("key", 1, mode)).error == errno.EACCES
        guest.place(ROOM, bytes(4096))
        assert (await guest.ask(LIST, guest.text("out"), 0, ROOM, 4096)).error == errno.ENOTDIR
        assert (await guest.ask(LIST, guest.text(""), 0, ROOM, 4096)).value == 0
    assert tree(secret) == {"key": b"secret"}
    assert (folder / "key").is_symlink()


async def test_a_link_that_comes_meanwhile_is_not_followed(folder, anyio_backend):
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "sub").mkdir()
    async with files_guest(folder, replace=True) as guest:
        handles = [(await guest.begin(name, 1, Mode.REPLACE)).value for name in ("sub/a", "b")]
        for handle in handles:
            await guest.put(handle, 0, b"x")
        (folder / "sub").rmdir()
        (folder / "sub").symlink_to(outside)
        (folder / "b").symlink_to(outside / "b")
        assert (await guest.end(handles[0])).error == errno.ENOTDIR
        # The link itself is replaced.
        assert (await guest.end(handles[1])).error == 0
    assert tree(outside) == {}
    assert not (folder / "b").is_symlink()
    assert leftovers(folder) == []


async def test_folders_are_made_at_the_end_and_not_before(folder, anyio_backend):
    async with files_guest(folder) as guest:
        kept, lost = [(await guest.begin(name, 1)).value for name in ("a/b/c", "d/e/f")]
        assert len(tree(folder)) == len(leftovers(folder)) == 2
        for handle in (kept, lost):
            await guest.put(handle, 0, b"x")
        assert (await guest.end(kept)).error == 0
        assert (await guest.end(lost, bytes(32))).error == errno.EBADMSG
        assert tree(folder) == {"a": None, "a/b": None, "a/b/c": b"x"}


async def test_where_a_folder_is_needed_and_something_else_is(folder, anyio_backend):
    (folder / "file").write_bytes(b"x")
    (folder / "sub").mkdir()
    async with files_guest(folder, replace=True) as guest:
        assert (await guest.begin("file/a", 1)).error == errno.ENOTDIR
        assert (await guest.begin("sub", 1, Mode.REPLACE)).error == errno.EISDIR
        assert (await guest.begin("sub", 1)).error == errno.EEXIST
        assert (await guest.begin("sub", 0, Mode.READ)).error == errno.EISDIR
        assert (await guest.begin("none", 0, Mode.READ)).error == errno.ENOENT
        assert (await guest.begin("none/a", 0, Mode.READ)).error == errno.ENOENT
        guest.place(ROOM, bytes(64))
        assert (await guest.ask(LIST, guest.text("file"), 0, ROOM, 64)).error == errno.ENOTDIR
