"""`vmibridge qemu stop`, with a real QEMU and a guest that powers off by its power button."""

import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest
from children import run
from needs import needs
from qcow2 import empty_disk

GUEST = Path(__file__).parents[1] / "integration/guests/power_button.asm"
QUICK = ["--within", "0.5"]
LONG = ["--within", "100"]


@pytest.fixture
def guest(tmp_path):
    def build(*defines):
        target = tmp_path / "guest.bin"
        run([needs("nasm"), "-f", "bin", *defines, GUEST, "-o", target], check=True)
        return target

    return build


@pytest.fixture
def start(tmp_path, children, qemu, guest):
    """`start(OPTIONS)`: a guest that is up, and whose monitor listens."""

    def start(*options, defines=(), is_new=True):
        machine = ["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-no-reboot"]
        machine += ["-debugcon", "stdio", "-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off"]
        process = children.start([qemu, *machine, "-kernel", guest(*defines), *options])
        if is_new:
            assert process.stdout.readline() == "up\n"
        # One that goes on says nothing of it.
        while not (tmp_path / "qmp").exists():
            assert process.poll() is None
            time.sleep(0.01)
        return process

    return start


@pytest.fixture
def disk(tmp_path):
    return ["-drive", f"if=ide,file={empty_disk(tmp_path / 'disk')},format=qcow2"]


@pytest.fixture
def stop(vmibridge, tmp_path):
    def stop(*options, at="qmp"):
        done = vmibridge("qemu", "stop", "--qmp", str(tmp_path / at), *options)
        return done.returncode, (done.stdout + done.stderr).replace(f"{tmp_path}/", "")

    return stop


def test_a_guest_powers_off_when_its_button_is_pressed(start, stop):
    process = start()
    assert stop("--powerdown", *LONG) == (0, "qmp: the guest has powered off\n")
    assert process.communicate() == ("off\n", "")
    assert process.returncode == 0


def test_qemu_ends_though_it_would_stay_behind_a_guest_that_is_off(start, stop):
    process = start("-no-shutdown")
    assert stop("--powerdown", *LONG) == (0, "qmp: the guest has powered off\n")
    assert process.wait() == 0


def test_a_guest_that_ignores_its_button_is_cut_off(start, stop):
    process = start(defines=["-DDEAF=1"])
    told = "vmibridge: qmp: the guest has not powered off in time, and was cut off\n"
    assert stop("--powerdown", *QUICK) == (1, told)
    assert process.communicate()[0] == ""


def test_without_more_it_is_cut_off_at_once(start, stop):
    process = start()
    assert stop() == (0, "qmp: QEMU has quit\n")
    assert process.communicate()[0] == ""


def test_a_guest_that_is_saved_goes_on_where_it_was_as_often_as_that_is_done(start, stop, disk):
    start(*disk)
    for _ in range(2):
        assert stop("--snapshot", "evicted", *LONG) == (0, "qmp: the guest is saved\n")
        process = start(*disk, "-loadvm", "evicted", is_new=False)
    assert stop("--powerdown", *LONG)[0] == 0
    assert process.communicate() == ("off\n", "")


@pytest.mark.parametrize(
    ("drives", "told"),
    [
        ([], "snapshot-save: no disk holds snapshots: give QEMU a disk in qcow2"),
        (
            ["-drive", "if=ide,index=1,file=raw,format=raw"],
            "snapshot-delete: Device 'ide0-hd1' is writable but does not support snapshots",
        ),
    ],
    ids=["no disk", "another disk"],
)
def test_a_guest_that_cannot_be_saved_goes_on(
    start, stop, disk, drives, told, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("raw").write_bytes(bytes(1 << 20))
    process = start(*(disk if drives else []), *drives)
    assert stop("--snapshot", "evicted", *LONG) == (1, f"vmibridge: qmp: {told}\n")
    assert stop("--powerdown", *LONG)[0] == 0
    assert process.communicate()[0] == "off\n"


# --- QEMU that has ended, and what is none ------------------------------------------------


def left_behind(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("leave", [lambda path: None, left_behind], ids=["no file", "a socket"])
def test_one_that_has_ended_need_not_be_stopped(stop, tmp_path, leave):
    leave(tmp_path / "qmp")
    assert stop("--powerdown") == (0, "qmp: QEMU has ended already\n")


def test_what_is_no_monitor_is_an_error(stop, tmp_path):
    (tmp_path / "file").write_text("")
    assert stop(at="file") == (1, "vmibridge: file: is not a socket\n")
    assert stop(at="none/qmp") == (1, "vmibridge: none/qmp: there is no folder none\n")
    assert stop(at="x" * 200)[1].endswith("AF_UNIX path too long\n")


@pytest.fixture
def monitor(tmp_path):
    """`monitor(ANSWERS)`: something that listens, and has one answer for each line."""
    threads, listener = [], socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp"))
    listener.listen()

    def serve(answers):
        with listener.accept()[0] as connected, connected.makefile("rwb", 0) as stream:
            stream.write(b'{"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 0}}}}\n')
            for answer in answers:
                command = msgspec.json.decode(stream.readline())
                stream.write(answer.replace("ID", str(command["id"])).encode() + b"\n")
            stream.read()

    def start(*answers):
        threads.append(threading.Thread(target=serve, args=(answers,)))
        threads[-1].start()

    yield start
    # Wakes one that nobody has connected to.
    listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(60)
    listener.close()


DONE = '{"return": {}, "id": ID}'
DRIVES = '{"return": [{"inserted": {"node-name": "d", "drv": "qcow2", "ro": false}}], "id": ID}'
REFUSED = '{"error": {"class": "GenericError", "desc": "not\\u001b[2J now"}, "id": ID}'


@pytest.mark.parametrize(
    ("options", "answers", "told"),
    [
        (["--powerdown"], [DONE, REFUSED], "system_powerdown: not\\x1b[2J now"),
        ([], [DONE, REFUSED], "quit: not\\x1b[2J now"),
        (
            ["--snapshot", "x"],
            [DONE, DRIVES, DONE, REFUSED, DONE],
            "snapshot-delete: not\\x1b[2J now",
        ),
        (
            ["--snapshot", "x"],
            [DONE, DRIVES, DONE, '{"event": "JOB_STATUS_CHANGE", "data": 1}\n' + DONE, DONE],
            "QEMU sent an invalid JOB_STATUS_CHANGE: Expected `object`, got `int`",
        ),
        (
            ["--snapshot", "x", "--within", "0.2"],
            [DONE, DRIVES, DONE, DONE, DONE],
            "snapshot-delete: not done in time",
        ),
    ],
    ids=["powerdown", "quit", "snapshot", "event", "time"],
)
def test_what_qemu_refuses_is_said(stop, monitor, options, answers, told):
    monitor(*answers)
    assert stop(*options) == (1, f"vmibridge: qmp: {told}\n")


def test_options_that_make_no_sense_are_refused(stop):
    for options, told in [
        (["--powerdown", "--snapshot", "x"], "--powerdown does not go with --snapshot"),
        (["--snapshot", ""], "--snapshot: a name has 1 to 255 bytes"),
        (["--snapshot", "a\nb"], "--snapshot: a name has 1 to 255 bytes"),
        (["--snapshot", "x" * 256], "--snapshot: a name has 1 to 255 bytes"),
        (["--within", "0"], "--within 0: give seconds above 0"),
        (["--within", "nan"], "--within nan: give seconds above 0"),
    ]:
        status, said = stop(*options)
        assert (status, told in said) == (2, True), said
