"""The health of real processes: each way not to serve is told apart, on both loops."""

import os
import signal
import socket
import threading
from contextlib import closing, contextmanager

import pytest
from asked_health import asked, await_health
from probe_guest import ENDLESS, calls, command

LOOPS = {"asyncio": [], "uvloop": ["--uvloop"], "trio": ["--async-backend", "trio"]}
every_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)

HANDLERS = """
import sys, time
from pathlib import Path
import anyio
from vmibridge import BridgeHandler, BridgeResponse, method

class Probe(BridgeHandler[int]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = VERIFY_VALUE4 = None

    async def __aenter__(self):
        while Path("enter").exists():
            await anyio.sleep(0.01)
        return self

    async def __aexit__(self, *error):
        pass

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(value1=packet.value1 + 1)

    @method(2)
    async def block(self, vmi, packet):
        print("blocks", file=sys.stderr, flush=True)
        while Path("block").exists():
            time.sleep(0.01)
        return BridgeResponse()
"""
SOCKET = "health.sock"


@pytest.fixture
def started(children, tmp_path, monkeypatch):
    """`with started(ARGUMENTS) as process`, in the folder of the test, with a health socket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.py").write_text(HANDLERS)

    @contextmanager
    def start(*arguments, path=SOCKET, **options):
        line = command(*arguments, "--health-socket", path)
        with children.start(line, cwd=tmp_path, **options) as process:
            yield process

    return start


def run_options(guest, *more):
    return ["run", "--backend", f"unicorn:{guest}", "--handlers", "probe.py", *more]


def serve_options(*more):
    return ["serve", "--listen", "unix:x.sock", "--handlers", "probe.py", *more]


def agent_options(guest, *more):
    spec = f"web=unicorn:{guest}"
    return ["agent", "--backend", spec, "--connect", "unix:x.sock", *more]


@contextmanager
def drained(process):
    """What it prints is read, so that it can go on."""
    reading = threading.Thread(target=process.stdout.read)
    reading.start()
    try:
        yield
    finally:
        process.kill_all()
        reading.join()


@every_loop
def test_under_a_flood_of_traps_each_question_is_answered(started, image, loop):
    with started(*run_options(image(ENDLESS), *loop)) as run, drained(run):
        await_health(SOCKET, process=run)
        for check in ("live", "started", "ready") * 20:
            assert asked(SOCKET, check)["ok"]


@every_loop
def test_a_stopped_process_is_told_from_one_that_runs(started, loop):
    with started(*serve_options(*loop)) as serve:
        await_health(SOCKET, process=serve)
        serve.send_signal(signal.SIGSTOP)
        for check in ("live", "ready"):
            report = await_health(SOCKET, "process-stopped", check=check, within=0.05)
            text = f"process {serve.pid} is stopped by a signal"
            assert report["reasons"] == [{"code": "process-stopped", "text": text, "fails": "live"}]
        serve.send_signal(signal.SIGCONT)
        await_health(SOCKET, process=serve)


@every_loop
def test_a_handler_that_blocks_the_loop_is_not_live_while_it_does(started, image, tmp_path, loop):
    (tmp_path / "block").touch()
    guest = image(calls(2, tail="jmp $"))
    with started(*run_options(guest, *loop)) as run:
        assert run.stderr.readline() == "blocks\n"
        report = await_health(SOCKET, "loop-blocked", check="live", within=0.2)
        text = f"no answer in 0.2 s: the event loop of process {run.pid} is blocked"
        assert report["reasons"][0]["text"] == text
        (tmp_path / "block").unlink()
        await_health(SOCKET, process=run)


@every_loop
def test_it_has_not_started_before_its_handlers_are_entered(started, image, tmp_path, loop):
    (tmp_path / "enter").touch()
    with started(*run_options(image("jmp $"), *loop)) as run:
        report = await_health(SOCKET, "starting", process=run)
        while report["reasons"][0]["text"] != "vm vm: its handlers are being entered":
            report = await_health(SOCKET, "starting", process=run)
        assert (report["live"], report["started"]) == (True, False)
        (tmp_path / "enter").unlink()
        assert await_health(SOCKET, process=run)["started"]


@every_loop
def test_an_agent_is_live_and_not_ready_while_its_server_is_gone(started, image, loop):
    agent_socket = "agent.sock"
    guest = image(calls(1, tail="jmp $"))
    with started(*agent_options(guest, *loop), path=agent_socket) as agent:
        report = await_health(agent_socket, "server-unreachable", process=agent)
        assert (report["live"], report["started"]) == (True, True)
        with started(*serve_options(*loop)):
            await_health(agent_socket, process=agent)
        # It was killed.
        report = await_health(agent_socket, "server-unreachable", process=agent)
        assert report["live"]
        while "Connection refused" not in report["reasons"][0]["text"]:
            report = await_health(agent_socket, "server-unreachable", process=agent)
        assert report["reasons"][0]["text"] == "vm web: unix:x.sock: Connection refused"
        with started(*serve_options(*loop)):
            await_health(agent_socket, process=agent)


@every_loop
def test_a_reload_that_fails_is_told_and_the_handlers_of_before_are_ready(
    started, image, tmp_path, loop
):
    with started(*run_options(image("jmp $"), *loop)) as run:
        await_health(SOCKET, process=run)
        (tmp_path / "probe.py").write_text("class Half(Bri")
        run.send_signal(signal.SIGHUP)
        report = await_health(SOCKET, "reload-failed", process=run)
        assert report["ready"]
        assert (
            "the handlers stay as they are: probe.py:1: SyntaxError"
            in (report["reasons"][0]["text"])
        )
        (tmp_path / "probe.py").write_text(HANDLERS)
        run.send_signal(signal.SIGHUP)
        await_health(SOCKET, process=run)


def test_a_stop_is_live_and_not_ready(started, image, tmp_path):
    """As long as a handler takes to end."""
    config = tmp_path / "c.toml"
    config.write_text("[server]\ngrace = 30\nstop_timeout = 60\n")
    (tmp_path / "slow.py").write_text(
        HANDLERS.replace("time.sleep(0.01)", "await anyio.sleep(0.01)")
    )
    (tmp_path / "block").touch()
    line = ["run", "--backend", f"unicorn:{image(calls(2))}", "--handlers", "slow.py"]
    with started(*line, "--config", str(config), "--timeout", "60") as run:
        assert run.stderr.readline() == "blocks\n"
        run.send_signal(signal.SIGTERM)
        report = await_health(SOCKET, "stopping", process=run)
        assert (report["live"], report["started"]) == (True, True)
        (tmp_path / "block").unlink()
        assert run.wait() == 143
    assert not (tmp_path / SOCKET).exists()


def test_the_socket_of_a_process_that_was_killed_is_no_health_and_is_taken_over(started, tmp_path):
    with started(*serve_options()) as serve:
        await_health(SOCKET, process=serve)
    assert (tmp_path / SOCKET).is_socket(), "it was killed"
    report = asked(SOCKET)
    text = "health.sock: nothing listens here"
    assert report["reasons"] == [{"code": "not-running", "text": text, "fails": "live"}]
    with started(*serve_options()) as serve:
        await_health(SOCKET, process=serve)


def test_a_second_process_at_the_path_ends_and_the_first_one_goes_on(started, vmibridge):
    with started(*serve_options()) as serve:
        await_health(SOCKET, process=serve)
        for send in (signal.SIGSTOP, signal.SIGCONT):
            serve.send_signal(send)
            again = serve_options("--listen", "unix:y.sock", "--health-socket", SOCKET)
            done = vmibridge(*again)
            told = f"vmibridge: --health-socket {SOCKET}: address already in use; name another path"
            assert (done.returncode, done.stderr) == (2, f"{told}\n")
        await_health(SOCKET, process=serve)


def test_an_empty_path_of_the_environment_is_no_health_socket(children, tmp_path):
    """As for a second process in a container, whose image names one for the first."""
    environment = {**os.environ, "VMIBRIDGE_HEALTH_SOCKET": ""}
    (tmp_path / "probe.py").write_text(HANDLERS)
    with children.start(command(*serve_options()), cwd=tmp_path, env=environment) as serve:
        assert "listening at" in serve.stderr.readline()
        assert {path.name for path in tmp_path.iterdir() if path.is_socket()} == {"x.sock"}


# --- systemd ----------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path):
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(60)
        yield made


def notices_to(manager, word):
    """Those up to one that has this line."""
    found = []
    while not found or word not in found[-1].split("\n"):
        found.append(manager.recv(4096).decode())
    return found


def watched(path, seconds):
    return {
        **os.environ, "NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(round(seconds * 1e6)),
    }  # fmt: skip


@every_loop
def test_a_service_manager_hears_of_start_reload_and_stop(started, image, tmp_path, manager, loop):
    options = run_options(image("jmp $"), *loop)
    with started(*options, env=watched(tmp_path / "notify", 3600)) as run:
        assert "STATUS=ready" in notices_to(manager, "READY=1")[-1]
        (tmp_path / "probe.py").write_text("class Half(Bri")
        run.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in notices_to(manager, "RELOADING=1")[-1]
        notices_to(manager, "READY=1")
        status = manager.recv(4096).decode()
        assert status.startswith("STATUS=ready; reload-failed: the handlers stay as they are")
        run.send_signal(signal.SIGTERM)
        notices_to(manager, "STOPPING=1")
        assert run.wait() == 143


@every_loop
def test_a_loop_that_is_blocked_feeds_no_watchdog(started, image, tmp_path, manager, loop):
    (tmp_path / "block").touch()
    options = run_options(image(calls(2, tail="jmp $")), *loop)
    with started(*options, env=watched(tmp_path / "notify", 0.2)) as run:
        assert run.stderr.readline() == "blocks\n"
        manager.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                manager.recv(4096)
        manager.settimeout(60)
        (tmp_path / "block").unlink()
        notices_to(manager, "WATCHDOG=1")
