"""What one worker is at: a request, the trap that waits for it, and its deadlines."""

import asyncio
from collections.abc import Callable

import anyio

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.dispatch import Entry
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.retries import PendingRequest
from vmibridge.engine.settings import Terms
from vmibridge.vm.trap import TrapEvent


class Worker:
    """A task that answers traps, one after the other, and the request that it is at."""

    __slots__ = (
        "context",
        "deadline",
        "entry",
        "event",
        "first",
        "hard_deadline",
        "on_wait",
        "overtaken",
        "packet",
        "pending",
        "placed",
        "queued",
        "scope",
        "started",
        "task",
        "terms",
        "waited",
    )

    task: "asyncio.Task[object] | None"
    """Its own, on asyncio: what a handler may cancel without asking anybody."""
    scope: anyio.CancelScope
    on_wait: Callable[[], None]
    event: TrapEvent | None
    """The trap that waits for it; `None` after the soft deadline, until a retry."""
    started: float
    """When that trap was taken."""
    packet: BridgePacket
    context: BridgeContext
    first: Entry
    """Who is asked first; a request and its retry have it in common."""
    entry: Entry | None
    """Who was asked last; `None` unless the handler runs."""
    waited: bool
    """It was suspended at this request: it has terms and deadlines."""
    terms: Terms
    deadline: float
    """The nearer of its two."""
    hard_deadline: float
    queued: bool
    """The handler has not begun: it waits for its turn, or for a place."""
    placed: bool
    """It holds a place in flight."""
    pending: "PendingRequest[Worker] | None"
    """The request, when it was told to wait."""
    overtaken: bool
    """Somebody else has answered this request, and cancelled the scope."""
