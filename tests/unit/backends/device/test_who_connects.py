"""Who connects to a device's backend: a QEMU, one after it, one beside it, a check of health."""

import errno

import anyio
import pytest
from served_device import beside, called, serving
from vfio_client import version
from waiting import until

from vmibridge.backends.device import vfio_user
from vmibridge.backends.device.connection import Connection

pytestmark = pytest.mark.anyio


async def test_what_only_connects_is_no_qemu(tmp_path):
    async with serving(tmp_path, "hold=1s&timeout=10s") as served:
        for _ in range(3):
            stream = await anyio.connect_unix(served.backend.path)
            await until(lambda: served.connection is not None)
            await stream.aclose()
            await until(lambda: served.connection is None)
        assert served.end is None, "the run goes on"
        with await served.connect() as client:
            client.ring()
            await called(served)
            await served.answer(1)
            await beside(client.receive)


async def test_a_qemu_is_served_that_comes_before_the_one_that_has_ended_is_done_with(
    tmp_path, monkeypatch
):
    serve, is_free, served_twice = Connection.serve, anyio.Event(), []

    async def done_with_late(connection):
        try:
            await serve(connection)
        finally:
            await is_free.wait()

    monkeypatch.setattr(Connection, "serve", done_with_late)

    async def call():
        with await served.connect() as client:
            client.ring()
            await called(served)
            await served.answer(1)
            served_twice.append((await beside(client.receive)).number)

    async with serving(tmp_path, "stay=true") as served:
        await call()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await until(lambda: served.backend._next._waits is not None)
            is_free.set()
    assert served_twice == [100, 100]


async def test_another_qemu_is_turned_away_with_a_warning_and_a_check_of_health_without(
    tmp_path, caplog
):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            await (await anyio.connect_unix(served.backend.path)).aclose()
            async with await anyio.connect_unix(served.backend.path) as other:
                await other.send(version(number=5))
                number, command, _, flags, error = vfio_user.HEADER.unpack(await other.receive())
                assert (number, command, error) == (5, vfio_user.VERSION, errno.EBUSY)
                assert flags == vfio_user.REPLY | vfio_user.ERROR
                with pytest.raises(anyio.EndOfStream):
                    await other.receive()
            many = [await anyio.connect_unix(served.backend.path) for _ in range(20)]
            for each in many:
                with pytest.raises(anyio.EndOfStream):
                    await each.receive()
                await each.aclose()
            client.ring()
            await called(served)
            await served.answer(1)
            assert (await beside(client.receive)).number == 100
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert {*warnings} == {
        f"vm vm: turned away another QEMU: one at a time is served at unix:{tmp_path}/s"
    }
