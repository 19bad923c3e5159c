"""What a backend is: the interface between a VM and the server.

A backend owns a VM or a connection to one. It is entered with `async with`; all
tasks that serve it live in its task group, so nothing outlives that block. The
server arms it with a `TrapFilter`, takes its traps from a `TrapSink`, and answers
each with `resume`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from enum import Enum
from typing import Any, Protocol, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from vmibridge.aio.cancellation import UnwrappedExit
from vmibridge.errors import ServerStateError, TrapQueueClosedError
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.conductor import Conductor
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

__all__ = [
    "Backend",
    "GuestEnd",
    "SessionEvent",
    "SessionEventKind",
    "TrapSink",
    "VcpuEnd",
    "feed",
    "feed_held",
]


class TrapSink(Protocol):
    """Where a backend puts its traps; bounded. A full sink holds the vCPU."""

    def put_nowait(self, event: TrapEvent) -> None:
        """Raises `anyio.WouldBlock` when full, `TrapQueueClosedError` when no more are taken."""

    async def put(self, event: TrapEvent) -> None:
        """Wait for room. Raises `TrapQueueClosedError`. If cancelled, the event was not taken."""

    def abandon(self, event: TrapEvent) -> None:
        """The vCPU of a trap that was put is gone: its handler is cancelled.

        The trap is resumed all the same. Does nothing for one that was answered.
        """


def feed(
    sink: TrapSink,
    event: TrapEvent,
    full: Callable[[TrapEvent], object],
    closed: Callable[[TrapEvent], object],
) -> None:
    """Put a trap into the sink at once, where there is room.

    Otherwise `full` takes it, which has to hold the vCPU and to call `feed_held` in a task, or
    `closed`, which has to let the vCPU go on without an answer: the server takes no more traps.
    """
    try:
        sink.put_nowait(event)
    except anyio.WouldBlock:
        full(event)
    except TrapQueueClosedError:
        closed(event)


async def feed_held(
    sink: TrapSink, event: TrapEvent, closed: Callable[[TrapEvent], object]
) -> None:
    """Put a trap that had no room into the sink when it has, or give it to `closed`.

    If cancelled, neither happened.
    """
    try:
        await sink.put(event)
    except TrapQueueClosedError:
        closed(event)


class VcpuEnd(msgspec.Struct, frozen=True):
    """How one vCPU ended."""

    vcpu: int
    reason: str
    """`halted`, `stopped` (by us), `crashed` or `lost`."""
    detail: str = ""
    """For people: what happened, where, and what to look at."""
    registers: dict[str, int] = {}
    """The registers that it ended with, as far as the backend knows them."""


class GuestEnd(msgspec.Struct, frozen=True):
    """How a guest ended; by itself, unless a vCPU crashed, was lost or was stopped."""

    vcpus: tuple[VcpuEnd, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a vCPU crashed or was lost."""
        return any(end.reason in ("crashed", "lost") for end in self.vcpus)


class SessionEventKind(Enum):
    """What happened to the session of a remote VM; see `SessionEvent`."""

    CONNECTED = "connected"
    """Its agent has come."""
    LOST = "lost"
    """The connection is lost; handlers go on, and accesses to guest memory wait."""
    BACK = "back"
    """The agent has come back."""
    GIVEN_UP = "given up"
    """The agent is not waited for any more: the VM has ended for the server."""
    ENDED = "ended"
    """The agent has said that the guest has ended."""


class SessionEvent(msgspec.Struct, frozen=True):
    """A change of the session of a VM whose agent is elsewhere.

    `CONNECTED` comes first, then `LOST` and `BACK` in turns, and `GIVEN_UP` or `ENDED` last. A
    session that the server leaves, because it stops, has no last one.
    """

    vm: str
    kind: SessionEventKind
    session: str
    """The id of the run of that VM, in hexadecimal digits: of two runs of one name it differs."""
    peer: str
    """Who its agent is, as its connection shows: `uid:1000`, `tls:NAME`, `tcp`, `nats`."""
    reason: str | None = None
    """Why, where it is known; for people."""


class Backend(UnwrappedExit, ABC):
    """A VM, or a connection to one."""

    other_hypercalls: bool = False
    """Whether the guest has hypercalls that are not ours: then only a VMCALL with the
    signature of Xen's guest request is a bridge call."""
    on_session_event: Callable[[SessionEvent], None] | None = None
    """Set by the server before `run`, where a tap wants to know. A backend whose VM has a session
    calls it on the event loop, while `run` runs. It returns soon and does not raise."""
    conductor: Conductor | None = None
    """Decides the order of the handlers; see there."""
    architecture: Architecture[Any] = X86
    """Of the guest: its registers, and what they mean."""

    def __init__(self, vm: str) -> None:
        self.vm = vm
        """The name of the VM in events and outcomes."""
        self._tasks: TaskGroup | None = None
        self._stack = AsyncExitStack()

    def copies(self) -> "Sequence[Backend]":
        """All VMs that it stands for: this one, and those that run beside it."""
        return (self,)

    @property
    def tasks(self) -> TaskGroup:
        """The task group of this backend's `async with`. Raises `ServerStateError` outside."""
        if self._tasks is None:
            raise ServerStateError(
                "the backend is not open: use it in 'async with open_backend(...) as backend:'"
            )
        return self._tasks

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self.open()
            stack.push_async_callback(self._close_shielded)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            # The first at the end: nothing is started any more.
            stack.callback(self._leave)
            self._stack = stack.pop_all()
            self._tasks = tasks
        return self

    def _leave(self) -> None:
        self._tasks = None

    async def _close_shielded(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    async def open(self) -> None:
        """Get the VM ready, without running it. Raises `BackendError`."""

    async def close(self) -> None:
        """Free what `open` took; called shielded, after every task has ended."""

    @abstractmethod
    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Run the guest until it ends, with each trap that `traps` wants put into `sink`.

        If cancelled, does as `stop` says before it lets go; a vCPU that waits for an
        answer then goes on without one. Raises `BackendError` when the VM cannot be
        run at all: a guest that fails is a `GuestEnd`.
        """

    @abstractmethod
    def stop(self) -> None:
        """Make `run` return soon: disarm the traps, and stop the guest or detach from it.

        Called on the event loop, when every trap is answered and no more are taken.
        """

    @abstractmethod
    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Answer a trap: write registers and let the vCPU go on.

        `None` runs the instruction natively, as if it had not been trapped. Called
        exactly once for each trap. Raises `BackendError` when the VM is gone.
        """

    def give_back(self, event: TrapEvent) -> bool:
        """Let go of a trap that no handler has begun, because the server stops.

        `True`: it is resumed by the next host of the VM, or as the VM does without one.
        `False`, the default: it has to be answered here.
        """
        return False

    @abstractmethod
    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes at a physical address. Raises `GuestMemoryError`."""

    @abstractmethod
    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` at a physical address or, with `GuestMemoryError`, nothing."""
