"""Agents and servers that meet on a real NATS, with real guests in Unicorn and made ones."""

import signal
from itertools import chain

import anyio
import pytest
from nats_parts import (
    AT,
    Guest,
    Work,
    ask,
    nats_server,
    plain_client,
    serve_processes,
    until,
)
from remote_parts import Certificates, Echo, carry, served

from vmibridge import (
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    method,
    open_backend,
)
from vmibridge.contract import STANDARD_MAGIC
from vmibridge.errors import BackendError
from vmibridge.outcome import OutcomeKind
from vmibridge.settings import ServerSettings
from vmibridge.status import Gate
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentServer, RemoteBackend
from vmibridge.transport.nats_message import pack
from vmibridge.transport.nats_subjects import partition_of, trap_subject
from vmibridge.transport.wire import VERSION, WORD, Hello

CPUID, VMCALL, VMMCALL = 1, 2, 3
PASSED = 0x600D
LONG = ServerSettings(timeout=3600)

pytestmark = [
    pytest.mark.anyio,
    # nats-py is for asyncio; that trio says so is in test_nats_urls.
    pytest.mark.parametrize(
        "anyio_backend",
        [
            pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
            pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        ],
    ),
]


@pytest.fixture
def nats(tmp_path):
    with nats_server(tmp_path) as server:
        yield server


async def run(url, image, *handlers, options=""):
    outcomes = []

    async def on_outcome(outcome):
        outcomes.append(outcome)

    with anyio.fail_after(60):
        async with served(url, *handlers, on_outcome=on_outcome) as server:
            agent, end = await carry(open_backend(f"unicorn:{image}{options}"), url)
            await until(lambda: not server.vms)
    return end.vcpus, agent, outcomes


class TestGuests:
    @pytest.mark.parametrize("how", [CPUID, VMCALL, VMMCALL])
    async def test_x64_code_gets_every_register_and_its_memory_right(self, nats, build_guest, how):
        image = build_guest("calls", WIDTH=64, HOW=how, PAGING=1, COUNT=50)
        vcpus, agent, outcomes = await run(nats.url, image, Echo())
        assert vcpus[0].registers["rax"] == PASSED, vcpus[0]
        assert [each.kind for each in outcomes] == [OutcomeKind.HANDLED] * 51
        assert (agent.counts.traps, agent.counts.answered, agent.counts.own) == (51, 51, 0)

    async def test_x86_code_does_so_too(self, nats, build_guest):
        image = build_guest("calls", WIDTH=32, HOW=VMCALL, PAGING=2, COUNT=20)
        vcpus, _, _ = await run(nats.url, image, Echo(), options="?width=32")
        assert vcpus[0].registers["rax"] == PASSED

    async def test_vcpus_keep_their_order(self, nats, build_guest):
        image = build_guest("calls", WIDTH=64, HOW=CPUID, PAGING=1, COUNT=50)
        vcpus, agent, outcomes = await run(nats.url, image, Echo(), options="?vcpus=4")
        assert [end.registers["rax"] for end in vcpus] == [PASSED] * 4
        assert agent.counts.connections == 1
        for vcpu in range(4):
            seqs = [each.event.seq for each in outcomes if each.event.vcpu == vcpu]
            assert len(seqs) == 51
            assert seqs == sorted(seqs)

    async def test_what_is_not_ours_never_leaves_the_machine(self, nats, build_guest):
        vcpus, agent, outcomes = await run(nats.url, build_guest("leaves"), Echo())
        assert vcpus[0].registers["rax"] == 10_000
        assert (agent.counts.traps, outcomes) == (0, [])

    async def test_a_server_of_ones_own_takes_one_vm(self, nats, build_guest):
        image = build_guest("calls", WIDTH=64, HOW=VMCALL, PAGING=1, COUNT=5)
        ends = []

        async def agent():
            ends.append(await carry(open_backend(f"unicorn:{image}"), nats.url))

        async with RemoteBackend(nats.url) as backend, anyio.create_task_group() as tasks:
            tasks.start_soon(agent)
            kinds = [each.kind async for each in BridgeServer(backend, Echo()).run()]
        assert kinds == [OutcomeKind.HANDLED] * 6
        assert ends[0][1].vcpus[0].registers["rax"] == PASSED


class TestMemory:
    async def test_more_of_it_than_nats_takes_in_a_message_goes_in_parts(self, nats):
        size = 3 << 20
        data = bytes(range(256)) * (size // 256)

        async def guest(vm):
            assert (await vm.call(ask(4, AT, size))).rax == 1

        vm = FakeGuest(guest, memory={AT: data})
        async with served(nats.url, Work()):
            agent, _ = await carry(vm, nats.url)
        assert vm.memory.read(AT, size) == data.translate(bytes(range(255, -1, -1)))
        assert agent.counts.answered == 1


class TestSeveral:
    async def test_two_vms_share_one_server_and_each_has_handlers_of_its_own(self, nats):
        made = {}

        def handlers(vm):
            return made.setdefault(vm, Work())

        vms = [Guest(4, 50, vm=name) for name in ("web", "db.example *")]
        server = AgentServer([nats.url], handlers)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            await server.listening.wait()
            async with anyio.create_task_group() as agents:
                for vm in vms:
                    agents.start_soon(carry, vm, nats.url)
            server.stop()
        for vm in vms:
            assert not vm.wrong
            assert sorted(made[vm.vm].asked) == sorted(vm.resumed) == list(range(1, 201))

    async def test_servers_share_the_traps_of_a_vm(self, nats):
        handlers = [Work() for _ in range(3)]
        vm = Guest(16, 40)
        async with (
            served(nats.url, handlers[0]),
            served(nats.url, handlers[1]),
            served(nats.url, handlers[2]),
        ):
            agent, _ = await carry(vm, nats.url)
        assert not vm.wrong
        assert sorted(chain.from_iterable(each.asked for each in handlers)) == list(range(1, 641))
        assert min(len(each.asked) for each in handlers) > 64
        assert (agent.counts.answered, agent.counts.own) == (640, 0)

    async def test_a_request_that_was_told_to_wait_is_asked_again_where_its_handler_is(self, nats):
        class Slow(BridgeHandler[None]):
            MAGIC = STANDARD_MAGIC
            REQUEST = 0x0100
            runs = 0

            @method(1)
            async def work(self, vmi, packet):
                Slow.runs += 1
                await anyio.sleep(0.1)
                return BridgeResponse(value1=PASSED)

        async def guest(vm):
            for _ in range(3):
                while (answer := await vm.call(ask(1))).rax == Gate.WAIT:
                    await anyio.sleep(0.005)
                assert answer.rax == PASSED

        settings = ServerSettings(soft_timeout=0.01)
        async with (
            served(nats.url, Slow(), settings=settings),
            served(nats.url, Slow(), settings=settings),
        ):
            await carry(FakeGuest(guest), nats.url)
        assert Slow.runs == 3

    async def test_a_server_that_stops_gives_its_traps_to_the_others(self, nats):
        first, second = Work(), Work()
        vm = Guest(8, 100)
        async with (
            served(nats.url, second),
            anyio.create_task_group() as tasks,
            served(nats.url, first) as server,
        ):
            tasks.start_soon(carry, vm, nats.url)
            await until(lambda: len(first.asked) > 50)
            server.stop()
            await until(lambda: not server.vms)
        assert not vm.wrong
        assert sorted(first.asked + second.asked) == list(range(1, 801))


class TestPinned:
    MAPPINGS = """
        mappings: {
            "vmibridge.*.*.*":
                "vmibridge-pinned.{{partition(3,1)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}"
            "vmibridge.hello.*": "vmibridge-pinned.{{partition(3,1)}}.hello.{{wildcard(1)}}"
        }
    """

    @pytest.mark.parametrize("who", ["nats", "agent"])
    async def test_each_vm_has_one_server(self, tmp_path, who):
        names = [f"vm{number}" for number in range(9)]
        made = [{} for _ in range(3)]
        with nats_server(tmp_path, self.MAPPINGS if who == "nats" else "") as nats:
            servers = [
                AgentServer(
                    [f"{nats.url}?subject=vmibridge-pinned.{number}.>" if number
                     else f"{nats.url}?partition=0"],
                    lambda vm, mine=made[number]: mine.setdefault(vm, Work()),
                )
                for number in range(3)
            ]  # fmt: skip
            here = nats.url if who == "nats" else f"{nats.url}?partitions=3"
            async with anyio.create_task_group() as tasks:
                for server in servers:
                    tasks.start_soon(server.run)
                    await server.listening.wait()
                async with anyio.create_task_group() as agents:
                    for name in names:
                        agents.start_soon(carry, Guest(2, 10, vm=name), here)
                for server in servers:
                    server.stop()
        for name in names:
            asked = [len(mine[name].asked) if name in mine else 0 for mine in made]
            expected = [0, 0, 0]
            expected[partition_of(name, 3)] = 20
            assert asked == expected, name


class TestFailures:
    async def test_a_server_that_is_killed_loses_no_trap_and_no_handler_runs_twice_elsewhere(
        self, nats, tmp_path
    ):
        url = f"{nats.url}?silence=1"
        vm = Guest(8, 250, codes=(1, 2))
        with serve_processes(tmp_path, url, 3, "--repeated", "run") as processes:
            killed = processes[0]
            async with anyio.create_task_group() as tasks:

                async def kill():
                    await until(lambda: len(killed.ran()) > 100)
                    killed.process.kill()

                tasks.start_soon(kill)
                with anyio.fail_after(60):
                    agent, end = await carry(vm, url)
            assert killed.process.wait(10) == -signal.SIGKILL
            ran = [each.ran() for each in processes]
        assert not end.failed
        assert not vm.wrong
        assert sorted(vm.resumed) == list(range(1, 2001))
        assert agent.counts.own == 0
        lived = ran[1] + ran[2]
        assert len(lived) == len(set(lived))
        assert set(lived) | set(ran[0]) == set(range(1, 2001))
        # Those in flight at the one that was killed, and no others.
        assert len(set(lived) & set(ran[0])) <= 8
        assert min(len(each) for each in ran) > 100
        assert sum(agent.shares.values()) == 2000

    async def test_a_server_that_is_silent_is_given_up_and_the_guest_gets_the_fallback(
        self, nats, tmp_path
    ):
        url = f"{nats.url}?silence=0.5"
        vm = Guest(4, 50, codes=(2,))
        with serve_processes(tmp_path, url, 1) as (stopped,):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(carry, vm, url)
                await until(lambda: len(stopped.ran()) > 20)
                stopped.process.send_signal(signal.SIGSTOP)
                handler = Work()
                async with served(url, handler) as server:
                    await until(lambda: len(vm.resumed) == 200)
                    counts = server._vms and next(iter(server._vms.values())).session.counts
            stopped.process.send_signal(signal.SIGCONT)
            ran = stopped.ran()
        assert not set(ran) & set(handler.asked)
        assert len(vm.wrong) == (counts.refused if counts else len(vm.wrong)) <= 4
        assert all(answer.rax is None for _, _, answer in vm.wrong)

    async def test_nats_that_is_restarted_loses_no_trap_and_no_handler_runs_twice(self, nats):
        url = f"{nats.url}?silence=1.5"
        handlers = [Work(), Work()]
        vm = Guest(8, 400)
        async with (
            served(url, handlers[0], settings=LONG, repeated="run"),
            served(url, handlers[1], settings=LONG, repeated="run"),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(carry, vm, url)
            for count in (500, 1500):
                await until(lambda count=count: len(vm.resumed) > count)
                nats.stop()
                await anyio.sleep(0.1)
                nats.start()
        assert not vm.wrong
        assert sorted(vm.resumed) == list(range(1, 3201))
        asked = handlers[0].asked + handlers[1].asked
        assert len(asked) == len(set(asked)) == 3200
        assert all(done == asked for done, asked in map(vm.counted, range(8)))

    async def test_the_agent_waits_for_a_server_and_the_guest_goes_on_when_one_comes(self, nats):
        vm = Guest(2, 40)
        handlers = [Work(), Work()]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: carry(vm, nats.url, longest_pause=0.05))
            await anyio.sleep(0.2)
            assert not vm.resumed
            async with served(nats.url, handlers[0], settings=LONG) as server:
                await until(lambda: len(vm.resumed) > 20)
                server.stop()
                await until(lambda: not server.vms)
            done = len(vm.resumed)
            assert done < 80
            async with served(nats.url, handlers[1], settings=LONG):
                await until(lambda: len(vm.resumed) == 80)
        assert not vm.wrong
        assert sorted(handlers[0].asked + handlers[1].asked) == list(range(1, 81))

    async def test_at_its_deadline_a_trap_is_answered_by_the_agent_and_the_handler_cancelled(
        self, nats
    ):
        handler = Work()
        vm = Guest(1, 1, codes=(5,))
        async with served(nats.url, handler, settings=LONG):
            agent, _ = await carry(vm, nats.url, deadline=0.2)
            await until(lambda: handler.cancelled)
        assert agent.counts.own == 1
        assert vm.wrong

    async def test_a_guest_goes_on_at_its_deadline_while_nats_is_gone(self, nats):
        handler = Work()
        vm = Guest(2, 30, codes=(1, 2))
        async with served(nats.url, handler), anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: carry(vm, f"{nats.url}?silence=0.2", deadline=0.1))
            await until(lambda: len(vm.resumed) > 10)
            nats.stop()
            with anyio.fail_after(20):
                await until(lambda: len(vm.resumed) == 60)
        assert vm.wrong

    async def test_a_vm_that_begins_anew_is_served_at_once_when_its_agent_was_killed(self, nats):
        first = Guest(1, 1, codes=(5,))
        handlers = []

        def make(vm):
            handlers.append(Work())
            return handlers[-1]

        server = AgentServer([nats.url], make, settings=LONG)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            await server.listening.wait()
            async with anyio.create_task_group() as agents:
                agents.start_soon(carry, first, nats.url)
                await until(lambda: handlers and handlers[0].asked)
                agents.cancel_scope.cancel()
            second = Guest(1, 5)
            with anyio.fail_after(5):
                await carry(second, nats.url)
            assert not second.wrong
            server.stop(now=True)

    async def test_two_agents_cannot_be_one_vm(self, nats):
        handler = Work()
        vm = Guest(1, 1, codes=(5,))
        async with served(nats.url, handler, settings=LONG), anyio.create_task_group() as tasks:
            tasks.start_soon(carry, vm, nats.url)
            await until(lambda: handler.asked)
            with anyio.move_on_after(0.5) as waited:
                await carry(Guest(1, 1), nats.url)
            assert waited.cancelled_caught
            handler.go_on.set()
        assert not vm.wrong


class TestWhoMayConnect:
    ACCOUNTS = """
        authorization { users = [
            { user: web, password: "s3cret-w" }
            { user: host, password: "s3cret-h" }
        ] }
    """

    async def test_with_its_credentials_an_agent_is_served(self, tmp_path):
        file = tmp_path / "password"
        file.write_text("s3cret-w\n")
        vm = Guest(2, 10)
        with nats_server(tmp_path, self.ACCOUNTS) as nats:
            async with served(f"{nats.url}?user=host&password=s3cret-h", Work()):
                agent, _ = await carry(vm, f"{nats.url}?user=web&password-file={file}")
        assert agent.counts.answered == 20

    # As docs/remote.md has them.
    RIGHTS = """
        authorization { users = [
            { user: web, password: w, permissions: {
                publish: ["vmibridge.hello.web", "vmibridge.web.>", "_INBOX.>"]
                subscribe: "_INBOX_web.>" } }
            { user: host, password: h, permissions: {
                publish: ["_INBOX.>", "_INBOX_web.>"]
                subscribe: ["vmibridge.>", "_INBOX.>"] } }
        ] }
    """

    async def test_with_rights_for_one_vm_an_agent_is_that_vm_and_no_other(self, tmp_path):
        with nats_server(tmp_path, self.RIGHTS) as nats:
            here = f"{nats.url}?user=web&password=w&inbox=_INBOX_web"
            async with served(f"{nats.url}?user=host&password=h", Work()) as server:
                agent, _ = await carry(Guest(2, 10), here)
                assert agent.counts.answered == 20
                with anyio.move_on_after(0.5) as waited:
                    await carry(Guest(2, 10, vm="db"), here)
                assert waited.cancelled_caught
                assert "db" not in server.vms

    @pytest.mark.parametrize("options", ["", "?user=web&password=s3cret-x", "?token=s3cret-t"])
    async def test_wrong_ones_end_in_an_error_that_does_not_say_them(
        self, tmp_path, options, caplog
    ):
        caplog.set_level("DEBUG")
        with nats_server(tmp_path, self.ACCOUNTS) as nats:
            for attempt in (
                carry(Guest(1, 1), nats.url + options),
                AgentServer([nats.url + options], Work).run(),
            ):
                with pytest.raises(BackendError, match="wrong credentials") as raised:
                    await attempt
                assert "s3cret" not in f"{raised.value!r} {raised.value.__cause__!r}"
        assert "s3cret" not in caplog.text

    async def test_a_token_and_an_nkey_do_as_well(self, tmp_path):
        import base64

        import nkeys

        raw = nkeys.encode_seed(b"7" * 32, nkeys.PREFIX_BYTE_USER)
        public = nkeys.from_seed(bytearray(raw)).public_key.decode()
        seed = tmp_path / "seed"
        seed.write_bytes(raw)
        assert base64.b32decode(raw + b"=" * (-len(raw) % 8))
        config = f"authorization {{ users = [ {{ nkey: {public} }} ] }}"
        for config_, options in (
            (config, f"?nkey={seed}"),
            ("authorization { token: s3cret-t }", "?token=s3cret-t"),
        ):
            with nats_server(tmp_path, config_) as nats:
                async with served(nats.url + options, Work()):
                    agent, _ = await carry(Guest(1, 3), nats.url + options)
            assert agent.counts.answered == 3

    async def test_tls_proves_both_ends(self, tmp_path):
        made = Certificates(tmp_path)
        there = dict(each.split("=") for each in made.of("127.0.0.1").split("&"))
        config = f"""tls {{ cert_file: "{there["cert"]}", key_file: "{there["key"]}",
                            ca_file: "{there["ca"]}", verify: true }}"""
        other = tmp_path / "other"
        other.mkdir()
        with nats_server(tmp_path, config) as nats:
            url = nats.url.replace("nats:", "tls:")
            async with served(f"{url}?{made.of('host.example')}", Work()):
                agent, _ = await carry(Guest(1, 3), f"{url}?{made.of('agent.example')}")
            assert agent.counts.answered == 3
            with pytest.raises(BackendError, match="certificate"):
                await carry(Guest(1, 1), f"{url}?ca={Certificates(other).ca}")

    async def test_no_nats_is_an_error_for_a_server(self, tmp_path):
        with nats_server(tmp_path) as nats:
            pass
        with pytest.raises(BackendError, match=r"127\.0\.0\.1"):
            await AgentServer([nats.url], Work).run()


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
        async with (
            served(nats.url, handler) as server,
            plain_client(nats.url) as stranger,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(carry, vm, nats.url)
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
        told = []

        async def take(message):
            told.append(message.data)

        async with served(nats.url, Work()) as server, plain_client(nats.url) as stranger:
            await stranger.subscribe("mine.*", cb=take)
            for subject in ("vmibridge.hello.web", trap_subject("web", ask(1))):
                await stranger.publish(subject, data, reply="mine.no")
            await stranger.flush()
            await stranger.publish("vmibridge.hello.db", data, reply="mine.yes")
            await until(lambda: told)
            assert server.vms == ["db"]
        assert len(told) == 1
