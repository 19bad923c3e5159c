"""Handlers that are loaded again while a command runs: at SIGHUP, and with `--reload` when a file
that they were loaded from has changed.

What cannot be loaded costs one line in the log, and what was loaded goes on. Files are looked at
every quarter of a second, by a thread: they are few, and that finds changes on mounts and in
containers, too, where a kernel sends no notice. A change counts when two looks in a row find the
same, so that a file is not read while an editor writes it.
"""

import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel

from vmibridge.cli.hangups import early_hangups
from vmibridge.cli.server_options import ServerOptions
from vmibridge.config import Config, HandlerFactory, reload_handlers
from vmibridge.config.source_files import source_files
from vmibridge.errors import VmiBridgeError
from vmibridge.health.state import Health
from vmibridge.text import counted

__all__ = ["Reloader", "has_terminal"]

log: logging.Logger = logging.getLogger(__name__)

_TURNS = 3
"""Of the event loop, without SIGHUP."""
_LOOKS = 0.25
"""Seconds between two looks at the files."""
_NAMED = 3
"""Files that a line names."""

_State = tuple[int, int, int] | None


class Reloader:
    """Reloads the handlers of one command. `give` gives them to its server, and returns how many
    VMs have them then."""

    def __init__(
        self,
        sources: list[str],
        options: ServerOptions,
        give: Callable[[HandlerFactory], Awaitable[int]],
        health: Health,
    ) -> None:
        self._sources = sources
        self._options = options
        self._give = give
        self._health = health
        self._hangup = anyio.Event()
        self._turn = anyio.Lock()
        self._loaded = self._look() if options.reload else {}
        self._early = early_hangups()

    def note_hangup(self) -> None:
        """SIGHUP was received."""
        self._hangup.set()

    async def run(self) -> None:
        """Reload until cancelled."""
        # From here on: bytecode goes by seconds, and a change within one would go unseen.
        sys.dont_write_bytecode = True
        if self._early.received:
            # What was loaded may be older than what it was sent for.
            self._hangup.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._reload_at_hangups)
            if self._options.reload:
                tasks.start_soon(self._reload_at_changes)

    async def _reload_at_hangups(self) -> None:
        """Reload at SIGHUP; those that come while one is at work are one more together."""
        while True:
            await self._hangup.wait()
            # A reload imports, and nothing else runs meanwhile: signals of that time come one a
            # turn of the loop behind it. So wait for a few turns without any.
            while self._hangup.is_set():
                self._hangup = anyio.Event()
                for _ in range(_TURNS):
                    await anyio.lowlevel.checkpoint()
            await self._reload("SIGHUP")

    async def _reload_at_changes(self) -> None:
        loaded = self._loaded
        settled: dict[Path, _State] | None = None
        while True:
            await anyio.sleep(_LOOKS)
            found = await anyio.to_thread.run_sync(self._look)
            if found == loaded:
                settled = None
            elif found != settled:
                settled = found
            else:
                changed = [path for path in found if found[path] != loaded.get(path)]
                changed += [path for path in loaded if path not in found]
                await self._reload(f"{_names(changed)} changed")
                # Which files there are may be others now; what changed meanwhile is found by the
                # next look, as those that it has in common are kept.
                now = await anyio.to_thread.run_sync(self._look)
                loaded = {path: found.get(path, state) for path, state in now.items()}
                settled = None

    def _look(self) -> dict[Path, _State]:
        files = source_files(self._sources)
        if self._options.config is not None:
            files = [*files, self._options.config]
        return {path: _state(path) for path in files}

    async def _reload(self, why: str) -> None:
        async with self._turn:
            self._health.reload_begins()
            try:
                config = self._options.config
                read = Config() if config is None else Config.read(config)
                handlers = reload_handlers(self._sources, read)
                done = await self._give(handlers)
            except (VmiBridgeError, KeyboardInterrupt, ValueError) as error:
                # Ctrl-C is received elsewhere: this one is raised by a module.
                text = str(error) or type(error).__name__
                self._health.reload_ends(failed=f"the handlers stay as they are: {text}")
                log.error("%s: the handlers stay as they are: %s", why, text)  # noqa: TRY400
                return
            self._health.reload_ends()
            log.info("%s: handlers reloaded, for %s", why, counted(done, "running VM"))


def has_terminal() -> bool:
    """Whether this process has a terminal that is there: when it is closed, the system sends
    SIGHUP, and means that all ends."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _state(path: Path) -> _State:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def _names(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:_NAMED])
    more = len(paths) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
