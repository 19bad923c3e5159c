"""What went wrong with the handlers of VMs, as reasons of the server's health.

A guest may choose what its own handlers fail at, and no other one pays for it: the server stays
ready. That a VM cannot be recorded is no guest's choice, and would happen to the next one, too.
"""

from collections.abc import Sequence

from vmibridge.bridge.dispatch import one_line
from vmibridge.errors import RecordingError, VmiBridgeError
from vmibridge.health.state import Reason

__all__ = ["Failures", "text_of"]


class Failures:
    """The last ones of a server of agents."""

    def __init__(self) -> None:
        self._last: Reason | None = None
        self._kept: Sequence[str] = ()

    def failed(self, vm: str, error: BaseException) -> None:
        """The handlers of a VM could not be made or entered, or have ended with `error`."""
        text = f"vm {vm}: {text_of(error)}"
        if isinstance(error, RecordingError):
            self._last = Reason("not-recording", text)
        else:
            self._last = Reason("handlers-failed", text, None)

    def begun(self) -> None:
        """Those of a VM have been entered."""
        self._last = None

    def reloaded(self, kept: Sequence[str]) -> None:
        """Handlers were reloaded; these VMs kept what they had."""
        self._kept = kept

    def reasons(self) -> list[Reason]:
        """Those that hold now."""
        found = [] if self._last is None else [self._last]
        return found + [
            Reason("reload-failed", f"vm {vm}: keeps its handlers", None) for vm in self._kept
        ]


def text_of(error: BaseException) -> str:
    """In one line."""
    return str(error) if isinstance(error, VmiBridgeError) else one_line(error)
