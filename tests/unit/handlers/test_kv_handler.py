"""Values by name in a file: they outlive the handler, and nothing that is wrong with the file costs
a VM.
"""

import logging
import sqlite3
import sys
import threading
from contextlib import closing, contextmanager

import anyio
import apsw
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import (
    STANDARD_MAGIC,
    BridgeContext,
    BridgePacket,
    Failed,
    Registers,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
)
from vmibridge.errors import MissingExtraError, ServerStateError
from vmibridge.handlers._kv_store import Problem
from vmibridge.handlers.kv import Kv
from vmibridge.testing import FakeBackend, FakeMemory, FakeRoom, drive

TOP = (1 << 64) - 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "values.sqlite"


@pytest.fixture
def make(path):
    def make(**fields):
        return Kv(Kv.Settings(**{"path": str(path), **fields}))

    return make


def guest(vm="vm"):
    return BridgeContext(TrapEvent(1, TrapReason.VMCALL, Registers(), vm=vm), FakeBackend())


VMI = guest()


async def value_of(kv, name, vmi=VMI):
    room = FakeRoom(64)
    length = await kv.get(vmi, name, room)
    return room.data[:length]


async def names_of(kv, vmi=VMI):
    found, name = [], ""
    while True:
        room = FakeRoom(256)
        length = await kv.next(vmi, name, room)
        if not length:
            return found
        name = room.data[:length].decode()
        found.append(name)


async def problem_of(call):
    with pytest.raises(Failed) as failed:
        await call
    return Problem(failed.value.code)


# --- entries ---------------------------------------------------------------------------


@pytest.mark.anyio
async def test_values_outlive_the_handler(make):
    async with make() as kv:
        assert await kv.put(VMI, "color", b"red") == 1
        assert await kv.put(VMI, "size", b"\0\xff") == 2
        assert await kv.put(VMI, "color", b"blue") == 3
    async with make() as kv:
        assert await value_of(kv, "color") == b"blue"
        assert await value_of(kv, "size") == b"\0\xff"
        assert await kv.delete(VMI, "color")
        assert not await kv.delete(VMI, "color")
        assert await problem_of(kv.get(VMI, "color", FakeRoom(8))) is Problem.NOT_FOUND


@pytest.mark.anyio
async def test_without_a_file_they_end_with_it():
    kv = Kv()
    for _ in range(2):
        async with kv:
            assert await names_of(kv) == []
            await kv.put(VMI, "color", b"red")


@pytest.mark.anyio
async def test_a_value_that_does_not_fit_is_cut_off_and_its_length_told(make):
    async with make() as kv:
        await kv.put(VMI, "color", b"magenta")
        room = FakeRoom(3)
        assert (await kv.get(VMI, "color", room), room.data) == (7, b"mag")


@pytest.mark.anyio
async def test_names_come_in_the_order_of_their_bytes(make):
    names = ["a", "Z", "ab", "é", "日", "b"]
    async with make() as kv:
        for name in names:
            await kv.put(VMI, name, b"")
        assert await names_of(kv) == sorted(names, key=str.encode)
        room = FakeRoom(1)
        assert (await kv.next(VMI, "a", room), room.data) == (2, b"a")


@pytest.mark.anyio
async def test_put_if_keeps_what_was_not_touched_in_between(make):
    async with make() as kv:
        assert await kv.version(VMI, "n") == 0
        first = await kv.put_if(VMI, "n", 0, b"1")
        assert await kv.version(VMI, "n") == first
        assert await problem_of(kv.put_if(VMI, "n", 0, b"2")) is Problem.OTHER_VERSION
        second = await kv.put_if(VMI, "n", first, b"2")
        assert await problem_of(kv.put_if(VMI, "n", first, b"3")) is Problem.OTHER_VERSION
        assert await problem_of(kv.put_if(VMI, "n", TOP, b"3")) is Problem.OTHER_VERSION
        # Made again, an entry has none of the versions that it ever had.
        await kv.delete(VMI, "n")
        assert await kv.put_if(VMI, "n", 0, b"1") > second
        assert await problem_of(kv.put_if(VMI, "n", second, b"3")) is Problem.OTHER_VERSION


@pytest.mark.anyio
async def test_several_vms_count_in_one_entry(make):
    async def count(kv, vmi):
        for _ in range(5):
            while True:
                version = await kv.version(vmi, "n")
                number = int(await value_of(kv, "n", vmi)) if version else 0
                try:
                    await kv.put_if(vmi, "n", version, str(number + 1).encode())
                    break
                except Failed as failed:
                    if failed.code != Problem.OTHER_VERSION:
                        raise

    settings = {"common": True, "patience": 10.0}
    async with make(**settings) as red, make(**settings) as blue:
        async with anyio.create_task_group() as tasks:
            for kv, vm in ((red, "red"), (blue, "blue"), (blue, "blue")):
                tasks.start_soon(count, kv, guest(vm))
        assert await value_of(red, "n") == b"15"


@pytest.mark.anyio
async def test_a_vm_sees_its_own_entries(make):
    red, blue = guest("red"), guest("blue")
    async with make() as kv:
        await kv.put(red, "n", b"1")
        await kv.put(blue, "n", b"2")
        assert [await value_of(kv, "n", vmi) for vmi in (red, blue)] == [b"1", b"2"]
        await kv.delete(red, "n")
        assert [await names_of(kv, vmi) for vmi in (red, blue)] == [[], ["n"]]
    async with make(common=True) as kv:
        assert await names_of(kv) == []
        await kv.put(red, "m", b"3")
        assert await value_of(kv, "m", blue) == b"3"


NAMES = st.sampled_from(["a", "b", "B", "ab"])
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.binary(max_size=8)),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("restart")),
)


@given(steps=st.lists(STEPS, max_size=12))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_holds_what_a_dict_holds(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("kv") / "values.sqlite"

    async def run():
        expected, kv = {}, Kv(Kv.Settings(path=str(path), max_entries=2, max_bytes=9))
        await kv.__aenter__()
        for step, *given_values in steps:
            if step == "restart":
                await kv.__aexit__(None, None, None)
                await kv.__aenter__()
            elif step == "delete":
                assert await kv.delete(VMI, *given_values) == (given_values[0] in expected)
                expected.pop(given_values[0], None)
            else:
                name, value = given_values
                after = {**expected, name: value}
                size = sum(len(key) + len(each) for key, each in after.items())
                if len(after) > 2 or size > 9:
                    assert await problem_of(kv.put(VMI, name, value)) is Problem.FULL
                else:
                    await kv.put(VMI, name, value)
                    expected = after
        found = {name: await value_of(kv, name) for name in await names_of(kv)}
        await kv.__aexit__(None, None, None)
        assert found == expected

    anyio.run(run)


# --- limits ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_names_and_values_have_bounds(make):
    async with make(max_name=4, max_value=3) as kv:
        for name, value in (("", b""), ("abcde", b""), ("éééé", b""), ("a", b"1234")):
            assert await problem_of(kv.put(VMI, name, value)) is Problem.WRONG_SIZE
            assert await problem_of(kv.put_if(VMI, name, 0, value)) is Problem.WRONG_SIZE
        await kv.put(VMI, "abcd", b"123")
        assert await problem_of(kv.get(VMI, "", FakeRoom(1))) is Problem.NOT_FOUND


@pytest.mark.anyio
async def test_a_full_vm_may_still_replace_and_is_no_matter_of_others(make):
    async with make(max_entries=2, max_bytes=10) as kv:
        await kv.put(VMI, "a", b"1234")
        await kv.put(VMI, "b", b"1234")
        assert await problem_of(kv.put(VMI, "c", b"")) is Problem.FULL
        assert await problem_of(kv.put(VMI, "a", b"12345")) is Problem.FULL
        await kv.put(VMI, "a", b"123")
        await kv.put(VMI, "b", b"12345")
        await kv.put(guest("other"), "c", b"123456789")


# --- what is wrong with the file -------------------------------------------------------


@contextmanager
def holding(path):
    """Another connection has the file for itself. Not one of `sqlite3`, which is another SQLite:
    two of them in one process do not see the locks of each other."""
    with closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, "vmibridge.kv")
    return caplog


@pytest.mark.anyio
async def test_a_locked_file_is_a_status_and_one_line(make, path, told):
    async with make(patience=0) as kv:
        await kv.put(VMI, "a", b"1")
        with holding(path):
            for _ in range(2):
                assert await problem_of(kv.put(VMI, "a", b"2")) is Problem.LOCKED
                assert await problem_of(kv.get(VMI, "a", FakeRoom(1))) is Problem.LOCKED
            assert told.messages == [f"kv: {path}: database is locked"]
        assert await value_of(kv, "a") == b"1"
        await kv.put(VMI, "a", b"2")


@pytest.mark.anyio
async def test_a_file_that_is_locked_at_first_works_later(make, path):
    async with make() as kv:
        await kv.put(VMI, "a", b"1")
    async with make(patience=0) as kv:
        with holding(path):
            assert await problem_of(kv.get(VMI, "a", FakeRoom(1))) is Problem.LOCKED
        assert await value_of(kv, "a") == b"1"


@pytest.mark.anyio
async def test_a_file_that_is_none_is_left_as_it_is(make, path, told):
    path.write_bytes(b"\x1b[31mnot a database of anything, but long enough" * 50)
    before = path.read_bytes()
    async with make() as kv:
        for _ in range(2):
            assert await problem_of(kv.put(VMI, "a", b"1")) is Problem.BROKEN
        assert told.messages == [f"kv: {path}: file is not a database"]
        assert path.read_bytes() == before
        # Mended, it works without a new handler.
        path.unlink()
        assert await kv.put(VMI, "a", b"1") == 1


@pytest.mark.anyio
async def test_a_database_of_another_program_is_left_as_it_is(make, path, told):
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE entries(a)")
    before = path.read_bytes()
    async with make() as kv:
        assert await problem_of(kv.put(VMI, "a", b"1")) is Problem.BROKEN
    assert told.messages == [f"kv: {path}: it is a database of another program"]
    assert path.read_bytes() == before


@pytest.mark.anyio
async def test_a_file_that_is_damaged(make, path, told):
    async with make() as kv:
        await kv.put(VMI, "a", bytes(60_000))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * (size - 4096))
    async with make() as kv:
        assert await problem_of(kv.put(VMI, "b", b"2")) is Problem.BROKEN
    assert told.messages == [f"kv: {path}: database disk image is malformed"]


@pytest.mark.anyio
async def test_a_folder_that_is_not_there(make, tmp_path, told):
    folder = tmp_path / "later"
    async with make(path=str(folder / "values.sqlite")) as kv:
        assert "its folder is not there" in told.text  # before a guest asks
        assert await problem_of(kv.put(VMI, "a", b"1")) is Problem.BROKEN
        folder.mkdir()
        await kv.put(VMI, "a", b"1")
    assert (folder / "values.sqlite").stat().st_mode & 0o777 == 0o600


@pytest.mark.anyio
async def test_a_path_that_is_a_folder(make, tmp_path, told):
    async with make(path=str(tmp_path)) as kv:
        assert "is a folder" in told.text
        assert await problem_of(kv.put(VMI, "a", b"1")) is Problem.BROKEN


@pytest.mark.anyio
async def test_a_disk_that_is_full(make, told):
    async with make() as kv:
        await kv.put(VMI, "a", b"1")
        # As SQLite says it of a disk: no page more.
        await kv._store._db.pragma("max_page_count", 1)
        assert await problem_of(kv.put(VMI, "b", bytes(60_000))) is Problem.FULL
        assert told.messages[0].endswith("database or disk is full")
        assert await value_of(kv, "a") == b"1"
        await kv._store._db.pragma("max_page_count", 1000)
        await kv.put(VMI, "b", bytes(60_000))


@pytest.mark.anyio
async def test_a_request_that_is_cut_off_while_others_hold_the_file(make, path):
    threads = threading.active_count()
    async with make(patience=10) as kv:
        await kv.put(VMI, "a", b"1")
        with holding(path):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kv.put, VMI, "a", b"2")
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        assert await value_of(kv, "a") in (b"1", b"2")
    while threading.active_count() > threads + 1:  # anyio's own worker
        await anyio.sleep(0.001)


# --- what the guest sends --------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "values", "code"),
    [
        (1, (0x1000, 0x2000, (1 << 20) + 1), 2),
        (2, (0xDEAD_0000, 0x2000, 1), 1),
        (2, (0x1000, 0xDEAD_0000, 1), 2),
        (2, (0x1000, 0x2000, TOP), 2),
        (3, (0x1100,), 1),  # no UTF-8
        (6, (0x1000, 0, 0x2000, (1 << 20) + 1), 3),
    ],
)
async def test_a_parameter_that_is_wrong_never_reaches_the_file(make, path, method, values, code):
    memory = FakeMemory({0x1000: b"name\0", 0x1100: b"\xff\0", 0x2000: bytes(64)})
    async with make() as kv:
        packet = BridgePacket(STANDARD_MAGIC, Kv.REQUEST, method, *values)
        outcome = await drive(kv, packet, memory)
    status = Status.decode(outcome.response.value1)
    assert (status.kind, status.code) == (StatusKind.INVALID_PARAMETERS, code)
    assert not path.exists()


@pytest.mark.anyio
async def test_a_handler_that_was_not_entered_says_so(make):
    with pytest.raises(ServerStateError, match="__aenter__"):
        await make().version(VMI, "a")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_name": 0}, "max_name"),
        ({"max_name": 257}, "max_name is 1 to 256"),
        ({"max_value": (1 << 20) + 1}, "max_value"),
        ({"max_entries": 0}, "max_entries"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"patience": -1.0}, "patience"),
        ({"patience": 11.0}, "patience"),
        ({"path": "a\0b"}, "path holds a NUL"),
        ({"file": "a"}, "file"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, Kv.Settings)


def test_without_apsw_the_handler_says_what_to_install(load_handler, monkeypatch):
    monkeypatch.setitem(sys.modules, "apsw", None)
    monkeypatch.delitem(sys.modules, "vmibridge.handlers._kv_store")
    with pytest.raises(MissingExtraError, match="the extra 'kv'"):
        load_handler("kv").Kv()
