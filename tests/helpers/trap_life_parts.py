"""The life of a trap: the VM, its handlers and dispatchers, which do what they are told, when
they are told.
"""

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import ContextVar

import anyio
import anyio.lowlevel
from trap_life_asks import (
    BOTH,
    FALLBACK,
    FREE,
    LATE,
    MAGIC,
    PASSED,
    PATIENT,
    RESULT,
    SERIAL,
    SOFT,
    STAMP,
    STOP_TIMEOUT,
    STRICT,
    TERMS,
    WAIT,
    Manner,
    Order,
    Reply,
    Run,
    Trap,
)
from trap_life_rules import Requests

from vmibridge import (
    Bridge,
    BridgeContract,
    BridgeDispatch,
    BridgeHandler,
    BridgeResponse,
    GuestMemoryError,
    Outcome,
    OutcomeKind,
    RegisterWrites,
    TrapEvent,
    method,
)
from vmibridge.errors import BackendError, TrapQueueClosedError
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink

# --- those who have a part in it ----------------------------------------------------

AT_ONCE, SLOW, STUBBORN = 0x1000, 0x2000, 0x5000
"""Physical memory that answers at once; after a while; after a while, cancelled or not."""
_PAGE = 0x1000


RUN: ContextVar[Run] = ContextVar("RUN")
"""The run that makes an access."""


class Access:
    """An access to slow memory that is under way."""

    def __init__(self, trap: Trap, run: Run, stubborn: bool):
        self.trap = trap
        self.run = run
        self.stubborn = stubborn
        self.done = anyio.Event()


class Vm(Backend):
    """A VM whose vCPUs do what the machine says."""

    def __init__(self, requests: Requests):
        super().__init__("fake")
        self.requests = requests
        self.sink: TrapSink | None = None
        self.started = anyio.Event()
        self.held: deque[Trap] = deque()
        self.arrived = anyio.Event()
        self.over = anyio.Event()
        self.failure: Exception | None = None
        self.failed = False
        self.lost = False
        self.slow_vcpus: set[int] = set()
        self.writing: dict[int, anyio.Event] = {}
        self.accesses: list[Access] = []

    async def run(self, traps, sink):
        self.sink = sink
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._feed)
                self.started.set()
                await self.over.wait()
                tasks.cancel_scope.cancel()
        finally:
            self.requests.guest_gone = True
        if self.failure is not None:
            self.failed = True
            raise self.failure
        return GuestEnd()

    def stop(self):
        if any(trap.open for trap in self.requests.traps.values()):
            self.requests.fault("the guest is let go while a trap of it is open")
        self.over.set()

    def trap(self, trap: Trap) -> None:
        """One vCPU traps. A vCPU here may trap again before it has its answer."""
        if self.over.is_set() or self.sink is None:
            return
        if any(held.vcpu == trap.vcpu for held in self.held):
            self._hold(trap)
            return
        try:
            self.sink.put_nowait(trap.event)
        except anyio.WouldBlock:
            self._hold(trap)
        except TrapQueueClosedError:
            pass
        else:
            trap.put = True

    def _hold(self, trap: Trap) -> None:
        self.held.append(trap)
        self.arrived.set()

    async def _feed(self) -> None:
        assert self.sink is not None
        while True:
            while self.held:
                with suppress(TrapQueueClosedError):
                    await self.sink.put(self.held[0].event)
                    self.held[0].put = True
                self.held.popleft()
            self.arrived = anyio.Event()
            await self.arrived.wait()

    async def resume(self, event, writes):
        trap = self.requests.traps[event.seq]
        trap.writes = writes
        self.requests.replied(trap, *self._reply(trap, writes))
        if trap.vcpu in self.slow_vcpus:
            self.slow_vcpus.discard(trap.vcpu)
            self.writing[trap.seq] = anyio.Event()
            try:
                await self.writing[trap.seq].wait()
            except anyio.get_cancelled_exc_class():
                if self.requests.now() < self.requests.stopped_at + STOP_TIMEOUT:
                    self.requests.fault(f"the write of the answer to {trap} was cut short")
                raise
            finally:
                del self.writing[trap.seq]
        trap.written = not self.lost
        if self.lost:
            raise BackendError("the VM is gone")

    def _reply(self, trap: Trap, writes: RegisterWrites | None) -> tuple[Reply, Run | None]:
        if writes is None:
            return Reply.NATIVE, None
        if writes.rip != trap.event.ip + trap.event.length:
            self.requests.fault(f"{trap} goes on at {writes.rip:#x}")
        value = writes.rax
        if value is None:
            return Reply.MOVED_ON, None
        if value in (WAIT, FALLBACK):
            if writes.rdx != (STAMP if value == WAIT and trap.ask.request != PASSED else None):
                pass
            return (Reply.WAIT if value == WAIT else Reply.FALLBACK), None
        if value < RESULT or writes.rdx != STAMP:
            self.requests.fault(f"{trap} got {writes}")
            return Reply.FALLBACK, None
        return Reply.RESULT, self.requests.runs[value - RESULT]

    async def read_physical(self, event, address, size):
        await self._access(event, address)
        # It tells which trap it was read in.
        return bytes([1 + event.seq % 0xFF]) * size

    async def write_physical(self, event, address, data):
        await self._access(event, address)

    async def _access(self, event: TrapEvent, address: int) -> None:
        trap = self.requests.traps[event.seq]
        if not trap.open:
            self.requests.fault(f"an access to memory began in {trap}, and its vCPU runs")
        if address < SLOW:
            return
        access = Access(trap, RUN.get(), address >= STUBBORN)
        self.accesses.append(access)
        with anyio.CancelScope(shield=access.stubborn):
            try:
                await access.done.wait()
            finally:
                if access in self.accesses:
                    self.accesses.remove(access)

    def finish(self, access: Access) -> None:
        """This is the moment when memory is read or written."""
        trap, requests = access.trap, self.requests
        self.accesses.remove(access)
        access.done.set()
        # A hard deadline does not wait for an access that nobody can cancel.
        late = access.run.request.late(requests.now())
        cut_off = access.stubborn and (requests.ending or late)
        if not trap.open and not cut_off:
            requests.fault(f"memory was accessed in {trap}, and its vCPU runs")


class Watched(Bridge):
    """A bridge that tells when a trap is taken."""

    requests: Requests

    def match(self, packet, reason):
        trap = self.requests.traps.get(packet.value4)
        if trap is not None:
            self.requests.taken(trap)
        return super().match(packet, reason)


class Free(BridgeHandler[int]):
    """Does what it is told."""

    MAGIC = MAGIC
    REQUEST = FREE
    VERIFY_VALUE4 = STAMP

    def __init__(self, requests: Requests):
        self.requests = requests

    @method(PATIENT, soft_timeout=TERMS[PATIENT].soft, timeout=TERMS[PATIENT].hard)
    async def patient(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(SOFT, may_wait=True)
    async def soft(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(BOTH, soft_timeout=TERMS[BOTH].soft, timeout=TERMS[BOTH].hard)
    async def both(self, vmi, packet):
        return await self._serve(vmi, packet)

    @method(STRICT, soft_timeout=TERMS[STRICT].soft, timeout=TERMS[STRICT].hard)
    async def strict(self, vmi, packet):
        return await self._serve(vmi, packet)

    async def _serve(self, vmi, packet):
        run = self.requests.passed.pop(vmi, None)
        run = run or self.requests.begins(self.requests.traps[packet.value4])
        try:
            return await self._obey(vmi, run)
        except anyio.get_cancelled_exc_class():
            if run.unwinding:
                raise
            run.unwinding = True
            return await self._unwind(vmi, run)
        finally:
            run.ended = True

    async def _obey(self, vmi, run):
        while True:
            if not run.orders:
                self.requests.waits()
            match await run.next_order():
                case Order.ANSWER:
                    run.answered = True
                    return BridgeResponse(RESULT + run.number).with_output(run.number)
                case Order.REJECT:
                    return None
                case Order.RAISE:
                    raise LookupError("on purpose")
                case Order.EXIT:
                    raise SystemExit(3)
                case Order.CANCEL_ITSELF:
                    return await self._cancel_itself(run)
                case Order.CANCEL_ITS_TASK:
                    return await self._cancel_its_task(run)
                case Order.CANCEL_ITS_TASK_LATE:
                    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
                        asyncio.current_task().cancel()
                    return None
                case Order.STEP:
                    await anyio.lowlevel.checkpoint()
                case order:
                    await self._access(vmi, run, order)

    async def _access(self, vmi, run, order):
        self.requests.waits()
        memory = vmi.memory
        run.in_memory = True
        RUN.set(run)
        try:
            match order:
                case Order.READ:
                    await memory.read_physical(AT_ONCE, 4)
                case Order.READ_SLOWLY:
                    await memory.read(SLOW, 4)
                case Order.READ_STUBBORNLY:
                    await memory.read_physical(STUBBORN, 4)
                case Order.READ_ACROSS:
                    text = await memory.read_string(SLOW + _PAGE - 4, 8, encoding="latin-1")
                    if len(text) != 8 or len(set(text)) != 1:
                        self.requests.fault(f"read in two traps at once: {text!r}")
                case Order.WRITE:
                    await memory.write(AT_ONCE, b"1234")
                case Order.WRITE_SLOWLY:
                    await memory.write_physical(SLOW, b"1234")
        except GuestMemoryError:
            if not (self.requests.ending or run.request.late(self.requests.now())):
                self.requests.fault(f"a handler was cut off from memory too early: {run.ask}")
            raise
        finally:
            run.in_memory = False

    async def _cancel_itself(self, run):
        # As when something that it awaits was cancelled by others.
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            run.unwinding = True
            raise asyncio.CancelledError
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    async def _cancel_its_task(self, run):
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            run.unwinding = True
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await anyio.lowlevel.checkpoint()

    async def _unwind(self, vmi, run):
        match run.manner:
            case Manner.LINGER:
                with anyio.CancelScope(shield=True):
                    await run.let_go.wait()
            case Manner.ANSWER:
                return BridgeResponse(LATE)
            case Manner.RAISE:
                raise LookupError("on the way out")
            case Manner.READ:
                with anyio.CancelScope(shield=True), suppress(GuestMemoryError):
                    await vmi.memory.read_physical(AT_ONCE, 1)
                    self.requests.fault(f"memory was read after the final answer: {run.ask}")
        raise  # noqa: PLE0704 - called where the cancellation was caught


class Serial(Free):
    """The same, one at a time."""

    REQUEST = SERIAL
    serial = True


class Behind(Free):
    """The same, behind a dispatcher."""

    REQUEST = PASSED


class Passes(BridgeDispatch):
    """Asked first; passes every request on, at once or when it is told something."""

    may_wait = True

    def __init__(self, requests: Requests):
        self.requests = requests

    def contracts(self):
        return [BridgeContract(PASSED, MAGIC)]

    async def dispatch(self, vmi, packet):
        if packet.value3:
            run = self.requests.begins(self.requests.traps[packet.value4])
            try:
                if not run.orders:
                    self.requests.waits()
                await run.next_order()
            except BaseException:  # noted for the rules, and raised again
                run.unwinding = run.ended = True
                raise
            self.requests.passed[vmi] = run
        return Outcome(OutcomeKind.UNMATCHED, packet)
