"""The note of a recording that lacks VMs which were recorded with those that it has.

It matters where a handler serves several VMs: it had the requests of the others, too.
"""

from collections.abc import Sequence

__all__ = ["other_vms_in", "other_vms_text"]

_BEGIN = "missing of this recording: VMs "
_END = ", and what handlers that serve several VMs kept of their requests"
_MAX_NAMED = 100


def other_vms_text(names: Sequence[str]) -> str:
    """The text of the note."""
    named = ", ".join(names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{_BEGIN}{named}{more}{_END}"


def other_vms_in(text: str) -> list[str] | None:
    """The names in the text of such a note; `None`: it is another one."""
    if not (text.startswith(_BEGIN) and text.endswith(_END)):
        return None
    return text[len(_BEGIN) : -len(_END)].split(", ")
