"""A plugin of pytest: tests of handlers, with guests, and tests that replay a recording.

    def test_greets(drive):
        assert drive(Greeter, "greet", "you", bytearray(32)).result == 10

    def test_from_a_guest(guest):
        guest.c("int main(void) { ... }", Greeter)

| fixture | gives |
|---|---|
| `drive` | a function that asks a handler, with fake guest memory |
| `guest` | a guest of some lines of C or assembly, run in Unicorn and answered by handlers |
| `recorded_session` | a function that asks handlers and records it in a new file |
| `replay` | the recording of the mark `recording` |

The first three are for tests without `async`; such a test runs once on asyncio and, where trio is
installed, once on trio.

    @pytest.mark.recording("run.mcap", Verdict)
    async def test_verdict(replay):
        await replay.until(17)
        ...

The fixture `replay` is a `Replay` that is entered: of the file, from the folder of the test, with
the further arguments and the keywords of the mark. When the test has passed, the rest is played,
and the test fails if something is different, with what `vmibridge replay` prints. With
`--recording-update` the answers of now are accepted: the file is rewritten.

Rules:

- pytest imports this module at each start, for whoever has vmibridge: it imports nothing but pytest
  until a test asks for a fixture. A mark of the same name without path and handler is left alone.
- A file is updated by one test at a time, in all workers of xdist: a test has its lock from before
  it is read until it is written. Nothing is written for a test that fails.
- Of two tests that want other answers of one request, the last one has them. That is told, by the
  requests that each has compared and changed.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmibridge.fixtures.driving import Drive
    from vmibridge.fixtures.guests import Guest
    from vmibridge.fixtures.images import Images
    from vmibridge.fixtures.sessions import RecordedSession
    from vmibridge.recording.replay.door import Replay

_MARK = "recording"
_LOOP = "vmibridge_loop"
_UPDATED = "recording_updated"
"""The property of a test that says which recording it has updated."""
_COMPARED = "recording_compared"
"""The property that says which requests of which recording it has compared, and changed, and when;
in JSON."""
_MAX_NAMED = 3
"""Tests that one line names."""
_replay: pytest.StashKey["Replay"] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--recording-update`."""
    parser.getgroup("vmibridge").addoption(
        "--recording-update",
        action="store_true",
        help="accept what handlers answer now, in the recordings that tests replay",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line(
        "markers",
        f"{_MARK}(path, *handlers, **options): the recording of the fixture `replay`, from the"
        " folder of the test; vmibridge.recording.Replay says what it takes",
    )
    if config.getoption("recording_update"):
        config.pluginmanager.register(_Updates())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what has a loop of its own on each kind."""
    if _LOOP in metafunc.fixturenames and _LOOP not in _directly(metafunc):
        loops = ["asyncio", *(["trio"] if find_spec("trio") else [])]
        metafunc.parametrize(_LOOP, loops, indirect=True)


def _directly(metafunc: pytest.Metafunc) -> set[str]:
    """What the test parametrizes itself."""
    names: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        given = mark.args[0] if mark.args else mark.kwargs.get("argnames", ())
        names.update(given.replace(",", " ").split() if isinstance(given, str) else given)
    return names


@pytest.fixture
def vmibridge_loop(request: pytest.FixtureRequest) -> str:
    """The kind of event loop of `drive`, `guest` and `recorded_session`: each in turn."""
    return str(getattr(request, "param", "asyncio"))


@pytest.fixture
def drive(vmibridge_loop: str) -> "Drive":
    """`drive(HANDLER, METHOD, *VALUES)` asks a handler and returns what came of it."""
    from vmibridge.fixtures.driving import Drive

    return Drive(vmibridge_loop)


@pytest.fixture(scope="session")
def vmibridge_images(tmp_path_factory: pytest.TempPathFactory) -> "Images":
    """The guests that were compiled, each once."""
    from vmibridge.fixtures.images import Images

    return Images(tmp_path_factory.mktemp("guests"))


@pytest.fixture
def guest(
    request: pytest.FixtureRequest, vmibridge_loop: str, vmibridge_images: "Images"
) -> "Guest":
    """`guest.c(SOURCE, *HANDLERS)` and `guest.asm(SOURCE, *HANDLERS)` run a guest in Unicorn."""
    from vmibridge.fixtures.guests import Guest

    return Guest(vmibridge_loop, vmibridge_images, request.path.parent)


@pytest.fixture
def recorded_session(vmibridge_loop: str, tmp_path: Path) -> "RecordedSession":
    """`recorded_session(HANDLER, (METHOD, VALUE, ...), ...)` returns a new recording."""
    from vmibridge.fixtures.sessions import RecordedSession

    return RecordedSession(vmibridge_loop, tmp_path)


@pytest.fixture
def replay_handlers() -> list[Any]:
    """Handlers of `replay` beside those of the mark: for those that are made of fixtures."""
    return []


@pytest.fixture
def replay(request: pytest.FixtureRequest, replay_handlers: list[Any]) -> Iterator["Replay"]:
    """The recording of the mark `recording`, ready to be played. The rest of it is played after the
    test."""
    node = request.node
    marks = list(node.iter_markers(_MARK))
    if len(marks) > 1:
        pytest.fail(
            f"a test replays one recording, and this one has {len(marks)} marks `{_MARK}`: for"
            " several, parametrize it or use vmibridge.recording.Replay",
            pytrace=False,
        )
    if not marks or not _has_path(marks[0]):
        pytest.fail(
            f"`replay` is of a test with @pytest.mark.{_MARK}(PATH, HANDLER)", pytrace=False
        )
    mark = marks[0]
    path, *handlers = mark.args
    file = request.path.parent / path
    updates = bool(request.config.getoption("recording_update"))
    with _lock(file) if updates else nullcontext():
        made = _begin(
            file, [*handlers, *replay_handlers], {**mark.kwargs, "accept": updates}, _loop(request)
        )
        node.stash[_replay] = made
        try:
            yield made
        finally:
            made.end()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A mark without the fixture would compare nothing."""
    names = getattr(item, "fixturenames", ())
    if "replay" not in names and any(map(_has_handler, item.iter_markers(_MARK))):
        pytest.fail(f"a test with @pytest.mark.{_MARK} has the fixture `replay`", pytrace=False)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Play the rest, and say what is different."""
    try:
        yield
    except BaseException:  # `pytest.fail` is no `Exception`; whatever it is goes on to pytest
        if _replay in item.stash:
            item.add_report_section("call", "replay", item.stash[_replay].report())
        raise
    if _replay in item.stash:
        _check(item, item.stash[_replay])


class _Updates:
    """Tells which recordings all workers have updated, and which tests contradict each other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._tests: list[tuple[str, dict[str, Any]]] = []
        """What each test has compared."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test is done."""
        if report.when == "call":
            for name, value in report.user_properties:
                if name == _UPDATED:
                    self._lines.append(str(value))
                elif name == _COMPARED:
                    self._tests.append((report.nodeid, json.loads(str(value))))

    def pytest_terminal_summary(self, terminalreporter: "pytest.TerminalReporter") -> None:
        """One line for each update, and for each test that is contradicted by one."""
        terminalreporter.section("recordings")
        for line in [*(self._lines or ["none was updated"]), *_contradictions(self._tests)]:
            terminalreporter.write_line(line)


def _contradictions(tests: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """A line for each update of requests that other tests had compared before, as they were."""
    tests = sorted(tests, key=lambda each: each[1]["time"])
    for place, (test, now) in enumerate(tests):
        before = {
            name: count
            for name, then in tests[:place]
            if name != test
            and then["file"] == now["file"]
            and (count := _common(then["compared"], now["changed"]))
        }
        if before:
            others = ", ".join([*before][:_MAX_NAMED])
            more = f" and {len(before) - _MAX_NAMED} more" if len(before) > _MAX_NAMED else ""
            most = max(before.values())
            requests = "1 request" if most == 1 else f"{most} requests"
            yield (
                f"{now['file']}: {test} has other answers to {requests} than {others}{more}, which"
                " fails now: they need recordings of their own, or the same handlers"
            )


def _common(one: dict[str, str], other: dict[str, str]) -> int:
    """How many requests are in both."""
    return sum(
        (int(bits, 16) & int(other[key], 16)).bit_count()
        for key, bits in one.items()
        if key in other
    )


def _begin(file: Path, handlers: list[Any], options: dict[str, Any], loop: Any) -> "Replay":
    from vmibridge.errors import VmiBridgeError

    try:
        from vmibridge.recording import Replay

        try:
            made = Replay(file, *handlers, **options)
        except TypeError as error:  # a keyword, or the type of a value
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        made.begin(loop)
    except VmiBridgeError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    return made


def _check(item: pytest.Item, replay: "Replay") -> None:
    from vmibridge.errors import VmiBridgeError

    try:
        result = replay.play()
        if result.different:
            pytest.fail(replay.report(), pytrace=False)
        updated = replay.accept() if item.config.getoption("recording_update") else 0
    except VmiBridgeError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    if not item.config.getoption("recording_update"):
        return
    file = os.path.relpath(replay.path, item.config.rootpath)
    compared = {
        "file": file,
        # By the clock of all workers, and in the lock of the file.
        "time": time.monotonic_ns(),
        "compared": replay.compared.bits(),
        "changed": replay.changed.bits(),
    }
    item.user_properties.append((_COMPARED, json.dumps(compared)))
    if updated:
        answers = "1 answer" if updated == 1 else f"{updated} answers"
        item.user_properties.append((_UPDATED, f"{file}: updated, with {answers} of now"))


def _loop(request: pytest.FixtureRequest) -> str:
    """The loop that the test runs on, as far as its plugin tells."""
    if "anyio_backend" in request.fixturenames:
        return str(request.getfixturevalue("anyio_backend_name"))
    return "trio" if request.node.get_closest_marker("trio") else "asyncio"


def _has_path(mark: pytest.Mark) -> bool:
    return bool(mark.args) and isinstance(mark.args[0], str | Path)


def _has_handler(mark: pytest.Mark) -> bool:
    """Whether it is ours, and not that of another plugin."""
    return _has_path(mark) and any(callable(each) or _is_handler(each) for each in mark.args[1:])


def _is_handler(thing: object) -> bool:
    # Where it was not imported, nothing is one.
    module = sys.modules.get("vmibridge.bridge.dispatch")
    return module is not None and isinstance(thing, module.BridgeHandler | module.BridgeDispatch)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """For the block, be the only one who updates this file."""
    lock = None
    # What cannot be read is said by who replays it.
    with suppress(OSError):
        while lock is None:
            lock = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(lock), file.stat()):
                # The one before has put another file in its place.
                os.close(lock)
                lock = None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
