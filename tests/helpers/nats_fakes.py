"""Ends of the transport on NATS that say what they are told to."""

from contextlib import asynccontextmanager

import anyio
from nats_parts import plain_client, settle
from patience import HUNG
from waiting import until

from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.nats.message import (
    FROM_NATS_AGENT,
    FROM_NATS_SERVER,
    Messages,
    hello_in,
    pack,
)
from vmibridge.transport.wire import Answer, End, Ended, Hello, Ping, Pong, Trap, Welcome


def answer(seq, value):
    return Answer(seq, 0x1003, value, None, None, None)


class _Fake:
    """Keeps the frames that come to its inbox, with what their subject says, and the reply."""

    def __init__(self, client, decoder, inbox="fake"):
        self.client = client
        self.inbox = f"{inbox}.{id(self):x}"
        self.got = []
        self._messages = Messages(decoder)

    async def listen(self):
        await self.client.subscribe(f"{self.inbox}.>", cb=self._take)
        await settle(self.client)

    async def _take(self, message):
        place = message.subject[len(self.inbox) + 1 :]
        for frame in self._messages.frames(message.data):
            await self.take(frame, place, message.reply)

    async def take(self, frame, place, reply):
        self.got.append((frame, place, reply))

    def frames(self, kind):
        return [frame for frame, _, _ in self.got if isinstance(frame, kind)]

    async def next(self, kind, number=1):
        """The frame of this kind, its place and its reply; the last of so many."""
        await until(lambda: len(self.frames(kind)) >= number)
        return [each for each in self.got if isinstance(each[0], kind)][number - 1]

    async def say(self, subject, *frames, reply=None):
        """As from this one's inbox."""
        mine = f"{self.inbox}.{'6d' * 16}"
        await self.client.publish(subject, pack(*frames), reply=mine if reply is None else reply)


class FakeServer(_Fake):
    """Of the queue group, with handlers for the standard magic."""

    welcome = Welcome(VERSION, b"m" * 16, 0, (STANDARD_MAGIC,), False, False, 5000,
                      (None, None, None, None), 64)  # fmt: skip

    @classmethod
    @asynccontextmanager
    async def running(cls, url, **options):
        async with plain_client(url) as client:
            server = cls(client, FROM_NATS_AGENT)
            for name, value in options.items():
                setattr(server, name, value)
            await server.listen()
            yield server

    async def listen(self):
        await self.client.subscribe("vmibridge.*.agent.all.*", cb=self._take_from_all)
        self.queue = [
            await self.client.subscribe(subject, "vmibridge", cb=self._take_trap)
            for subject in ("vmibridge.hello.*", "vmibridge.*.*.*")
        ]
        await super().listen()

    async def _take_from_all(self, message):
        await self.take(FROM_NATS_AGENT.decode(message.data[4:]), "all", message.reply)

    async def _take_trap(self, message):
        _, rest = hello_in(message.data)
        if not rest:
            await self.say(message.reply, self.welcome)
        for frame in self._messages.frames(rest):
            await self.take(frame, message.subject, message.reply)

    async def take(self, frame, place, reply):
        await super().take(frame, place, reply)
        if isinstance(frame, End):
            await self.say(reply, Ended())

    async def leave_group(self):
        for each in self.queue:
            await each.unsubscribe()
        await settle(self.client)


class FakeAgent(_Fake):
    """Of a VM `web` by default."""

    def __init__(self, client, vm="web", session=b"s" * 16):
        super().__init__(client, FROM_NATS_SERVER)
        self.vm = vm
        self.hello = Hello(WORD, VERSION, VERSION, session, vm)

    @classmethod
    @asynccontextmanager
    async def running(cls, url, **options):
        async with plain_client(url) as client:
            agent = cls(client, **options)
            await agent.listen()
            yield agent

    async def shake_hands(self):
        """WELCOME or REFUSED, and where its server listens."""
        await self.say(f"vmibridge.hello.{self.vm}", self.hello, reply=f"{self.inbox}.hello")
        await until(lambda: self.got)
        frame, _, reply = self.got.pop(0)
        return frame, reply

    async def send(self, trap, attempt=1):
        """A trap to the queue group."""
        await self.say(
            f"vmibridge.{self.vm}.42494d56.0100", self.hello, trap,
            reply=f"{self.inbox}.{trap.seq:x}.{attempt:x}",
        )  # fmt: skip


async def passed(fake):
    """All that was said to `fake` before has come."""
    place = f"{fake.inbox}.passed"
    count = len(fake.frames(Ping | Pong))
    await fake.client.publish(place, pack(Pong() if isinstance(fake, FakeAgent) else Ping()))
    with anyio.fail_after(HUNG):
        await until(lambda: len(fake.frames(Ping | Pong)) > count)


__all__ = ["FakeAgent", "FakeServer", "Trap", "answer", "passed"]
