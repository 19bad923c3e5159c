"""One connection to a real NATS: what is published, lost and told."""

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager

import anyio
import pytest
from nats_parts import ON_ASYNCIO, nats_server, plain_client, settle
from patience import HUNG
from waiting import until

from vmibridge.errors import BackendError
from vmibridge.transport import AgentServer
from vmibridge.transport.nats.client import _TURN, NatsClient
from vmibridge.transport.nats.message import FROM_NATS_SERVER, Messages, pack
from vmibridge.transport.urls.nats import parse_nats_url
from vmibridge.transport.wire import Native, Write

pytestmark = ON_ASYNCIO


@pytest.fixture
async def client(nats):
    async with NatsClient(parse_nats_url(nats.url), "test") as client:
        yield client


class Taken:
    """What came; held back until `go_on`."""

    def __init__(self):
        self.data = []
        self.go_on = anyio.Event()
        self.go_on.set()

    async def take(self, message):
        await self.go_on.wait()
        self.data.append(message.data)


@asynccontextmanager
async def heard(nats, taken):
    """A client; `taken` gets what it publishes `here`."""
    async with (
        plain_client(nats.url) as other,
        NatsClient(parse_nats_url(nats.url), "test") as client,
    ):
        await other.subscribe("here", cb=taken.take)
        await settle(other)
        yield client


class TestPublish:
    async def test_what_does_not_fit_into_the_buffer_waits_in_order(self, nats, monkeypatch):
        monkeypatch.setattr("vmibridge.transport.nats.client._PENDING", 64 << 10)
        taken = Taken()
        sent = [number.to_bytes(4, "little") * 1024 for number in range(500)]
        async with heard(nats, taken) as client:
            for data in sent:
                client.publish("here", data)
            await until(lambda: len(taken.data) == 500)
            # So it goes on with what comes later.
            client.publish("here", b"last")
            await until(lambda: taken.data[-1] == b"last")
        assert taken.data == [*sent, b"last"]

    async def test_beyond_its_bound_it_is_lost_and_what_comes_later_is_not(self, nats, monkeypatch):
        monkeypatch.setattr("vmibridge.transport.nats.client._PENDING", 64 << 10)
        monkeypatch.setattr("vmibridge.transport.nats.client._MAX_UNSENT", 128 << 10)
        taken = Taken()
        sent = [number.to_bytes(4, "little") * 1024 for number in range(500)]
        async with heard(nats, taken) as client:
            for data in sent:
                client.publish("here", data)
            await until(lambda: len(taken.data) >= 48)
            client.publish("here", b"last")
            await until(lambda: taken.data[-1] == b"last")
        # 64 KiB that nats-py keeps and the one too many; 128 KiB of ours.
        assert 47 <= len(taken.data) - 1 <= 50
        assert taken.data[:-1] == sent[: len(taken.data) - 1]

    async def test_the_loop_turns_between_the_parts_of_a_large_message(self, tmp_path, monkeypatch):
        # A frame of 8 MB has as many parts where NATS takes 1 KiB; a server that sends them in one
        # go can say nothing meanwhile, and counts as silent.
        taken, turns, in_turn = Messages(FROM_NATS_SERVER), 0, Counter()
        frame = Write(1, 1, 0, bytes(range(256)) * 2000)
        come = []

        async def take(message):
            come.extend(taken.frames(message.data))

        async def turn():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with nats_server(tmp_path, "max_payload: 1024") as nats:
            async with (
                plain_client(nats.url) as other,
                NatsClient(parse_nats_url(nats.url), "test") as client,
                anyio.create_task_group() as tasks,
            ):
                await other.subscribe("here", cb=take)
                await settle(other)
                publish = client.nats.publish

                async def counted(*args):
                    in_turn[turns] += 1
                    await publish(*args)

                monkeypatch.setattr(client.nats, "publish", counted)
                tasks.start_soon(turn)
                client.publish("here", pack(frame))
                client.publish("here", pack(Native(7)))
                await until(lambda: len(come) == 2)
                tasks.cancel_scope.cancel()
        assert come == [frame, Native(7)]
        assert in_turn.total() > 500
        assert max(in_turn.values()) <= 2 * _TURN

    async def test_a_message_that_nats_takes_not_even_in_parts_is_told(self, tmp_path, caplog):
        with nats_server(tmp_path, "max_payload: 12") as nats:
            async with NatsClient(parse_nats_url(nats.url), "test") as client:
                client.publish("here", bytes(100))
        assert "NATS takes messages of 12 bytes: too little for 100" in caplog.text

    async def test_one_for_a_connection_that_is_closed_is_lost(self, client, nats, caplog):
        caplog.set_level("DEBUG", "vmibridge.transport.nats.client")
        await client.nats.close()
        assert client.closed.is_set()
        client.publish("here", b"lost")
        assert "a message is lost: ConnectionClosedError" in caplog.text

    async def test_so_is_one_too_many_while_nats_is_away(self, nats, monkeypatch, caplog):
        caplog.set_level("DEBUG", "vmibridge.transport.nats.client")
        monkeypatch.setattr("vmibridge.transport.nats.client._PENDING", 1 << 10)
        async with NatsClient(parse_nats_url(nats.url), "test") as client:
            nats.stop()
            await until(lambda: not client.nats.is_connected)
            for _ in range(3):
                client.publish("here", bytes(600))
            await until(lambda: "OutboundBufferLimitError" in caplog.text)


class TestAway:
    async def test_the_time_stands_still_and_goes_on(self, client, nats):
        before = client.uptime()
        back = anyio.Event()
        client.on_reconnect = back.set
        nats.stop()
        await until(lambda: client._up_since is None)
        still = client.uptime()
        time.sleep(0.01)
        assert client.uptime() == still >= before
        nats.start()
        with anyio.fail_after(HUNG):
            await back.wait()
        await until(lambda: client.uptime() > still)

    async def test_a_subscription_ends_and_so_does_the_connection(self, nats):
        async with NatsClient(parse_nats_url(nats.url), "test") as client:
            end = await client.subscribe("here", Taken().take)
            nats.stop()
            await until(lambda: not client.nats.is_connected)
            with anyio.fail_after(5):
                await end()

    async def test_one_that_is_closed_while_the_end_of_a_lost_connection_is_waited_for_is_closed(
        self, client, nats, monkeypatch
    ):
        # asyncio's writers share one future for their end: it is cancelled with who waits for it.
        end, waited = asyncio.get_running_loop().create_future(), anyio.Event()

        async def wait_closed(_):
            waited.set()
            await end

        monkeypatch.setattr(type(client.nats._transport), "wait_closed", wait_closed)
        nats.stop()
        with anyio.fail_after(HUNG):
            await waited.wait()
            await client.nats.close()
        assert end.cancelled()
        assert client.closed.is_set()

    async def test_a_server_that_loses_nats_in_the_midst_of_its_start_says_so(
        self, nats, monkeypatch
    ):
        settle = NatsClient.settle

        async def lose(client):
            nats.stop()
            await until(lambda: not client.nats.is_connected)
            await client.nats.close()
            await settle(client)

        monkeypatch.setattr(NatsClient, "settle", lose)
        lost = "NATS has closed the connection"
        with pytest.raises(BackendError, match=lost), anyio.fail_after(HUNG):
            await AgentServer([nats.url], lambda _: None).run()


class TestTold:
    async def test_a_message_that_cannot_be_taken_is_told_and_the_next_one_is_taken(
        self, client, caplog
    ):
        seen = []

        async def take(message):
            seen.append(message.data)
            if message.data == b"bad":
                raise KeyError("our mistake")

        await client.subscribe("here", take)
        for data in (b"bad", b"good"):
            client.publish("here", data)
        await until(lambda: seen == [b"bad", b"good"])
        assert caplog.text.count("a message could not be taken") == 1
        assert "our mistake" in caplog.text

    async def test_messages_that_come_faster_than_they_are_taken_are_told_once(
        self, client, caplog
    ):
        taken = Taken()
        taken.go_on = anyio.Event()
        await client.subscribe("here", taken.take)
        (subscription,) = client.nats._subs.values()
        subscription._pending_bytes_limit = 1000
        for _ in range(10):
            client.publish("here", bytes(400))
        await until(lambda: "some are lost" in caplog.text)
        taken.go_on.set()
        await until(lambda: taken.data)
        assert caplog.text.count("messages come faster than they are taken") == 1
