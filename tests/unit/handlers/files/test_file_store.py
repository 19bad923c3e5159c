"""The store of the handlers of files: in threads, beside other processes, on a disk that fails."""

import errno
import fcntl
import itertools
import os
import threading
from contextlib import contextmanager, suppress

import pytest
from file_parts import leftovers, noise, open_files, sha256, tree

from vmibridge.handlers import _file_progress
from vmibridge.handlers._file_budget import Limits
from vmibridge.handlers._file_ends import MAX_ENDED, Caller
from vmibridge.handlers._file_folder import Folder, IfTaken
from vmibridge.handlers._file_store import Store

MINE, OTHER = Caller(0x1000), Caller(0x2000)
LEFT = ".vmibridge-" + "0" * 32 + ".part"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@contextmanager
def opened(folder, clock=None, **limits):
    """A store, and a function that begins a file for a caller."""
    wide = {
        "max_file": 1 << 40,
        "max_bytes": 1 << 40,
        "max_files": 1000,
        "max_open": 100,
        "idle_timeout": 60.0,
    }
    store = Store(str(folder), Limits(**{**wide, **limits}), clock=clock or Clock())
    handles = itertools.count(1)

    def begin(name, size, caller=MINE, **given):
        return store.begin_put(caller, name, size, lambda: next(handles), **given)

    try:
        yield store, begin
    finally:
        store.close()


def failed(call, *arguments, **given):
    """The errno of a call that fails."""
    with pytest.raises(OSError) as caught:
        call(*arguments, **given)
    return caught.value.errno


def in_threads(count, work):
    """Run `work(NUMBER)` in so many threads at once; what they raise is raised."""
    raised = []
    start = threading.Barrier(count)

    def run(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path):
    (tmp_path / LEFT).write_bytes(b"half of it")
    others = [".vmibridge-x", LEFT + "x", "x" + LEFT, LEFT.upper(), LEFT.replace("0", "g")]
    for name in others:
        (tmp_path / name).write_bytes(b"no file of ours")
    link = ".vmibridge-" + "1" * 32 + ".part"
    (tmp_path / link).symlink_to("x")
    os.mkfifo(tmp_path / (".vmibridge-" + "2" * 32 + ".part"))
    with opened(tmp_path):
        assert not (tmp_path / LEFT).exists()
        assert all((tmp_path / name).exists() for name in others)
        assert (tmp_path / link).is_symlink()


def test_what_another_process_has_under_way_stays(tmp_path):
    with opened(tmp_path) as (store, begin):
        handle = begin("a", 5)
        store.put(MINE, handle, 0, b"hel")
        with opened(tmp_path) as (_, begin_other):
            begin_other("a", 5)
            assert len(leftovers(tmp_path)) == 2
        assert len(leftovers(tmp_path)) == 1
        store.put(MINE, handle, 3, b"lo")
        store.end(MINE, handle)
    assert tree(tmp_path) == {"a": b"hello"}


def test_a_temporary_file_that_a_sweep_took_first_is_made_again(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    sweeper = Folder(str(tmp_path))
    lock, swept = fcntl.flock, []

    def late(descriptor, how):
        # Between the two calls of the owner another process sweeps.
        if not swept:
            swept.append(True)
            assert sweeper.sweep() == 1
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    temporary = folder.make_temporary()
    assert leftovers(tmp_path) == [temporary.name]
    folder.discard(temporary)
    folder.close()
    sweeper.close()
    assert tree(tmp_path) == {}


def test_a_transfer_that_nobody_uses_makes_room(tmp_path):
    clock = Clock()
    with opened(tmp_path, clock, max_open=2, max_bytes=10) as (store, begin):
        first, second = begin("a", 5), begin("b", 5)
        clock.now = 40.0
        store.put(MINE, second, 0, b"x")
        assert failed(begin, "c", 0) == errno.EMFILE
        clock.now = 61.0
        assert begin("c", 5)
        assert failed(store.put, MINE, first, 0, b"x") == errno.EBADF
        store.put(MINE, second, 0, b"hello")
        store.end(MINE, second)


def test_ends_are_remembered_up_to_a_number(tmp_path):
    with opened(tmp_path) as (store, begin):
        first = begin("a", 0)
        store.abort(MINE, first)
        store.abort(MINE, first)
        for _ in range(MAX_ENDED):
            store.abort(MINE, begin("a", 0))
        assert failed(store.abort, MINE, first) == errno.EBADF


def test_an_end_is_repeated_with_the_same_hash_alone(tmp_path):
    with opened(tmp_path) as (store, begin):
        handle = begin("a", 1)
        store.put(MINE, handle, 0, b"x")
        store.end(MINE, handle, sha256(b"x"))
        store.end(MINE, handle, sha256(b"x"))
        assert failed(store.end, MINE, handle, sha256(b"y")) == errno.EBADF
        assert failed(store.end, MINE, handle) == errno.EBADF
        assert failed(store.abort, MINE, handle) == errno.EBADF


def test_too_many_gaps_are_refused_until_one_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(_file_progress, "MAX_PIECES", 8)
    with opened(tmp_path) as (store, begin):
        handle = begin("a", 30)
        for number in range(8):
            store.put(MINE, handle, 2 * number + 1, b"x")
        assert failed(store.put, MINE, handle, 29, b"x") == errno.ENOBUFS
        store.put(MINE, handle, 0, b"xx")
        assert failed(store.put, MINE, handle, 29, b"x") == errno.ENOBUFS
        store.put(MINE, handle, 2, b"xx")
        store.put(MINE, handle, 29, b"x")
        assert store.length(MINE, handle) == 4


def test_a_disk_that_is_full_loses_nothing_that_was_there(tmp_path, monkeypatch):
    data = noise(2_000_000)
    with opened(tmp_path) as (store, begin):
        handle = begin("a", len(data), hashes=True)
        store.put(MINE, handle, 0, data[:1_000_000])
        with monkeypatch.context() as patch:
            write = os.pwrite

            def short(descriptor, rest, offset):
                if offset >= 1_500_000:
                    raise OSError(errno.ENOSPC, "full")
                return write(descriptor, rest[:500_000], offset)

            patch.setattr(os, "pwrite", short)
            assert failed(store.put, MINE, handle, 1_000_000, data[1_000_000:]) == errno.ENOSPC
        assert store.length(MINE, handle) == 1_000_000
        store.put(MINE, handle, 1_000_000, data[1_000_000:])
        store.end(MINE, handle, sha256(data))
    assert tree(tmp_path) == {"a": data}


@pytest.mark.parametrize("broken", ["fsync", "link", "mkdir"])
def test_an_end_that_the_system_fails_leaves_nothing(tmp_path, monkeypatch, broken):
    before = open_files()

    def fail(*_, **__):
        raise OSError(errno.EIO, "broken")

    with opened(tmp_path, max_files=4) as (store, begin):
        for _ in range(6):
            handle = begin("sub/a", 1)
            store.put(MINE, handle, 0, b"x")
            with monkeypatch.context() as patch:
                patch.setattr(os, broken, fail)
                assert failed(store.end, MINE, handle) == errno.EIO
                assert failed(store.end, MINE, handle) == errno.EIO
            assert tree(tmp_path) == {}
    assert open_files() == before


def test_a_begin_that_fails_reserves_nothing(tmp_path, monkeypatch):
    with opened(tmp_path, max_bytes=10, max_open=1) as (_, begin):
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(Folder, "make_temporary", lambda _: os.open("/none", os.O_RDONLY))
                assert failed(begin, "a", 10) == errno.ENOENT
        assert begin("a", 10)


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    with opened(tmp_path) as (store, begin):
        names = []
        for name in ["a.txt", "a.txt", "a.txt", ".rc", ".rc", "b", "b"]:
            handle = begin(name, 0, if_taken=IfTaken.BESIDE, key=object())
            names.append(store.end(MINE, handle))
        assert names == ["a.txt", "a.1.txt", "a.2.txt", ".rc", ".rc.1", "b", "b.1"]
        assert sorted(tree(tmp_path)) == sorted(names)


def test_the_same_begin_in_many_threads_has_one_handle(tmp_path):
    with opened(tmp_path) as (_, begin):
        handles = []
        in_threads(8, lambda _: handles.append(begin("a", 5)))
        assert len(set(handles)) == 1
        assert len(leftovers(tmp_path)) == 1


def test_pieces_from_many_threads_are_one_file(tmp_path):
    data = noise(800_000)
    with opened(tmp_path) as (store, begin):
        handle = begin("a", len(data), hashes=True)

        def work(number):
            for at in range(number * 10_000, len(data), 80_000):
                assert store.put(MINE, handle, at, data[at : at + 10_000]) == 10_000

        in_threads(8, work)
        ends = []
        in_threads(4, lambda _: ends.append(store.end(MINE, handle, sha256(data))))
        assert sorted(ends) == ["", "", "", "a"]
    assert tree(tmp_path) == {"a": data}


def test_one_of_many_that_create_the_same_name_gets_it(tmp_path):
    with opened(tmp_path) as (store, begin):
        results = []

        def work(number):
            caller = Caller(0x1000 * (number + 1))
            # Of different sizes, so they are different files.
            with suppress(FileExistsError):
                handle = begin("sub/a", number + 1, caller)
                store.put(caller, handle, 0, bytes([number]) * (number + 1))
                store.end(caller, handle)
                results.append(number)

        in_threads(8, work)
        (winner,) = results
    assert tree(tmp_path) == {"sub": None, "sub/a": bytes([winner]) * (winner + 1)}


def test_who_takes_over_waits_for_what_is_under_way(tmp_path):
    with opened(tmp_path) as (store, begin):
        raised = []

        def work(number):
            caller = Caller(0x1000 * (number + 1))
            for _ in range(50):
                handle = begin("a", 8, caller)
                try:
                    store.put(caller, handle, 0, bytes([number]) * 8)
                    store.put(caller, handle, 4, bytes([number]) * 4)
                except OSError as error:
                    raised.append(error.errno)

        in_threads(4, work)
        assert set(raised) <= {errno.ESTALE}
        last = begin("a", 8)
        assert store.length(MINE, last) in (0, 8)
        store.put(MINE, last, 0, b"complete")
        store.end(MINE, last)
    assert tree(tmp_path) == {"a": b"complete"}


def test_a_store_that_is_closed_answers_no_more(tmp_path):
    before = open_files()
    with opened(tmp_path) as (store, begin):
        handle = begin("a", 5, hashes=True)
        raised = []

        def work(number):
            if not number:
                store.close()
                return
            try:
                for _ in range(1000):
                    begin(f"b{number}", 5)
                    store.put(MINE, handle, 0, b"hello")
            except OSError as error:
                raised.append(error.errno)

        in_threads(4, work)
        assert set(raised) <= {errno.EBADF}
        assert failed(begin, "c", 1) == errno.EBADF
    assert tree(tmp_path) == {}
    assert open_files() == before


def test_a_file_that_is_cut_short_while_it_is_got_fails_at_its_end(tmp_path):
    (tmp_path / "a").write_bytes(noise(100))
    with opened(tmp_path) as (store, _):
        handle = store.begin_get(MINE, "a", lambda: 7)
        (tmp_path / "a").write_bytes(b"short")
        assert store.get(MINE, handle, 0, 100) == b"short"
        assert failed(store.end, MINE, handle, sha256(noise(100))) == errno.EIO


def test_two_guests_with_one_folder_have_nothing_else_in_common(tmp_path):
    with opened(tmp_path) as (one, begin_one), opened(tmp_path) as (two, begin_two):
        first, second = begin_one("a", 3), begin_two("a", 3)
        one.put(MINE, first, 0, b"one")
        two.put(MINE, second, 0, b"two")
        two.end(MINE, second)
        assert failed(one.end, MINE, first) == errno.EEXIST
        assert failed(one.put, OTHER, second, 0, b"x") == errno.EBADF
    assert tree(tmp_path) == {"a": b"two"}
