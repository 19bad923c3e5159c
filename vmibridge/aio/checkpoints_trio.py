"""How a task on trio hears that it is cancelled. Imported where trio runs.

A checkpoint of trio suspends its task once, then looks whether that is cancelled, and suspends it
again to raise `Cancelled` there. On asyncio the first suspension ends with the exception.

A task that waits at the end of a nursery is not cancelled there: the tasks in it are, and it goes
on when they have ended. On asyncio it hears of the cancellation first (`checkpoints_asyncio`).

This takes what is not public in trio: `Nursery._nested_child_finished`;
`tests/unit/aio/test_checkpoints.py` fails if it goes.
"""

import math
from typing import Any, Final

from trio import Nursery, current_effective_deadline
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint

from vmibridge.aio.coroutines import awaited_with

_CHECKPOINT: Final = checkpoint.__code__
_FIRST: Final = cancel_shielded_checkpoint.__code__
_NURSERY_ENDS: Final = Nursery._nested_child_finished.__code__


def _parent_of_first(body: Any) -> Any:
    """The code of what has called for the first suspension of a checkpoint; `None`: a coroutine is
    not suspended there."""
    parent = None
    while body is not None:
        code = getattr(body, "cr_code", None)
        if code is _FIRST:
            return parent
        parent, body = code, getattr(body, "cr_await", None)
    return None


def hears_next(body: Any) -> bool:
    """Whether all that a suspended coroutine of the current task does when it goes on is to suspend
    itself again, and to hear then that the task is cancelled."""
    return current_effective_deadline() == -math.inf and _parent_of_first(body) is _CHECKPOINT


def hears_nothing(body: Any) -> bool:
    """Whether a coroutine is suspended where it cannot be cancelled, having got what it asked for:
    as in `Lock.acquire`, which would keep the lock."""
    return _parent_of_first(body) not in (None, _CHECKPOINT)


def tasks_left(body: Any) -> bool | None:
    """Whether the nursery has tasks at whose end a coroutine, which goes on, is suspended: it has
    none, or it would not go on; `None`: it is not suspended there."""
    return None if awaited_with(body, _NURSERY_ENDS) is None else False
