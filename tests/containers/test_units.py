"""What can be said of systemd's units without running them."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from children import run
from needs import needs

from vmibridge.cli import main
from vmibridge.engine.settings import ServerSettings

FOLDER = Path(__file__).parents[2] / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
EXPOSED = {"agent": 1.2, "qemu": 0.4, "run": 0.4, "serve": 1.2}
"""`systemd-analyze security`, of 10: how exposed a unit may be. Two of them have a network."""
VMIBRIDGE = "/opt/vmibridge/bin/vmibridge"
QUITS = 10
"""Seconds that `vmibridge qemu stop` takes above its `--within`, at most."""

units = pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)


def name_of(path):
    (name,) = re.findall(r"vmibridge-(\w+)@\.service", path.name)
    return name


def values(path, key):
    return re.findall(f"^{key}=(.*)$", path.read_text(), re.MULTILINE)


@pytest.fixture
def analyze():
    path = needs("systemd-analyze")
    return lambda *arguments: run([path, *arguments])


@pytest.fixture
def instance(tmp_path):
    """A unit as an instance, beside the others and their drop-in, with commands that are there."""

    def install(path):
        there = shutil.which("true")
        for each in UNITS:
            text = each.read_text().replace(VMIBRIDGE, there)
            text = text.replace("/usr/bin/qemu-system-x86_64", there)
            for name in (each.name, each.name.replace("@", "@web")):
                (tmp_path / name).write_text(text)
        shutil.copytree(FOLDER / "vmibridge-.service.d", tmp_path / "vmibridge-.service.d")
        return str(tmp_path / path.name.replace("@", "@web"))

    return install


def test_there_is_a_unit_for_each_command_that_serves_and_for_qemu():
    assert [name_of(path) for path in UNITS] == list(EXPOSED)


@units
def test_systemd_understands_a_unit(path, instance, analyze):
    done = analyze("verify", "--man=no", instance(path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@units
def test_a_unit_is_confined(path, instance, analyze):
    limit = round(EXPOSED[name_of(path)] * 10)
    done = analyze("security", "--offline=true", f"--threshold={limit}", instance(path))
    assert done.returncode == 0, done.stdout


@units
def test_what_a_unit_records_and_prints_is_bounded(path):
    text = path.read_text()
    assert text.count("--record=") == text.count("--keep=")
    assert values(FOLDER / "vmibridge-.service.d/10-confined.conf", "LogRateLimitBurst") == [
        "10000"
    ]
    assert values(path, "MemoryMax")


@units
def test_a_unit_uses_options_that_there_are(path, capsys):
    lines = [
        line for key in ("ExecStartPre", "ExecStart", "ExecStop") for line in values(path, key)
    ]
    variables = [shlex.split(each)[0] for each in values(path, "Environment")]
    for line in lines:
        if not line.startswith(VMIBRIDGE):
            continue
        words = line.split()[1:]
        words += " ".join(each for each in variables if each.startswith("STOP=")).split()
        main([*(word for word in words[:2] if word.isalpha()), "--help"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--")), line


@units
def test_settings_need_no_file(path):
    """What a command line takes from the environment is set in the unit, or may be empty."""
    assert values(path, "EnvironmentFile") == ["-/etc/vmibridge/%i.env"]
    used = set(re.findall(r"\$\{(\w+)\}", path.read_text()))
    assert used <= {shlex.split(each)[0].partition("=")[0] for each in values(path, "Environment")}


@units
def test_a_unit_has_the_time_that_its_stop_takes(path):
    (seconds,) = map(int, values(path, "TimeoutStopSec"))
    if name_of(path) == "qemu":
        (within,) = re.findall(r"STOP=.*--within (\d+)", values(path, "Environment")[-1])
        assert seconds > int(within) + QUITS
    else:
        assert seconds > ServerSettings().grace + ServerSettings().stop_timeout


@pytest.mark.parametrize("command", ["agent", "run", "serve"])
def test_what_serves_tells_systemd_and_keeps_its_folder(command):
    path = FOLDER / f"vmibridge-{command}@.service"
    assert values(path, "Type") == ["notify"]
    assert values(path, "WatchdogSec") == ["30"]
    assert values(path, "RuntimeDirectoryPreserve") == ["restart"]
    assert "VMIBRIDGE_HEALTH_SOCKET=%t/vmibridge-%i/health.sock" in values(path, "Environment")


def test_qemu_starts_after_its_bridge_which_may_be_restarted_alone():
    """What is required is stopped with each restart, and a guest with it."""
    (after,) = values(FOLDER / "vmibridge-qemu@.service", "After")
    for path in UNITS:
        assert "Requires=" not in path.read_text()
        assert "RequiredBy=" not in path.read_text()
        assert "BindsTo=" not in path.read_text()
        (wanted,) = values(path, "WantedBy")
        is_bridge = name_of(path) in ("agent", "run")
        assert ("vmibridge-qemu@%i.service" in wanted.split()) == is_bridge
        assert (path.name.replace("@", "@%i") in after.split()) == is_bridge
