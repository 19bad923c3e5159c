"""Units, installed as docs/systemd.md says and run by a real systemd, with real guests."""

import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import trustme
from booted_systemd import CHECKOUT, booted, cgroups
from children import run
from container_parts import kernel
from needs import needs

pytestmark = pytest.mark.containers

ROOT = Path(__file__).parents[2]
COUNT = 20
BUTTON = "GUEST='-m 32 -kernel /var/lib/vmibridge-qemu-{0}/guest -debugcon file:{1}'\n"
LINUX = """\
GUEST="-m 256 -smp 2 -kernel {0}/vmlinuz -initrd {0}/initrd -append '{1}'"
"""


def steps():
    """The commands of the page that install."""
    text = (ROOT / "docs/systemd.md").read_text()
    part = text.partition("\n## Install\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


def files(upper, qemu, guest):
    """What the page expects to be there: a checkout with a wheel, QEMU, and guests."""
    checkout = upper / CHECKOUT.lstrip("/")
    for name in ("systemd", "docs"):
        shutil.copytree(ROOT / name, checkout / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    run([*build, checkout / "dist", ROOT], check=True, seconds=600)
    _install_qemu(upper, Path(qemu).resolve())
    for name in ("vmlinuz", "initrd"):
        target = upper / "var/lib/vmibridge-qemu-linux" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(guest / name, target)
    source = ROOT / "tests/integration/guests/power_button.asm"
    target = upper / "var/lib/vmibridge-qemu-web/guest"
    target.parent.mkdir()
    run([needs("nasm"), "-f", "bin", source, "-o", target], check=True)
    handlers = upper / "etc/vmibridge/handlers"
    handlers.mkdir(parents=True)
    shutil.copy(ROOT / "guest/linux/exchange.py", handlers)
    _certificates(upper / "etc/vmibridge")


def _install_qemu(upper, program):
    """That of the tests as the system's own. One of a checkout may be where systemd has a /tmp."""
    if not program.is_relative_to("/usr"):
        shutil.copytree(program.parent, upper / "opt/qemu", symlinks=True)
        (upper / "usr/bin").mkdir(parents=True)
        (upper / "usr/bin/qemu-system-x86_64").symlink_to(f"/opt/qemu/{program.name}")


def _certificates(folder):
    authority = trustme.CA()
    for unit, name in (("linux", "agent"), ("pool", "localhost")):
        made = authority.issue_cert(name)
        (folder / unit).mkdir(mode=0o700)
        authority.cert_pem.write_to_path(folder / unit / "ca.pem")
        made.private_key_pem.write_to_path(folder / unit / "key.pem")
        made.cert_chain_pems[0].write_to_path(folder / unit / "cert.pem")


@pytest.fixture(scope="module")
def system(tmp_path_factory, qemu, guest):
    """systemd with the units installed, none of them started."""
    if os.geteuid() or cgroups() is None:
        pytest.skip("boots a systemd: that needs root, and version 2 of cgroups")
    needs("systemd-analyze")
    folder = tmp_path_factory.mktemp("systemd")
    (folder / "upper").mkdir()
    files(folder / "upper", qemu, guest)
    with booted(folder) as system:
        for step in steps():
            system.run("sh", "-euc", step, has_network=True, check=True, seconds=600)
        log = "/var/lib/vmibridge-qemu-web/log"
        system.write("/etc/vmibridge/web.env", BUTTON.format("web", log))
        # As an administrator would: sooner than after 30 s.
        own = "/etc/systemd/system/vmibridge-run@web.service.d"
        system.run("mkdir", own, check=True)
        system.write(f"{own}/watchdog.conf", "[Service]\nWatchdogSec=10\n")
        system.systemctl("daemon-reload")
        append = kernel(vmibridge="user,kernel", count=COUNT)
        place = "/var/lib/vmibridge-qemu-linux"
        system.write("/etc/vmibridge/linux.env", LINUX.format(place, append))
        yield system


@pytest.fixture
def web(system):
    """A VM that runs, with its bridge."""
    system.systemctl("enable", "vmibridge-run@web")
    system.systemctl("start", "vmibridge-qemu@web")
    system.wait(lambda: log(system) == "up\n", "the guest is up")
    yield system
    system.systemctl("stop", "vmibridge-qemu@web", "vmibridge-run@web")
    system.systemctl("disable", "vmibridge-run@web")


def log(system):
    return system.read("/var/lib/vmibridge-qemu-web/log")


def process(system, command):
    return int(system.shows(f"vmibridge-{command}@web", "MainPID"))


def await_another(system, command, before):
    """Until it runs again, as another process."""

    def is_there():
        is_another = process(system, command) not in (0, before)
        return is_another and system.shows(f"vmibridge-{command}@web", "ActiveState") == "active"

    system.wait(is_there, f"another {command}")


def test_qemu_starts_its_bridge_and_presses_its_power_button_at_the_end(web):
    assert web.shows("vmibridge-run@web", "ActiveState") == "active"
    assert web.shows("vmibridge-run@web", "StatusText") == "ready"
    asked = ["vmibridge", "health", "--ready", "--health-socket", "/run/vmibridge-web/health.sock"]
    assert web.run(f"/opt/vmibridge/bin/{asked[0]}", *asked[1:]).stdout == "ready\n"
    # As a shutdown does: both are to be stopped at once.
    web.systemctl("disable", "vmibridge-run@web")
    web.systemctl("isolate", "multi-user.target")
    for command in ("qemu", "run"):
        state = partial(web.shows, f"vmibridge-{command}@web", "ActiveState")
        web.wait(lambda state=state: state() == "inactive", f"the end of {command}")
    assert log(web) == "up\noff\n"
    told = web.journal("--unit=vmibridge-*@web.service")
    assert told.index("the guest has powered off") < told.index("SIGTERM: stopping")
    for command in ("qemu", "run"):
        assert web.shows(f"vmibridge-{command}@web", "Result") == "success"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("killed", "status=9/KILL"),
        ("restarted", "SIGTERM: stopping"),
        ("stuck", "Watchdog timeout"),
    ],
)
def test_a_guest_goes_on_while_its_bridge_is_another(web, how, told):
    qemu, bridge = process(web, "qemu"), process(web, "run")
    if how == "killed":
        web.systemctl("kill", "--signal=KILL", "vmibridge-run@web")
    elif how == "restarted":
        web.systemctl("restart", "vmibridge-run@web")
    else:
        web.run("kill", "-STOP", str(bridge), check=True)
    await_another(web, "run", bridge)
    assert told in web.journal("--unit=vmibridge-run@web")
    assert process(web, "qemu") == qemu
    assert log(web) == "up\n"
    web.systemctl("stop", "vmibridge-qemu@web")
    assert log(web) == "up\noff\n"


def test_a_reload_is_done_when_handlers_are_loaded_again(web):
    bridge = process(web, "run")
    web.systemctl("reload", "vmibridge-run@web")
    web.wait(lambda: "handlers reloaded" in web.journal("--unit=vmibridge-run@web"), "a reload")
    web.wait(lambda: web.shows("vmibridge-run@web", "ActiveState") == "active", "its end")
    assert process(web, "run") == bridge


def test_qemu_without_a_bridge_does_not_start_and_tries_again(system):
    system.systemctl("start", "vmibridge-qemu@alone", status=1)
    assert "there is no such file" in system.journal("--unit=vmibridge-qemu@alone")
    assert system.shows("vmibridge-qemu@alone", "SubState") == "auto-restart"
    system.systemctl("stop", "vmibridge-qemu@alone")


def test_an_agent_waits_for_its_server_and_a_guest_runs_to_its_end(system):
    system.systemctl("enable", "vmibridge-agent@linux")
    system.systemctl("start", "vmibridge-agent@linux")
    status = system.shows("vmibridge-agent@linux", "StatusText")
    assert "not ready: server-unreachable" in status
    system.systemctl("start", "vmibridge-serve@pool")
    system.wait(lambda: system.shows("vmibridge-agent@linux", "StatusText") == "ready", "ready")
    system.systemctl("start", "vmibridge-qemu@linux")
    unit = "vmibridge-qemu@linux"
    system.wait(lambda: system.shows(unit, "ActiveState") == "inactive", "the guest is done")
    assert system.shows(unit, "ExecMainStatus") == "0"
    told = system.journal(f"--unit={unit}").replace("\r", "")
    assert "vmibridge: all right\n" in told
    assert told.count(f": right, {COUNT} calls") == 18
    system.systemctl("stop", "vmibridge-agent@linux", "vmibridge-serve@pool")
    assert system.shows("vmibridge-serve@pool", "Result") == "success"
    system.systemctl("disable", "vmibridge-agent@linux")
