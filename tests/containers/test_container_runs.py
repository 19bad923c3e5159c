"""The images, built and run side by side by podman: a Linux guest in one, its handlers in another.

The guest checks each answer itself, and says at its end whether all was right.
"""

import os
from pathlib import Path

import pytest
from build_images import IMAGES
from container_parts import KERNEL, composed, inspected, kernel

pytestmark = pytest.mark.containers

COUNT = 40
CALLS = {"vmibridge": "user,kernel", "count": COUNT}
KEYS = """
import hashlib, json, os, pathlib
found = {}
for root, _, names in os.walk("/"):
    if root.startswith(("/proc", "/sys", "/dev")):
        continue
    for path in (pathlib.Path(root, name) for name in names if name.endswith((".pem", ".key"))):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if b"PRIVATE KEY" in data:
            found[str(path)] = hashlib.sha256(data).hexdigest()
print(json.dumps(found))
"""


def assert_all_right(lines, callers=18):
    """Programs in two widths and the module, by three instructions, on two CPUs."""
    told = [line.partition("vmibridge: ")[2].rstrip() for line in lines if "vmibridge: " in line]
    assert told[-1] == "all right", lines
    assert sum(f": right, {COUNT} calls" in line for line in told) == callers


# --- the plugin -------------------------------------------------------------------------


def test_a_guest_finishes_though_its_bridge_is_restarted(engine, guest, tmp_path):
    with composed(engine, "plugin", guest, VMIBRIDGE_APPEND=kernel(**CALLS)) as pair:
        pair.await_traps("bridge", 100)
        pair.restart("bridge")
        assert pair.wait("qemu") == 0
        assert_all_right(pair.logs("qemu"))
        assert pair.is_healthy("bridge")
        assert pair.stop("bridge") == 0, "by itself"
        logs = pair.logs("bridge")
        traps = pair.traps("bridge")
        recordings = pair.recordings("bridge", tmp_path)
    assert sum("SIGTERM: stopping" in line for line in logs) == 2
    assert not [line for line in logs if "ERROR" in line or "Traceback" in line]
    assert len(recordings) == 2, "one of each bridge"
    found = [inspected(recording)[0] for recording in recordings]
    assert all(found)
    assert sum(map(len, found)) == traps >= 18 * COUNT
    assert {trap["outcome"] for each in found for trap in each} == {"handled", "waiting"}


# --- over a network ---------------------------------------------------------------------


def test_over_tls_handlers_answer_elsewhere_and_each_side_has_its_own_key(engine, guest, tmp_path):
    with composed(engine, "tls", guest, VMIBRIDGE_APPEND=kernel(**CALLS)) as pair:
        pair.await_traps("server", 100)
        keys = {service: pair.python(service, KEYS) for service in ("agent", "server")}
        assert [*keys["agent"]] == [*keys["server"]] == ["/tls/key.pem"]
        assert keys["agent"] != keys["server"]
        assert pair.python("server", "import os; print(os.listdir('/run/vmibridge'))") == []
        assert "key" not in str(pair.inspect("qemu", "{{json .Mounts}}"))
        assert pair.wait("qemu") == 0
        assert_all_right(pair.logs("qemu"))
        for service in ("agent", "server"):
            assert pair.is_healthy(service)
            assert pair.stop(service) == 0
        (recording,) = pair.recordings("server", tmp_path)
        traps = pair.traps("server")
    found, _ = inspected(recording)
    assert len(found) == traps >= 18 * COUNT


def test_over_nats_three_servers_share_the_traps(engine, guest, tmp_path):
    servers = ["server-1", "server-2", "server-3"]
    with composed(engine, "nats", guest, VMIBRIDGE_APPEND=kernel(**CALLS)) as pair:
        assert pair.wait("qemu") == 0
        assert_all_right(pair.logs("qemu"))
        for service in ("agent-nats", *servers):
            assert pair.is_healthy(service)
        assert {pair.stop(service) for service in servers} == {0}
        recordings = pair.recordings("server-1", tmp_path)
        traps = [pair.traps(service) for service in servers]
    assert [recording.parent.name for recording in recordings] == servers
    assert [len(inspected(recording)[0]) for recording in recordings] == traps
    assert all(traps)
    assert sum(traps) >= 18 * COUNT


# --- without the plugin -----------------------------------------------------------------


def qemu_alone(engine, *arguments, options=(), stdin=None):
    command = ["run", "--rm", "-i", "--read-only", "--cap-drop=ALL", "--network=none", *options]
    return engine.run(
        *command,
        IMAGES["qemu"],
        *("-nodefaults", "-no-reboot", "-display", "none"),
        *arguments,
        capture_output=True,
        text=True,
        input=stdin,
        seconds=120,
    )


def test_a_stock_qemu_is_served_by_breakpoints_at_the_sites_of_the_guests_build(
    engine, guest, tmp_path
):
    append = f"{KERNEL} nokaslr vmibridge=user count={COUNT}"
    with composed(engine, "gdb", guest, VMIBRIDGE_APPEND=append) as pair:
        assert pair.wait("qemu-gdb") == 0
        assert_all_right(pair.logs("qemu-gdb"), callers=6)
        assert pair.wait("bridge-gdb") == 0
        traps = pair.traps("bridge-gdb")
        (recording,) = pair.recordings("bridge-gdb", tmp_path)
    assert len(inspected(recording)[0]) == traps >= 6 * COUNT


def test_a_guest_calls_by_the_device(engine, guest, tmp_path):
    append = kernel(vmibridge="sysfs,driver,shared", count=COUNT, programs=2)
    with composed(engine, "device", guest, VMIBRIDGE_APPEND=append) as pair:
        pair.await_traps("bridge-device", 1)
        assert pair.is_healthy("bridge-device")
        assert pair.wait("qemu-device") == 0
        assert_all_right(pair.logs("qemu-device"), callers=9)
        assert pair.wait("bridge-device") == 0
        traps = pair.traps("bridge-device")
        (recording,) = pair.recordings("bridge-device", tmp_path)
    assert len(inspected(recording)[0]) == traps >= 9 * COUNT


def test_qemu_gets_kvm_when_the_device_is_passed_through(engine):
    device = Path("/dev/kvm")
    if not os.access(device, os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm here")
    options = ["--device=/dev/kvm", f"--group-add={device.stat().st_gid}"]
    machine = ["-accel", "kvm", "-M", "none", "-monitor", "stdio"]
    done = qemu_alone(engine, *machine, options=options, stdin="info kvm\nquit\n")
    assert done.returncode == 0, done.stderr
    assert "kvm support: enabled" in done.stdout
    done = qemu_alone(engine, *machine, options=options[:1], stdin="quit\n")
    told = f"/dev/kvm is for the group {device.stat().st_gid}: VMIBRIDGE_KVM_GROUP="
    assert (done.returncode, told in done.stderr) == (1, True), done.stderr
    done = qemu_alone(engine, *machine, stdin="quit\n")
    assert (done.returncode, "there is no /dev/kvm" in done.stderr) == (1, True), done.stderr
