"""How a task on trio hears that it is cancelled. Imported where trio runs.

A checkpoint of trio suspends its task once, then looks whether that is cancelled, and suspends it
again to raise `Cancelled` there. On asyncio the first suspension ends with the exception.
"""

import math
from typing import Any, Final

from trio import current_effective_deadline
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint

_CHECKPOINT: Final = checkpoint.__code__
_FIRST: Final = cancel_shielded_checkpoint.__code__


def hears_next(body: Any) -> bool:
    """Whether all that a suspended coroutine of the current task does when it goes on is to suspend
    itself again, and to hear then that the task is cancelled."""
    if current_effective_deadline() != -math.inf:
        return False
    while body is not None:
        below = getattr(body, "cr_await", None)
        if getattr(body, "cr_code", None) is _CHECKPOINT:
            return getattr(below, "cr_code", None) is _FIRST
        body = below
    return False
