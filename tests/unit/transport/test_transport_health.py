"""What an agent and a server of agents say of their health, over sockets."""

import socket
from contextlib import asynccontextmanager, closing

import anyio
import pytest
from remote_parts import Echo, Steps, served
from waiting import until

from vmibridge import BridgeHandler
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.taps import Hindrance, Tap
from vmibridge.errors import RecordingError
from vmibridge.testing import FakeGuest
from vmibridge.transport import Agent, AgentServer
from vmibridge.transport.session import Session

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def idle_agent(url, vm="web", **options):
    async def guest(_):
        await anyio.sleep_forever()

    async with FakeGuest(guest, vm=vm) as backend, anyio.create_task_group() as tasks:
        agent = Agent(backend, url, longest_pause=0.05, **options)
        assert codes(agent) == ["starting"], "before it runs"
        tasks.start_soon(agent.run)
        yield agent
        tasks.cancel_scope.cancel()


def codes(part):
    return [each.code for each in part.health()]


def texts(part):
    return [each.text for each in part.health()]


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path}/x.sock"


async def test_an_agent_has_a_reason_as_long_as_it_has_no_server(url):
    async with idle_agent(url) as agent:
        await until(lambda: texts(agent) == [f"vm web: {url}: No such file or directory"])
        async with served(url, Echo()) as server:
            await until(lambda: not codes(agent))
            assert not codes(server)
        await until(lambda: codes(agent) == ["server-unreachable"])
        assert agent.health()[0].fails == "ready"


async def test_a_server_that_falls_silent_is_unreachable(url, monkeypatch):
    """As one that is stopped, or behind a network that drops everything."""
    async with idle_agent(url, silence=0.3) as agent, served(url, Echo()):
        await until(lambda: not codes(agent))
        monkeypatch.setattr(Session, "take", lambda *_: None)
        await until(lambda: codes(agent) == ["server-unreachable"])


async def test_a_peer_that_accepts_and_never_says_welcome_is_no_server(tmp_path, url, monkeypatch):
    monkeypatch.setattr("vmibridge.transport.agent.dial.WELCOME_SECONDS", 0.05)
    with closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.bind(str(tmp_path / "x.sock"))
        silent.listen()
        async with idle_agent(url) as agent:
            await until(lambda: texts(agent) == [f"vm web: {url}: no answer in time"])


async def test_a_server_starts_serves_and_stops(url):
    server = AgentServer([url], lambda _: Steps())
    assert codes(server) == ["starting"]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        await server.listening.wait()
        assert not codes(server)
        server.stop()
        assert codes(server) == ["stopping"]


class Fails(BridgeHandler[int]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100

    async def handle(self, vmi, packet):
        raise AssertionError

    async def __aenter__(self):
        raise RuntimeError("told to")

    async def __aexit__(self, *_):
        pass


async def test_handlers_of_one_vm_that_fail_are_told_until_those_of_another_begin(url):
    """A guest that could choose that does not take the server from others."""

    def handlers(vm):
        if vm == "bad":
            raise RuntimeError("cannot be made")
        return Fails() if vm == "worse" else Echo()

    server = AgentServer([url], handlers)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        await server.listening.wait()
        for vm, why in (
            ("bad", "RuntimeError: cannot be made"),
            ("worse", "RuntimeError: told to"),
        ):
            async with idle_agent(url, vm=vm):
                await until(lambda: codes(server) == ["handlers-failed"])
                (reason,) = server.health()
                assert reason.fails is None
                assert reason.text.startswith(f"vm {vm}: ")
                assert why in reason.text
            async with idle_agent(url, vm="good"):
                await until(lambda: not codes(server))
        server.stop(now=True)


async def test_a_vm_that_keeps_its_handlers_at_a_reload_is_told_until_the_next_one(url):
    async with served(url, Echo()) as server, idle_agent(url):
        await until(lambda: server.vms)
        await server.reload(lambda _: Fails())
        assert ("reload-failed", "vm web: keeps its handlers", None) in [
            (each.code, each.text, each.fails) for each in server.health()
        ]
        await server.reload(lambda _: Echo())
        assert not codes(server)


class Recording(Tap):
    """A recorder that says how it is."""

    def __init__(self, error=None):
        self.error = error

    async def __aenter__(self):
        if self.error:
            raise self.error

    async def __aexit__(self, *_):
        pass


@pytest.mark.parametrize(("kind", "code"), [("disk full", "disk-full"), ("not recording",) * 2])
@pytest.mark.parametrize("holds", [True, False], ids=["stop", "continue"])
async def test_a_recording_that_is_hindered_fails_ready_where_it_holds_guests(
    url, kind, code, holds
):
    tap = Recording()
    async with served(url, Echo(), taps=lambda _: [tap]) as server, idle_agent(url):
        await until(lambda: server.vms)
        assert not codes(server)
        tap.hindrance = Hindrance(kind, "web-1.mcap: why", holds)
        (reason,) = server.health()
        assert (reason.code, reason.text) == (code.replace(" ", "-"), "web-1.mcap: why")
        assert reason.fails == ("ready" if holds else None)


async def test_vms_that_cannot_be_recorded_are_not_served(url):
    broken = Recording(RecordingError("web-1.mcap: Read-only file system"))
    taps = [broken]
    async with served(url, Echo(), taps=lambda _: taps) as server, idle_agent(url) as agent:
        await until(lambda: codes(server) == ["not-recording"])
        assert server.health()[0].fails == "ready"
        taps.clear()
        await until(lambda: not codes(server) and not codes(agent))
