"""Every test that touches an event loop runs on each loop that users may choose."""

import gc
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import adopt_orphans, children, descendants, left_processes, reset_signals, run
from hypothesis import HealthCheck, settings
from nats_parts import nats_server
from needs import may_skip

__all__ = ["children"]  # a fixture

ROOT = Path(__file__).parents[1]
UNPACKED = ROOT / ".qemu/qemu-system-x86_64"


def pytest_configure(config: pytest.Config) -> None:
    """No law depends on how busy the machine is. The rest is as hypothesis has it, in CI too."""
    name = "untimed"
    settings.register_profile(
        name, settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile(name)
    if hasattr(config, "workerinput"):
        end_early_coverage()
    reset_signals()
    adopt_orphans()
    gc.disable()  # until all is collected: see `pytest_collection_finish`


def end_early_coverage() -> None:
    """A worker of xdist has begun coverage twice by now: as each child does (`patch = subprocess`),
    and by pytest-cov 7.1, which begins it a third time with the session. They are a stack: when
    `no_cover` pauses the upper one, the next below would go on counting."""
    if "coverage" in sys.modules:
        while begun := sys.modules["coverage"].Coverage.current():
            begun.stop()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session):
    """What importing our modules runs is the same in each worker, and collecting takes more than
    twice as long where it is counted: the first worker counts it for all."""
    plugin = session.config.pluginmanager.get_plugin("_cov")
    controller = plugin and plugin.cov_controller
    worker = getattr(session.config, "workerinput", {}).get("workerid", "gw0")
    if controller is None or worker == "gw0":
        return (yield)
    controller.pause()
    try:
        return (yield)
    finally:
        controller.resume()


COUNTS_CHILDREN = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage is gathered on asyncio. On the other loops the same lines of ours run but for a few,
    and counting them takes half of the time of a test. In a process that a test runs it costs as
    much as the start of a command does, so it is gathered in those of `tests/cli` alone, and of a
    test with several parameters with the first ones."""
    seen = set()
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and ("trio" in call.id or "uvloop" in call.id):
            item.add_marker(pytest.mark.no_cover)
        name = item.nodeid.partition("[")[0]
        is_counted = not item.get_closest_marker("no_cover") and name not in seen
        item.stash[COUNTS_CHILDREN] = is_counted and item.path.is_relative_to(ROOT / "tests/cli")
        seen.add(name)


def pytest_collection_finish() -> None:
    """Twelve thousand tests are a million objects, which the garbage collector need not visit
    while they are made, nor again with each test that makes much garbage."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def only_new_garbage():
    """For tests that call `gc.collect`: it does not visit what is alive before their module, which
    takes 60 ms in a process that has run some thousand tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def children_are_counted_where_that_shows_more(request, monkeypatch):
    if not request.node.stash[COUNTS_CHILDREN]:
        for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def uncounted(request):
    """`with uncounted():` no coverage in a block that runs the same lines many thousand times.

    For fixtures; a test has the mark `no_cover`.
    """
    plugin = request.config.pluginmanager.get_plugin("_cov")
    controller = plugin and plugin.cov_controller

    @contextmanager
    def block():
        if controller is None:
            yield
            return
        controller.pause()
        try:
            yield
        finally:
            controller.resume()

    return block


@pytest.fixture(autouse=True, scope="session")
def no_process_is_left_at_the_end():
    yield
    left = left_processes()
    assert not left, f"left at the end: {left}"


@pytest.fixture(autouse=True)
def no_process_is_left(no_process_is_left_at_the_end):
    """What fixtures of a wider scope run is known by now."""
    known = descendants()
    yield
    left = left_processes(known)
    assert not left, f"the test left running: {left}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every test was skipped has shown nothing, and fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != pytest.ExitCode.OK:
        return
    if reporter.stats.get("skipped") and not reporter.stats.get("passed"):
        reporter.write_line("every test was skipped: nothing was tested", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request):
    return request.param


def new_enough(path: str) -> bool:
    told = run([path, "--version"]).stdout
    version = re.search(r"version (\d+)\.(\d+)", told)
    return version is not None and (int(version[1]), int(version[2])) >= (11, 1)


@pytest.fixture(scope="session")
def qemu() -> str:
    """A QEMU that has plugins which may write registers."""
    if given := os.environ.get("VMIBRIDGE_QEMU"):
        assert new_enough(given), f"VMIBRIDGE_QEMU={given} is no QEMU of 11.1 or newer"
        return given
    system = shutil.which("qemu-system-x86_64")
    for path in (str(UNPACKED), system):
        if path and os.access(path, os.X_OK) and new_enough(path):
            return path
    if may_skip():
        pytest.skip("no QEMU of 11.1 or newer: run `make qemu`, or set VMIBRIDGE_QEMU")
    run([ROOT / "guest/qemu/fetch-qemu"], check=True, seconds=600)
    return str(UNPACKED)


@pytest.fixture
def nats(tmp_path):
    """A NATS server of its own, without passwords."""
    with nats_server(tmp_path) as server:
        yield server
