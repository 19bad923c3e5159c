"""`vmibridge run --answers`: the guest is answered from a recording, and no handler runs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmibridge.cli.server_options import ServerOptions
from vmibridge.errors import ConfigError
from vmibridge.vm.backend import Backend

if TYPE_CHECKING:
    from vmibridge.recording.answers import RecordedAnswers
    from vmibridge.recording.answers.bridge import Missing

__all__ = ["answer_sources", "answers_of"]

log: logging.Logger = logging.getLogger(__name__)


def answer_sources(
    handlers: list[str] | None,
    answers: Path | None,
    missing: "Missing | None",
    options: ServerOptions,
) -> list[str]:
    """The sources of handlers; none with `--answers`. Raises `ConfigError`."""
    if answers is None:
        if missing is not None:
            raise ConfigError("--missing is about a recording: give --answers FILE, too")
        if not handlers:
            raise ConfigError("give --handlers that answer, or a recording with --answers")
        return handlers
    if handlers:
        raise ConfigError("--answers: the recording answers, so --handlers do not go with it")
    if options.reload:
        raise ConfigError("--reload is about handlers, so it does not go with --answers")
    return []


def answers_of(
    path: Path | None, missing: "Missing | None", backends: Sequence[Backend]
) -> "RecordedAnswers | None":
    """What answers all VMs; `None`: handlers do. Blocking. Raises `RecordingReadError`.

    What cannot be read of the recording is a warning, before a guest asks for it.
    """
    if path is None:
        return None
    from vmibridge.recording.answers import RecordedAnswers, load_answers

    loaded = load_answers(path)
    for line in loaded.problems:
        log.warning("%s", line)
    return RecordedAnswers(loaded, missing or "fail", alone=len(backends) == 1)
