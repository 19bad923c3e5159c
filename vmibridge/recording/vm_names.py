"""The names of the VMs of a recording, each held once.

A file may have any number of them, each in every message and as long as a message may be. Who keeps
something for each trap would hold as many copies.
"""

from vmibridge.errors import RecordingReadError

__all__ = ["MAX_VMS", "VmNames"]

MAX_VMS = 65_536
_MAX_CHARACTERS = 16 << 20


class VmNames:
    """Those that were seen so far."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._characters = 0

    def once(self, name: str) -> str:
        """The name as it was held first. Raises `RecordingReadError` where there are too many."""
        found = self._names.get(name)
        if found is None:
            self._characters += len(name)
            if len(self._names) >= MAX_VMS or self._characters > _MAX_CHARACTERS:
                raise RecordingReadError(
                    f"there are more than {MAX_VMS} VMs, or {_MAX_CHARACTERS} characters in names"
                )
            found = self._names[name] = name
        return found
