"""`vmibridge health`: whether somebody listens, in its exit status and in one line."""

import os
import socket
import threading
from contextlib import closing, contextmanager

import pytest
from children import run
from probe_guest import command

from vmibridge.cli import main


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
    assert (status, told.split(":")[1]) == (2, " --within")


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
    told = "vmibridge: say where to look: unix:PATH, or VMIBRIDGE_HEALTH"
    assert health() == (2, told)
    monkeypatch.setenv("VMIBRIDGE_HEALTH", "unix:vmi.sock")
    assert health() == (1, "vmibridge: unix:vmi.sock: there is no such file")


def test_as_a_command_it_ends_with_that_status(folder):
    done = run(command("health"), env={**os.environ, "VMIBRIDGE_HEALTH": "unix:vmi.sock"})
    assert (done.returncode, done.stderr) == (
        1,
        "vmibridge: unix:vmi.sock: there is no such file\n",
    )
