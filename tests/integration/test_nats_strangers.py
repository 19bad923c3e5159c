"""What others publish, and what comes too late: it hurts nobody."""

import anyio
from nats_parts import (
    ON_ASYNCIO,
    Guest,
    Work,
    ask,
    plain_client,
)
from remote_parts import carry, served
from waiting import until

from vmibridge.engine.settings import ServerSettings
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.nats.message import pack
from vmibridge.transport.nats.subjects import trap_subject
from vmibridge.transport.wire import Hello

pytestmark = ON_ASYNCIO


class TestStrangers:
    async def test_garbage_on_the_subjects_hurts_nobody(self, nats):
        handler = Work()
        vm = Guest(4, 100, vm="web")
        hello = Hello(WORD, VERSION, VERSION, b"x" * 16, "web")
        garbage = [
            b"",
            b"\0",
            b"\xff" * 12,
            b"\xff\xff\xff\xff\0\0\0\0\0\0\2\0rest",
            pack(hello)[:-1],
            pack(hello) + b"\1\0\0\0\0",
            pack(hello, hello),
            pack(Hello("else", VERSION, VERSION, b"y" * 16, "web")),
            pack(Hello(WORD, 9, 9, b"y" * 16, "web")),
            bytes(200_000),
        ]
        subjects = ["vmibridge.hello.web", "vmibridge.web.42494d56.0100", "vmibridge.x.y.z",
                    "vmibridge.web.agent.all." + "00" * 16]  # fmt: skip
        # On a machine with other work an answer may take long, which is no matter here.
        url = f"{nats.url}?silence=120"
        async with (
            served(url, handler, settings=ServerSettings(timeout=60)) as server,
            plain_client(nats.url) as stranger,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(carry, vm, url)
            await until(lambda: vm.resumed)
            for _ in range(20):
                for subject in subjects:
                    for data in garbage:
                        await stranger.publish(subject, data, reply="vmibridge.hello.web")
                        await stranger.publish(subject, data, reply="stranger.inbox")
                await stranger.flush()
            assert server.vms == ["web"]
        assert not vm.wrong
        assert sorted(handler.asked) == list(range(1, 401))

    async def test_an_agent_is_the_vm_of_its_subject_and_no_other(self, nats):
        data = pack(Hello(WORD, VERSION, VERSION, b"x" * 16, "db"))
        other_version = pack(Hello(WORD, 9, 9, b"y" * 16, "web"))
        told = []

        async def take(message):
            told.append(message.data)

        async with served(nats.url, Work()) as server, plain_client(nats.url) as stranger:
            await stranger.subscribe("mine.*", cb=take)
            for subject in ("vmibridge.hello.web", trap_subject("web", ask(1))):
                await stranger.publish(subject, data, reply="mine.no")
            await stranger.publish("vmibridge.hello.web", other_version)
            await stranger.flush()
            await stranger.publish("vmibridge.hello.db", data, reply="mine.yes")
            await until(lambda: told)
            assert server.vms == ["db"]
            assert server.refused == 3
        assert len(told) == 1
