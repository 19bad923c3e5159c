"""How a replay in a test ends early: in the middle, by a cancellation, an exception, a handler that
hangs; and what was accepted is written."""

import threading

import anyio
import pytest
from replay_parts import MAGIC, Probe, Shared, ask, everything, record

from vmibridge import Bridge, BridgeHandler, BridgeResponse, method
from vmibridge.errors import ConfigError, NotReplayedError, ServerStateError
from vmibridge.recording import Replay
from vmibridge.recording.replay import own_loop

TRAPS = 28
"""Of `everything`."""


class Changed(Probe):
    name = "probe"

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(value1=packet.value1 + 2).with_output({"sum": packet.value1 + 2})


class Lived(Probe):
    """Tells of its life."""

    name = "probe"

    def __init__(self):
        super().__init__()
        self.life = []

    async def __aenter__(self):
        self.life.append("entered")
        return self

    async def __aexit__(self, *error):
        self.life.append("left")


class Stuck(BridgeHandler[int]):
    """Waits for a thread, so for something real, where no virtual deadline comes first."""

    MAGIC = MAGIC
    REQUEST = 3
    name = "stuck"
    timeout = 1e6

    def __init__(self):
        self.asks = threading.Event()
        self.release = threading.Event()
        self.ended = False

    async def handle(self, vmi, packet):
        if packet.value1:
            self.asks.set()
            try:
                await anyio.to_thread.run_sync(self.release.wait, abandon_on_cancel=True)
            finally:
                self.ended = True
        return BridgeResponse(value1=1)


class Quick(Stuck):
    name = "stuck"

    async def handle(self, vmi, packet):
        return BridgeResponse(value1=1)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    record(folder / "run.mcap", everything)
    record(folder / "two.mcap", _two, Bridge(Quick()))
    return folder


async def _two(vm):
    await vm.call(ask(0, request=3))
    await vm.call(ask(0, 1, request=3))


@pytest.fixture
def path(recordings, tmp_path):
    """A copy, which a test may change."""
    made = tmp_path / "run.mcap"
    made.write_bytes((recordings / "run.mcap").read_bytes())
    return made


@pytest.fixture
def stuck():
    handler = Stuck()
    yield handler
    handler.release.set()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [each.name for each in threading.enumerate() if each.name == "vmibridge replay"] == []


@pytest.mark.anyio
class TestEarly:
    async def test_in_the_middle(self, path):
        probe = Lived()
        async with Replay(path, probe, Shared()) as replay:
            await replay.until(2)
            assert probe.life == ["entered"]
        assert probe.life == ["entered", "left"]
        assert probe.asked == [0, 1]
        assert replay.result.compared == 2
        with pytest.raises(ServerStateError, match="is over"):
            await replay.run()

    async def test_by_an_exception_of_the_body(self, path):
        probe = Lived()
        with pytest.raises(ZeroDivisionError):
            async with Replay(path, probe, Shared()) as replay:
                await replay.until(2)
                raise ZeroDivisionError
        assert probe.life == ["entered", "left"]

    async def test_the_exception_of_the_body_is_not_hidden(self, path):
        with pytest.raises(ZeroDivisionError):
            async with Replay(path, Probe, Shared):
                raise ZeroDivisionError  # though nothing was compared

    async def test_by_a_cancellation_of_the_block(self, path):
        probe = Lived()
        with anyio.CancelScope() as scope:
            async with Replay(path, probe, Shared()) as replay:
                await replay.until(2)
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert probe.life == ["entered", "left"]

    async def test_by_a_cancellation_while_a_handler_hangs(self, recordings, stuck):
        with anyio.CancelScope() as scope:
            async with (
                Replay(recordings / "two.mcap", stuck) as replay,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(_cancel_when, stuck.asks, scope)
                await replay.run()
        assert scope.cancelled_caught
        assert stuck.ended
        assert replay.result.compared == 1

    async def test_after_a_cancelled_step_it_is_over(self, recordings, stuck):
        async with (
            Replay(recordings / "two.mcap", stuck) as replay,
            anyio.create_task_group() as tasks,
        ):
            with anyio.CancelScope() as scope:
                tasks.start_soon(_cancel_when, stuck.asks, scope)
                await replay.run()
            with pytest.raises(ServerStateError, match="is over"):
                await replay.run()

    async def test_two_tasks_do_not_play_it_at_a_time(self, recordings, stuck):
        async with (
            Replay(recordings / "two.mcap", stuck) as replay,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_run_until_cancelled, replay)
            await anyio.to_thread.run_sync(stuck.asks.wait)
            with pytest.raises(ServerStateError, match="by another task"):
                await replay.run()
            tasks.cancel_scope.cancel()

    async def test_a_handler_that_cannot_be_left_is_told(self, path):
        class Unwilling(Lived):
            name = "probe"

            async def __aexit__(self, *error):
                raise OSError("not yet")

        with pytest.raises(Exception, match="not yet"):
            async with Replay(path, Unwilling, Shared) as replay:
                await replay.run()


async def _cancel_when(event, scope):
    await anyio.to_thread.run_sync(event.wait)
    scope.cancel()


async def _run_until_cancelled(replay):
    await replay.run()


@pytest.mark.anyio
class TestAccept:
    async def test_what_differs_is_accepted_and_replays(self, path):
        async with Replay(path, Changed, Shared, accept=True) as replay:
            assert [each.difference async for each in replay] == [None] * TRAPS
            assert replay.result.different == 0
            assert replay.difference is None
            assert replay.accepted == 3
            assert replay.accept() == 3
        async with Replay(path, Changed, Shared) as replay:
            assert (await replay.run()).different == 0
        async with Replay(path, Probe, Shared) as replay:
            assert (await replay.run()).different == 3

    async def test_the_file_keeps_its_mode_and_links(self, path):
        link = path.with_name("link.mcap")
        link.symlink_to(path)
        path.chmod(0o640)
        async with Replay(link, Changed, Shared, accept=True) as replay:
            await replay.run()
            replay.accept()
        assert link.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o640
        assert sorted(each.name for each in path.parent.iterdir()) == ["link.mcap", "run.mcap"]

    async def test_nothing_different_writes_nothing(self, path):
        before = path.stat()
        kept = (before.st_ino, before.st_mtime_ns, before.st_size)
        async with Replay(path, Probe, Shared, accept=True) as replay:
            await replay.run()
            assert replay.accept() == 0
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns, after.st_size) == kept

    async def test_into_another_file(self, path):
        before, target = path.read_bytes(), path.with_name("new.mcap")
        async with Replay(path, Changed, Shared, accept=True) as replay:
            await replay.run()
            replay.accept(target)
            with pytest.raises(ConfigError, match="already exists"):
                replay.accept(target)
        assert path.read_bytes() == before
        async with Replay(target, Changed, Shared) as replay:
            assert (await replay.run()).different == 0

    async def test_not_before_the_end_and_not_unasked(self, path):
        async with Replay(path, Changed, Shared, accept=True) as replay:
            await replay.until(2)
            with pytest.raises(ServerStateError, match="play it to its end"):
                replay.accept()
        async with Replay(path, Changed, Shared) as replay:
            await replay.run()
            with pytest.raises(ServerStateError, match="accept=True"):
                replay.accept()


class TestWithoutALoop:
    def test_it_is_begun_played_and_ended(self, path):
        probe = Lived()
        replay = Replay(path, probe, Shared())
        replay.begin()
        assert replay.play().compared == TRAPS
        assert replay.play().compared == TRAPS
        replay.end()
        assert probe.life == ["entered", "left"]

    def test_nothing_compared_is_an_error(self, path):
        replay = Replay(path, Probe, Shared, requests=0x55)
        replay.begin("trio")
        with pytest.raises(NotReplayedError):
            replay.play()

    def test_it_is_ended_though_it_was_not_played(self, path):
        probe = Lived()
        replay = Replay(path, probe, Shared())
        replay.end()
        replay.begin()
        replay.end()
        assert probe.life == []

    def test_ctrl_c_while_it_is_played_ends_it(self, recordings, stuck, monkeypatch):
        class Interrupted(threading.Event):
            was_interrupted = False

            def wait(self, timeout=None):
                if self.was_interrupted:
                    return super().wait(timeout)
                stuck.asks.wait()
                self.was_interrupted = True
                raise KeyboardInterrupt

        replay = Replay(recordings / "two.mcap", stuck)
        replay.begin()
        monkeypatch.setattr(own_loop, "Event", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            replay.play()
        assert stuck.ended
        replay.end()
