"""Who may connect to a real NATS, and publish where."""

import logging
from contextlib import asynccontextmanager

import anyio
import nkeys
import pytest
from nats_jwt import Operator, public_key, seed_of
from nats_parts import ON_ASYNCIO, PASSWORDS, Guest, Work, fail, nats_server
from remote_parts import carry, served
from waiting import until

from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import BackendError
from vmibridge.transport import AgentServer

pytestmark = ON_ASYNCIO

LONG = ServerSettings(timeout=3600)
REFUSED = "NATS refuses us: wrong credentials, or none"


def by_password(folder):
    file = folder / "password"
    file.write_text("s3cret-w\n")
    return (PASSWORDS, f"user=web&password-file={file}", "user=host&password=s3cret-h",
            "user=web&password=s3cret-x")  # fmt: skip


def by_token(folder):
    file = folder / "token"
    file.write_text("s3cret-t\n")
    return ("authorization { token: s3cret-t }", f"token-file={file}", "token=s3cret-t",
            "token=s3cret-x")  # fmt: skip


def by_nkey(folder):
    seeds = [seed_of(nkeys.PREFIX_BYTE_USER, number) for number in range(3)]
    files = [folder / f"seed-{number}" for number in range(3)]
    for file, seed in zip(files, seeds, strict=True):
        file.write_bytes(seed + b"\n")
    users = [f"{{ nkey: {public_key(seed)} }}" for seed in seeds[:2]]
    return (f"authorization {{ users = [ {', '.join(users)} ] }}",
            *[f"nkey={file}" for file in files])  # fmt: skip


def by_credentials(folder):
    operator = Operator()
    files = (
        operator.credentials(folder / "web.creds"),
        operator.credentials(folder / "host.creds"),
        operator.credentials(folder / "old.creds", seconds=-60),
    )
    return (operator.config, *[f"credentials={file}" for file in files])


@pytest.fixture(params=[by_password, by_token, by_nkey, by_credentials])
def way(request, tmp_path):
    """The configuration of NATS; the options of an agent, of a server, and wrong ones."""
    return request.param(tmp_path)


@asynccontextmanager
async def carried(vm, url, **options):
    """The run of a guest that is not at its end."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: carry(vm, url, **options))
        yield
        tasks.cancel_scope.cancel()


class TestCredentials:
    async def test_with_its_own_an_agent_is_served_by_a_server_with_its_own(self, tmp_path, way):
        config, agents, servers, _ = way
        vm = Guest(2, 10)
        with nats_server(tmp_path, config) as nats:
            async with served(f"{nats.url}?{servers}", Work()):
                agent, _ = await carry(vm, f"{nats.url}?{agents}")
        assert agent.counts.answered == 20
        assert not vm.wrong

    async def test_wrong_ones_and_none_are_refused_in_one_error_without_them(
        self, tmp_path, way, caplog
    ):
        caplog.set_level("DEBUG")
        config, _, _, wrong = way
        with nats_server(tmp_path, config) as nats:
            for options in (wrong, "inbox=_INBOX"):
                said = await fail(f"{nats.url}?{options}")
                assert said == [f"{nats.url}: {REFUSED}"] * 2
        assert "s3cret" not in caplog.text

    @pytest.mark.parametrize(
        ("option", "content", "says"),
        [
            ("credentials", "", "holds no JWT of a user"),
            ("credentials", "-----BEGIN NATS USER JWT-----\neyJ0\n", "holds no seed of an nkey"),
            ("credentials",
             "---BEGIN NATS USER JWT---\r\neyJ0\r\n---BEGIN USER NKEY SEED---\r\nSUA\r\n",
             "holds no seed of an nkey"),
            ("nkey", "", "holds no seed of an nkey"),
            ("nkey", "s3cret", "holds no seed of an nkey"),
            ("nkey", "S" * 58, "holds no seed of an nkey"),
            ("ca", "s3cret", "no certificate or crl found"),
            ("cert", "s3cret", "holds no PEM"),
        ],
    )  # fmt: skip
    async def test_a_file_that_holds_none_is_named_before_nats_is_asked(
        self, tmp_path, option, content, says
    ):
        file = tmp_path / "file"
        file.write_text(content)
        more = f"&key={file}" if option == "cert" else ""
        for each in await fail(f"nats://127.0.0.1:1?{option}={file}{more}"):
            assert each.endswith(f"{file}: {says}")
            assert f" {option}: " in each

    async def test_credentials_that_end_are_read_again_when_they_are_renewed(
        self, tmp_path, caplog
    ):
        operator = Operator()
        mine = operator.credentials(tmp_path / "web.creds", seconds=2)
        theirs = operator.credentials(tmp_path / "host.creds")
        vm = Guest(1, 100_000, codes=(2,))
        with nats_server(tmp_path, operator.config) as nats:
            async with (
                # The trap that was on its way when NATS closed the connection is marked.
                served(f"{nats.url}?credentials={theirs}", Work(), settings=LONG, repeated="run"),
                carried(vm, f"{nats.url}?credentials={mine}", longest_pause=0.1),
            ):
                await until(lambda: "; trying again" in caplog.text)
                done = len(vm.resumed)
                operator.credentials(mine)
                await until(lambda: len(vm.resumed) > done + 100)
        assert not vm.wrong
        assert done > 0

    async def test_so_they_are_by_a_server_which_tries_again_until_then(self, tmp_path, caplog):
        operator = Operator()
        mine = operator.credentials(tmp_path / "host.creds", seconds=2)
        theirs = operator.credentials(tmp_path / "web.creds")
        vm = Guest(1, 100_000, codes=(2,))
        work = Work()
        with nats_server(tmp_path, operator.config) as nats:
            async with (
                served(f"{nats.url}?credentials={mine}", work, settings=LONG, repeated="run"),
                carried(vm, f"{nats.url}?credentials={theirs}&silence=5"),
            ):
                await until(lambda: f"{REFUSED}; trying again" in caplog.text)
                done = len(vm.resumed)
                operator.credentials(mine)
                await until(lambda: len(vm.resumed) > done + 100)
        assert "NATS has closed the connection; trying again" in caplog.text
        assert not vm.wrong
        assert len(work.asked) == len(set(work.asked))

    async def test_a_file_that_is_broken_when_it_is_read_again_is_told_until_it_is_whole(
        self, tmp_path, caplog
    ):
        operator = Operator()
        mine = operator.credentials(tmp_path / "web.creds")
        theirs = operator.credentials(tmp_path / "host.creds")
        whole = mine.read_text()
        vm = Guest(1, 100_000, codes=(2,))
        with nats_server(tmp_path, operator.config) as nats:
            async with (
                served(f"{nats.url}?credentials={theirs}", Work(), settings=LONG, repeated="run"),
                carried(vm, f"{nats.url}?credentials={mine}&silence=5"),
            ):
                await until(lambda: vm.resumed)
                nats.stop()
                mine.write_text("")
                nats.start()
                await until(lambda: "does not hold them any more; trying again" in caplog.text)
                mine.write_text(whole)
                done = len(vm.resumed)
                await until(lambda: len(vm.resumed) > done + 100)
        assert not vm.wrong


class TestThatAreTakenAway:
    """NATS is restarted, and does not know us any more."""

    OTHER = PASSWORDS.replace("s3cret", "other")

    async def test_an_agent_says_so_once_and_its_guest_goes_on_at_the_deadline(
        self, tmp_path, caplog
    ):
        vm = Guest(1, 100_000, codes=(2,))
        with nats_server(tmp_path, PASSWORDS) as nats:
            here = f"{nats.url}?user=web&password=s3cret-w"
            async with (
                served(f"{nats.url}?user=host&password=s3cret-h", Work()),
                carried(vm, here, deadline=0.1),
            ):
                await until(lambda: len(vm.resumed) > 10)
                nats.stop()
                nats.configure(self.OTHER)
                nats.start()
                await until(lambda: len(vm.wrong) > 5)
                # Agent and server, each once, though they go on trying.
                await until(lambda: caplog.text.count(f"{REFUSED}; trying again") == 2)
                nats.stop()
                nats.configure(PASSWORDS)
                nats.start()
                done = len(vm.resumed)
                await until(lambda: len(vm.resumed) - len(vm.wrong) > done)
        assert caplog.text.count(f"{REFUSED}; trying again") == 2
        assert "s3cret" not in caplog.text


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
AGENT = "user=web&password=w&inbox=_INBOX_web"
SERVER = "user=host&password=h"


class TestRights:
    @pytest.fixture
    def nats(self, tmp_path):
        with nats_server(tmp_path, RIGHTS) as server:
            yield server

    async def test_with_those_for_one_vm_an_agent_is_that_vm_and_no_other(self, nats):
        async with served(f"{nats.url}?{SERVER}", Work()) as server:
            agent, _ = await carry(Guest(2, 10), f"{nats.url}?{AGENT}")
            assert agent.counts.answered == 20
            with pytest.raises(BackendError) as raised:
                await carry(Guest(2, 10, vm="db"), f"{nats.url}?{AGENT}")
            assert "db" not in server.vms
        assert str(raised.value) == (
            f'{nats.url}: NATS does not permit publish to "vmibridge.hello.db"'
        )

    async def test_an_agent_that_may_not_listen_is_told_so(self, nats):
        with pytest.raises(BackendError, match=r'not permit subscription to "_inbox\.'):
            await carry(Guest(1, 1), f"{nats.url}?user=web&password=w")

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            (f"{SERVER}&subject=mine.*.*.*", r'"mine\.\*\.\*\.\*" using queue "vmibridge"'),
            (f"{SERVER}&inbox=_INBOX_host", r'"_inbox_host\.'),
            (AGENT, r'"vmibridge\.\*\.agent\.all\.\*"'),
        ],
    )
    async def test_and_so_is_a_server(self, nats, options, what):
        with pytest.raises(BackendError, match=f"not permit subscription to {what}"):
            await AgentServer([f"{nats.url}?{options}"], lambda _: Work()).run()

    async def test_a_server_that_may_not_answer_says_so_and_the_agent_that_nobody_does(
        self, nats, caplog, monkeypatch
    ):
        monkeypatch.setattr("vmibridge.transport.nats.agent_link.WELCOME_SECONDS", 0.3)
        # Not the inbox that this user may listen at, nor the server publish to.
        nats.stop()
        nats.configure(RIGHTS.replace('"_INBOX.>", "_INBOX_web.>"]\n', '"_INBOX.>"]\n'))
        nats.start()
        async with (
            served(f"{nats.url}?{SERVER}", Work()),
            carried(Guest(1, 1), f"{nats.url}?{AGENT}"),
        ):
            await until(lambda: 'not permit publish to "_inbox_web.' in caplog.text)
            await until(lambda: "no server has said WELCOME in 0.3 s" in caplog.text)

    async def test_a_trap_that_may_not_be_published_is_told_and_answered_at_its_deadline(
        self, nats, caplog
    ):
        nats.stop()
        nats.configure(RIGHTS.replace('"vmibridge.web.>"', '"vmibridge.web.agent.>"'))
        nats.start()
        vm = Guest(1, 2)
        async with served(f"{nats.url}?{SERVER}", Work()):
            agent, _ = await carry(vm, f"{nats.url}?{AGENT}", deadline=0.2)
        assert agent.counts.own == 2
        told = [each.message for each in caplog.records if each.levelno == logging.WARNING]
        assert sum('"vmibridge.web.42494d56.0100"' in each for each in told) == 1
