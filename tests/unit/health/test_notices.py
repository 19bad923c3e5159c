"""What a service manager is sent: as sd_notify(3) has it, and over a real datagram socket."""

import itertools
import os
import socket
from contextlib import closing

import anyio
import pytest

from vmibridge.errors import VmiBridgeError
from vmibridge.health.notices import Notices
from vmibridge.health.reporting import run_reporting
from vmibridge.health.state import Health, Reason

GONE = Reason("server-unreachable", "vm web: gone")
STARTING = Reason("starting", "handlers", "started")
STUCK = Reason("overdue", "for ever", "live")


class Machine:
    """The notices of a process whose reasons a test gives."""

    def __init__(self, watchdog=None):
        self.notices = Notices("/run/notify", watchdog)
        self.health = Health()
        self.reasons = [STARTING]
        self.health.add(lambda: self.reasons)

    def look(self, now=0.0):
        return [each.decode() for each in self.notices.look(self.health.report("ready"), now)]

    def event(self, event, now=0.0):
        sent = self.notices.event(event, now)
        return None if sent is None else sent.decode()


def test_it_is_ready_once_it_has_started_wherever_its_server_is():
    machine = Machine()
    assert machine.look() == ["STATUS=not ready: starting: handlers"]
    assert machine.look() == []
    machine.reasons = [GONE]
    told = "not ready: server-unreachable: vm web: gone"
    assert machine.look() == [f"READY=1\nSTATUS={told}"]
    machine.reasons = []
    assert machine.look() == ["STATUS=ready"]
    machine.reasons = [STARTING]
    assert machine.look() == ["STATUS=not ready: starting: handlers"], "READY comes once"


def test_a_reload_begins_and_ends():
    machine = Machine()
    assert machine.event("reloading") is None, "before it is ready"
    assert machine.event("reloaded") is None
    machine.reasons = []
    machine.look()
    assert machine.event("reloading", 12.5) == "RELOADING=1\nMONOTONIC_USEC=12500000"
    assert machine.event("reloaded") == "READY=1"


def test_a_stop_is_told_at_any_time_and_no_reload_follows():
    machine = Machine()
    assert machine.event("stopping").startswith("STOPPING=1")
    machine.reasons = []
    assert machine.look() == ["STATUS=ready"], "no READY after STOPPING"
    assert machine.event("reloading") is None


def test_the_watchdog_is_fed_within_half_of_its_time_and_only_by_what_is_live():
    machine = Machine(watchdog=10.0)
    machine.reasons = []
    machine.look(0.0)
    now, fed = 0.0, [0.0]
    while now < 60:
        now += machine.notices.pause
        if "WATCHDOG=1" in machine.look(now):
            fed.append(now)
    gaps = [after - before for before, after in itertools.pairwise(fed)]
    assert max(gaps) <= 5.0
    assert min(gaps) >= 3.0, "and not with each look"
    machine.reasons = [STUCK]
    assert "WATCHDOG=1" not in machine.look(now + 60)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 3.0, 600.0])
def test_a_pause_is_never_longer_than_half_of_the_watchdog(seconds):
    machine = Machine(watchdog=seconds)
    assert machine.notices.pause <= seconds / 4
    machine.reasons = []
    machine.look()
    assert machine.notices.pause <= seconds / 4


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": "/run/n"}, ("/run/n", None)),
        ({"NOTIFY_SOCKET": "@n"}, ("\0n", None)),
        ({"NOTIFY_SOCKET": "vsock:2:1"}, None),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000"}, ("/n", 1.5)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "0"}, ("/n", None)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "x"}, ("/n", None)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "4", "WATCHDOG_PID": "1"}, ("/n", None)),
        (
            {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())},
            ("/n", 2.0),
        ),
    ],
)
def test_the_environment_says_whom_to_tell_and_children_do_not_inherit_it(environment, found):
    notices = Notices.taken_from(environment)
    assert (notices and (notices.address, notices.half)) == found
    assert environment == {}


# --- over a socket ----------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    address = str(tmp_path / "notify")
    if request.param == "abstract":
        address = f"\0vmibridge-test-{os.getpid()}-{request.node.name}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as made:
        made.bind(address)
        made.setblocking(False)
        yield address, made


async def notice(made):
    await anyio.wait_readable(made)
    return made.recv(4096).decode().split("\n")


@pytest.mark.anyio
async def test_a_manager_hears_of_the_whole_life(manager):
    address, made = manager
    health, told = Health(), []
    reasons = [STARTING]
    health.add(lambda: reasons)

    async def main():
        told.append(await notice(made))
        reasons.clear()
        told.append(await notice(made))
        health.reload_begins()
        told.append(await notice(made))
        health.reload_ends()
        told.append(await notice(made))
        health.stop_begins()
        told.append(await notice(made))
        return 7

    with anyio.fail_after(60):
        assert await run_reporting(main, health, path=None, notices=Notices(address)) == 7
    assert [each[0] for each in told] == [
        "STATUS=not ready: starting: handlers", "READY=1", told[2][0], "READY=1", "STOPPING=1",
    ]  # fmt: skip
    assert told[2][0] == "RELOADING=1"


@pytest.mark.anyio
async def test_a_watchdog_is_fed_by_the_loop(manager):
    address, made = manager

    async def main():
        fed = 0
        while fed < 5:
            fed += "WATCHDOG=1" in await notice(made)

    health = Health()
    health.add(tuple)
    with anyio.fail_after(60):
        await run_reporting(main, health, path=None, notices=Notices(address, 0.02))


@pytest.mark.anyio
async def test_a_manager_that_is_gone_hurts_nobody_and_misses_nothing_when_it_is_back(tmp_path):
    address = str(tmp_path / "notify")
    health = Health()
    health.add(tuple)

    async def main():
        for _ in range(100):
            health.reload_begins()
            await anyio.sleep(0)
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as made:
            made.bind(address)
            made.setblocking(False)
            health.stop_begins()
            while "STOPPING=1" not in await notice(made):
                pass

    with anyio.fail_after(60):
        await run_reporting(main, health, path=None, notices=Notices(address))


@pytest.mark.anyio
@pytest.mark.parametrize("error", [VmiBridgeError("as it is"), KeyboardInterrupt()], ids=["", "^C"])
async def test_what_ends_the_run_is_raised_as_it_is(tmp_path, error):
    path = tmp_path / "health.sock"

    async def main():
        raise error

    with pytest.raises(type(error)) as raised:
        await run_reporting(main, Health(), path=str(path), notices=Notices(str(tmp_path / "n")))
    assert raised.value is error
    assert not path.exists()


@pytest.mark.anyio
async def test_without_anyone_to_tell_nothing_runs_beside():
    async def main():
        return anyio.get_current_task().parent_id

    alone = await main()
    assert await run_reporting(main, Health(), path=None, notices=None) == alone
