"""`vmibridge health`: whether somebody listens, in its exit status and in one line."""

import os
import socket
import threading
from contextlib import closing, contextmanager

import pytest
from children import run
from probe_guest import command

from vmibridge.cli import main
from vmibridge.health.ask import ask_quickly


@contextmanager
def listening(family, address, greeting=None):
    """Takes one connection, and says `greeting`, or else keeps what the other one says."""
    heard = []
    with closing(socket.socket(family)) as listener:
        listener.bind(address)
        listener.listen(1)

        def take():
            connected, _ = listener.accept()
            with connected:
                if greeting is None:
                    heard.append(connected.recv(100))
                else:
                    connected.sendall(greeting)

        taking = threading.Thread(target=take)
        taking.start()
        yield listener.getsockname(), heard
        taking.join(10)


@pytest.fixture
def health(capsys):
    def ask(*arguments):
        status = main(["health", *arguments])
        told = capsys.readouterr()
        return status, (told.out or told.err).rstrip("\n")

    return ask


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VMIBRIDGE_HEALTH", raising=False)
    monkeypatch.delenv("VMIBRIDGE_HEALTH_SOCKET", raising=False)
    return tmp_path


def test_a_socket_that_is_listening_is_healthy_and_hears_nothing(folder, health):
    with listening(socket.AF_UNIX, "vmi.sock") as (_, heard):
        assert health("unix:vmi.sock") == (0, "unix:vmi.sock: listening")
    assert heard == [b""]


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"], ids=["host", "any"])
def test_a_port_that_is_listening_is_healthy(scheme, host, health):
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as ((_, port), heard):
        where = f"{scheme}:{host}:{port}"
        assert health(f"{where}?cert=a&key=b") == (0, f"{where}: listening")
    assert heard == [b""]


def test_an_ipv6_address_is_in_brackets(health):
    with listening(socket.AF_INET6, ("::1", 0)) as ((_, port, *_), _):
        assert health(f"tcp:[::1]:{port}")[0] == 0


def test_nats_is_healthy_when_it_has_greeted(health):
    with listening(socket.AF_INET, ("127.0.0.1", 0), b"INFO {}\r\n") as ((_, port), _):
        assert health(f"nats://127.0.0.1:{port},other:4222?user=web")[0] == 0


def test_what_greets_otherwise_is_no_nats(health):
    with listening(socket.AF_INET, ("127.0.0.1", 0), b"SSH") as ((_, port), _):
        where = f"nats://127.0.0.1:{port}"
        told = f"vmibridge: {where}: listening, but not as a NATS server"
        assert health(where) == (1, told)


def test_what_says_nothing_in_time_is_no_nats(health):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        where = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        told = f"vmibridge: {where}: no answer in 0.05 s"
        assert health(where, "--within", "0.05") == (1, told)


def test_a_socket_whose_owner_has_gone_is_not_healthy(folder, health):
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind("vmi.sock")
    assert health("unix:vmi.sock") == (1, "vmibridge: unix:vmi.sock: nothing listens here")


def test_a_port_that_is_free_is_not_healthy(health):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        where = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
    assert health(where) == (1, f"vmibridge: {where}: nothing listens here")


def test_a_path_without_a_file_is_not_healthy(folder, health):
    told = (1, "vmibridge: unix:none/vmi.sock: there is no such file")
    assert health("unix:none/vmi.sock") == told


def test_a_file_that_is_no_socket_is_not_healthy(folder, health):
    (folder / "vmi.sock").touch()
    assert health("unix:vmi.sock") == (1, "vmibridge: unix:vmi.sock: is not a socket")


def test_any_other_failure_is_told_as_the_system_tells_it(folder, health):
    (folder / "file").touch()
    assert health("unix:file/vmi.sock") == (1, "vmibridge: unix:file/vmi.sock: Not a directory")


@pytest.mark.parametrize(
    "where", ["vmi.sock", "unix:", "tcp:host", "tcp::7000", "tls:host:http", "tcp:host:65536"]
)
def test_what_is_no_place_is_wrong_usage(where, health):
    status, told = health(where)
    assert status == 2
    assert told.endswith("a place is unix:PATH, tcp:HOST:PORT, tls:HOST:PORT or nats://HOST:PORT")


def test_a_password_is_not_shown(health):
    told = "vmibridge: a user and a password are not used here: leave them out"
    assert health("nats://web:secret@queue:4222") == (2, told)


@pytest.mark.parametrize("within", ["0", "-1", "inf", "nan"])
def test_the_time_is_a_number_of_seconds(within, health):
    status, told = health("unix:vmi.sock", f"--within={within}")
    assert (status, told) == (2, f"vmibridge: --within {within}: give seconds above 0")


def test_nats_has_a_port_of_its_own(folder, health, monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    for where in ("nats://queue", "nats://[::1]", "nats://queue:4333"):
        assert health(where) == (1, f"vmibridge: {where}: nothing listens here")
    assert asked == [("queue", 4222), ("::1", 4222), ("queue", 4333)]


def test_without_a_place_the_environment_says_where(folder, health, monkeypatch):
    told = (
        "vmibridge: say whom to ask: --health-socket PATH, or VMIBRIDGE_HEALTH_SOCKET;"
        " or where to look: unix:PATH, or VMIBRIDGE_HEALTH"
    )
    assert health() == (2, told)
    monkeypatch.setenv("VMIBRIDGE_HEALTH", "unix:vmi.sock")
    assert health() == (1, "vmibridge: unix:vmi.sock: there is no such file")


def test_as_a_command_it_ends_with_that_status(folder):
    done = run(command("health"), env={**os.environ, "VMIBRIDGE_HEALTH": "unix:vmi.sock"})
    assert (done.returncode, done.stderr) == (
        1,
        "vmibridge: unix:vmi.sock: there is no such file\n",
    )


# --- of a process that has a health socket: the rest is in test_process_health -----------


NOT_THERE = (1, "vmibridge: not ready: not-running: none.sock: nothing listens here")


def test_a_health_socket_is_asked_before_a_place_of_the_environment(folder, health, monkeypatch):
    monkeypatch.setenv("VMIBRIDGE_HEALTH", "unix:vmi.sock")
    monkeypatch.setenv("VMIBRIDGE_HEALTH_SOCKET", "none.sock")
    assert health() == NOT_THERE
    assert health("--ready", "--within=1") == NOT_THERE
    assert health("unix:x.sock") == (1, "vmibridge: unix:x.sock: there is no such file")
    monkeypatch.setenv("VMIBRIDGE_HEALTH_SOCKET", "")
    assert health() == (1, "vmibridge: unix:vmi.sock: there is no such file")


def test_an_option_names_the_socket_before_the_environment(folder, health, monkeypatch):
    monkeypatch.setenv("VMIBRIDGE_HEALTH_SOCKET", "another.sock")
    assert health("--health-socket", "none.sock") == NOT_THERE


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--live", "--ready"], "--live and --ready: ask one of them at a time"),
        (["--live"], "--live asks a process: give its --health-socket PATH, and no place"),
        (["--json"], "--json asks a process: give its --health-socket PATH, and no place"),
        (["--started", "unix:x.sock"], "--started asks a process: give its --health-socket PATH"),
    ],
    ids=["two", "nobody", "json", "place"],
)
def test_a_check_asks_one_process_one_thing(folder, health, arguments, told):
    status, line = health(*arguments)
    assert status == 2
    assert line.startswith(f"vmibridge: {told}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--live", "--ready"], ["--within", "0"], ["--within=x"], ["--within"], ["--what"],
        ["unix:x.sock"], ["--help"], ["--health-socket"], ["--health-socket", "--live"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_quick_way_leaves_what_is_wrong_or_else_to_the_command_line(monkeypatch, arguments):
    monkeypatch.setenv("VMIBRIDGE_HEALTH_SOCKET", "none.sock")
    assert ask_quickly(arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [[], ["--ready"], ["--within", "0.5"], ["--within=1", "--health-socket=none.sock"]],
    ids=lambda each: " ".join(each) or "none",
)
def test_the_quick_way_says_what_the_command_line_says(
    folder, health, monkeypatch, capsys, arguments
):
    monkeypatch.setenv("VMIBRIDGE_HEALTH_SOCKET", "none.sock")
    assert health(*arguments) == NOT_THERE
    assert ask_quickly(arguments) == 1
    assert capsys.readouterr().err == f"{NOT_THERE[1]}\n"


def test_a_peer_that_is_no_vmibridge_is_not_believed(folder, health):
    with listening(socket.AF_UNIX, "vmi.sock", b"SSH-2.0\x1b[2J\n"):
        told = "vmibridge: not ready: not-running: vmi.sock: what listens here is no vmibridge"
        assert health("--health-socket=vmi.sock") == (1, told)
    (folder / "vmi.sock").unlink()
    with listening(socket.AF_UNIX, "vmi.sock", b"fail \x1b[2J"):
        assert health("--health-socket=vmi.sock") == (1, "vmibridge: \\x1b[2J")
