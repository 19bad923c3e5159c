"""A disk that hangs: the guest has its fallback at the deadline, and nothing is done by halves."""

import os
import threading

import pytest
from file_parts import BEGIN, END, LENGTH, PUT, leftovers, noise, sha256, tree
from waiting import until

from vmibridge import STANDARD_MAGIC, Bridge, BridgePacket, BridgeServer, OutcomeKind, Status
from vmibridge.handlers.files import Files, Mode
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio
DATA = noise(5000)
MEMORY = {0x1000: b"a\0", 0x2000: sha256(DATA), 0x1_0000: DATA}


class Disk:
    """A system call that hangs when it is called first."""

    def __init__(self, monkeypatch, name):
        self.call = getattr(os, name)
        self.goes_on = threading.Event()
        self.hung = 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments, **given):
        if not self.hung:
            self.hung += 1
            assert self.goes_on.wait(60)
        return self.call(*arguments, **given)


async def serve(folder, guest, **options):
    async with FakeGuest(guest, memory=MEMORY) as backend:
        server = BridgeServer(backend, Bridge(Files(Files.Settings(str(folder)))), **options)
        return [outcome.kind async for outcome in server.run()]


@pytest.mark.parametrize("method", [BEGIN, PUT])
async def test_a_call_that_took_too_long_is_repeated(tmp_path, anyio_backend, monkeypatch, method):
    disk = Disk(monkeypatch, "open" if method == BEGIN else "pwrite")
    disk.hung = 1  # the folder itself is opened first

    async def guest(vm):
        async def call(method, *values):
            answer = await vm.call(BridgePacket(STANDARD_MAGIC, Files.REQUEST, method, *values))
            return answer.rbx if answer.rax == Status(method).encode() else None

        async def insist(*call_it):
            told = await call(*call_it)
            if told is None:
                # The thread is still at it. What it does counts.
                disk.goes_on.set()
                while told is None:
                    told = await call(*call_it)
            return told

        # The first call of it is of the request that is to hang.
        disk.hung = 0
        handle = await insist(BEGIN, 0x1000, len(DATA), Mode.CREATE)
        assert await insist(PUT, handle, 0, 0x1_0000, len(DATA)) == len(DATA)
        assert await insist(LENGTH, handle) == len(DATA)
        # One that was begun a second time meanwhile is removed when its thread ends.
        await until(lambda: len(leftovers(tmp_path)) == 1)
        assert await insist(END, handle, 0x2000, 32) == 0

    kinds = await serve(tmp_path, guest, timeout=0.2)
    assert OutcomeKind.TIMEOUT in kinds
    assert tree(tmp_path) == {"a": DATA}


async def test_an_end_that_takes_long_tells_the_guest_to_wait(tmp_path, anyio_backend, monkeypatch):
    disk = Disk(monkeypatch, "fsync")
    monkeypatch.setattr("vmibridge.handlers.files.Files.methods", quick_end())
    waits = []

    async def guest(vm):
        async def call(method, *values):
            answer = await vm.call(BridgePacket(STANDARD_MAGIC, Files.REQUEST, method, *values))
            return Status.decode(answer.rax), answer.rbx

        _, handle = await call(BEGIN, 0x1000, len(DATA), Mode.CREATE | Mode.HASH)
        await call(PUT, handle, 0, 0x1_0000, len(DATA))
        while True:
            status, _ = await call(END, handle, 0x2000, 32)
            if status == Status(END):
                break
            assert status.kind == 1
            waits.append(status)
            disk.goes_on.set()

    kinds = await serve(tmp_path, guest, timeout=60)
    assert waits
    assert set(kinds) == {OutcomeKind.HANDLED, OutcomeKind.WAITING}
    assert tree(tmp_path) == {"a": DATA}


def quick_end():
    """The methods, with a soft deadline of END that a test need not wait for."""
    end = Files.methods[END]
    assert (end.timeout, end.soft_timeout) == (120.0, 1.0)
    return {**Files.methods, END: end._replace(soft_timeout=0.01)}


async def test_a_guest_that_ends_while_a_disk_hangs_leaves_nothing(
    tmp_path, anyio_backend, monkeypatch
):
    disk = Disk(monkeypatch, "pwrite")

    async def guest(vm):
        packet = BridgePacket(STANDARD_MAGIC, Files.REQUEST, BEGIN, 0x1000, len(DATA), Mode.CREATE)
        while (begun := await vm.call(packet)).rax != Status(BEGIN).encode():
            pass
        values = (begun.rbx, 0, 0x1_0000, len(DATA))
        await vm.call(BridgePacket(STANDARD_MAGIC, Files.REQUEST, PUT, *values))
        threading.Timer(0.05, disk.goes_on.set).start()

    kinds = await serve(tmp_path, guest, timeout=0.05)
    assert kinds[-2:] == [OutcomeKind.HANDLED, OutcomeKind.TIMEOUT]
    assert tree(tmp_path) == {}
