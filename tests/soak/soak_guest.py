"""The fault soak: the guest, which sends what is planned, asks again, and checks each reply."""

import itertools
import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

import anyio
from soak_handlers import Faults
from soak_kinds import (
    ASK_SLOTS,
    BURST,
    DEBT,
    DEBT_SECONDS,
    DENIED,
    DEPTH,
    FALLBACK,
    HAMMER_LENGTH,
    MAGIC,
    MAY_WAIT,
    MEMORY,
    OWN_PROCESS,
    PROCESS_USES,
    RATE,
    REPLIES,
    REQUESTS,
    RESULT_TIMEOUT,
    RETRIED,
    RETRY_AFTER,
    STAMP,
    Kind,
    Reply,
)
from soak_lanes import Ask, Lane, Process, Sent, draw, same
from soak_ledger import Ledger
from soak_memory import FaultyMemory

from vmibridge import (
    Gate,
    Registers,
    TrapEvent,
    TrapReason,
)
from vmibridge.errors import BackendError, TrapQueueClosedError
from vmibridge.vm.backend import GuestEnd, VcpuEnd


class Guest(FaultyMemory):
    """Sends what its lanes have planned, and checks each reply. It keeps what is open only."""

    def __init__(
        self, ledger: Ledger, handler: Faults, *, traps: int, lanes: int, seed: int, quota: int
    ) -> None:
        super().__init__("soak")
        self.lanes = [Lane(number) for number in range(lanes)]
        for number, lane in enumerate(self.lanes):
            share = traps // lanes + (number < traps % lanes)
            lane.plan = draw(Random(f"{seed}.{number}"), share)
        self.in_plan = True
        """Whether it is still at what was planned: the time in which memory is looked at."""
        self.done = False
        """Whether it came to the end of what it does."""
        self.stop_server: Callable[[], None] = lambda: None
        self.uncollected: Callable[[], int] = lambda: 0
        self._planned_lanes = lanes
        self._ledger = ledger
        self._handler = handler
        self._quota = quota
        self._sink = None
        self._memory = bytearray(MEMORY)
        self._huge = bytes(DEBT)
        self._ask_slots = [ASK_SLOTS + 8 * n for n in range(4096)]
        self._seq = 0
        self._roots = itertools.count(1)
        self._ties = itertools.count()
        self._hungry: deque[Lane] = deque()
        self._open = 0
        self._answered = anyio.Event()
        self._running = anyio.CancelScope()

    async def run(self, traps, sink):
        self._sink = sink
        with self._running:
            try:
                await self._send(self.lanes)
                self.in_plan = False
                await self._wait_for_the_last_results()
                await self._fill_the_places()
                await self._leave_some_open()
                await self._use_up_the_quota()
                self.done = True
                self.stop_server()
            except TrapQueueClosedError:
                pass
            await anyio.sleep_forever()
        return GuestEnd(tuple(VcpuEnd(lane.number, "stopped") for lane in self.lanes))

    def stop(self) -> None:
        self._running.cancel()

    # What it does, in order.

    async def _send(self, lanes: list[Lane]) -> None:
        """Send what the lanes have planned, and wait until all of it is answered."""
        for lane in lanes:
            self._feed_soon(lane)
        while True:
            while self._hungry:
                lane = self._hungry.popleft()
                lane.waiting = False
                while len(lane.open) < DEPTH:
                    event = self._next(lane)
                    if event is None:
                        break
                    try:
                        self._sink.put_nowait(event)
                    except anyio.WouldBlock:
                        await self._sink.put(event)
            if not self._open:
                return
            self._answered = anyio.Event()
            await self._answered.wait()

    async def _wait_for_the_last_results(self) -> None:
        """Results that nobody collects expire, and nothing has to happen for it."""
        ledger = self._ledger
        pauses = 0
        while ledger.starts.total() != ledger.ends.total() + self.uncollected():
            await anyio.sleep(RESULT_TIMEOUT / 4)
            # One that waits for memory has until its hard deadline.
            pauses += not self._handler.running
            if pauses > 100:
                break
        left = ledger.starts.total() - ledger.ends.total() - self.uncollected()
        ledger.check(not left, f"{left} results are neither collected nor expired: {ledger.slow}")

    async def _fill_the_places(self) -> None:
        """As many handlers as there are places, and some more."""
        places = 2 * len(self.lanes)
        more = self._more_lanes(places + 8)
        for lane in more:
            lane.plan = same(Kind.GATHER, 1)
        await self._send(more)
        most = self._handler.most_gathered
        self._ledger.check(
            most == places, f"{most} handlers waited at a time, there are {places} places"
        )

    async def _leave_some_open(self) -> None:
        """A handler that hangs, and a trap behind it, in each of so many lanes."""
        more = self._more_lanes(self._planned_lanes)
        for lane in more:
            for _ in range(2):
                await self._sink.put(self._make(lane, Kind.LAST, 0, self._new_process()))
        self._open -= 2 * len(more)
        await self._handler.all_hang.wait()

    async def _use_up_the_quota(self) -> None:
        """What is left of it, and then some; the hanging handlers have had theirs."""
        ledger, first = self._ledger, self.lanes[: self._planned_lanes]
        left = self._quota - ledger.let_through - self._handler.hanging
        ledger.check(left >= 0, f"the quota of {self._quota} let through {-left} more")
        for number, lane in enumerate(first):
            lane.plan = same(Kind.ANSWER, max(0, left // len(first) + (number < left % len(first))))
        await self._send(first)
        for lane in first:
            lane.plan = same(Kind.OVER, 1 + self._quota // 100 // len(first))
        await self._send(first)

    def _more_lanes(self, count: int) -> list[Lane]:
        start = len(self.lanes)
        more = [Lane(number) for number in range(start, start + count)]
        self.lanes += more
        return more

    # One trap.

    def _feed_soon(self, lane: Lane) -> None:
        if not lane.waiting:
            lane.waiting = True
            self._hungry.append(lane)

    def _next(self, lane: Lane) -> TrapEvent | None:
        """The next trap of a lane: a retry that is due, or what is planned, or a later retry."""
        again = lane.again
        if again and again[0][0] <= lane.steps:
            return self._ask(lane, heappop(again)[2])
        step = next(lane.plan, None)
        if step is None:
            return self._ask(lane, heappop(again)[2]) if again else None
        kind, way = step
        if self.in_plan:
            self._ledger.planned[kind] += 1
        return self._make(lane, kind, way, self._process_for(lane, kind))

    def _new_process(self) -> Process:
        return Process(next(self._roots) << 12)

    def _process_for(self, lane: Lane, kind: Kind) -> Process:
        if kind is Kind.IN_DEBT:
            assert lane.debtor is not None
            return lane.debtor
        if kind in OWN_PROCESS:
            lane.debtor = self._new_process()
            return lane.debtor
        if not lane.uses_left or lane.hammers != (kind is Kind.HAMMER):
            lane.hammers = kind is Kind.HAMMER
            lane.process = self._new_process()
            lane.uses_left = HAMMER_LENGTH if lane.hammers else PROCESS_USES
        lane.uses_left -= 1
        assert lane.process is not None
        return lane.process

    def _make(self, lane: Lane, kind: Kind, way: int, process: Process) -> TrapEvent:
        key = self._seq + 1
        values = (key, way, 0, 0)
        if kind in MAY_WAIT:
            if kind is Kind.SLOW_READ:
                values = (self._ask_slots.pop(), way, key, 0)
            return self._ask(lane, Ask(kind, values, process))
        sent = self._open_trap(lane, kind, process)
        sent.expected = key + 1
        if kind is Kind.MEMORY:
            # No two traps that are open have the same slot.
            sent.slot = slot = (lane.number * (DEPTH + 1) + lane.steps % (DEPTH + 1)) * 16
            sent.expected = key * 0x9E37_79B9_7F4A_7C15 & (1 << 64) - 1
            self._memory[slot : slot + 8] = sent.expected.to_bytes(8, "little")
            values = (slot, way, 0, 0)
        elif kind is Kind.GREEDY:
            process.in_debt_since = time.monotonic()
        elif kind is Kind.BAD_POINTER:
            values = (MEMORY + (way << 12), way, 0, 0)
        return self._event(lane, sent, values, way)

    def _ask(self, lane: Lane, ask: Ask) -> TrapEvent:
        """A request that may be told to wait, for the first time or again."""
        sent = self._open_trap(lane, ask.kind, ask.process)
        sent.ask = ask
        address = ask.values[0]
        sent.expected = address + 1
        if ask.kind is Kind.SLOW_READ:
            # It is to read what is there while a trap of this request is open.
            ask.seqs.add(sent.seq)
            self._memory[address : address + 8] = sent.seq.to_bytes(8, "little")
        return self._event(lane, sent, ask.values, 0)

    def _open_trap(self, lane: Lane, kind: Kind, process: Process) -> Sent:
        self._seq += 1
        self._open += 1
        lane.steps += 1
        if not process.fed:
            process.since = time.monotonic()
        process.fed += 1
        self._ledger.sent[kind] += 1
        sent = Sent(self._seq, kind, process)
        lane.open.append(sent)
        return sent

    def _event(
        self, lane: Lane, sent: Sent, values: tuple[int, int, int, int], way: int
    ) -> TrapEvent:
        kind = sent.kind
        selector = REQUESTS.get(kind, 1) | kind << 16
        one, two, three, four = values
        # The low bits do not name the address space: it stays the same.
        control = {"cr3": sent.process.root | sent.seq & 0xFFF}
        reason, width, length = TrapReason.VMCALL, 64, 3
        if kind is Kind.NOT_OURS:
            reason = (
                TrapReason.PORT_IO,
                TrapReason.MSR,
                TrapReason.BREAKPOINT,
                TrapReason.CPUID,
                TrapReason.VMCALL,
            )[way % 5]
            registers = Registers(rax=0x4000_0000, rcx=0x4000_0000, rdx=selector, **control)
        elif kind is Kind.REAL_MODE:
            reason, width, length = TrapReason.CPUID, 16, 2
            registers = Registers(rax=MAGIC, rcx=selector, **control)
        elif kind is Kind.ANSWER and way & 15 < 4:
            if way & 15 == 0:
                reason = TrapReason.VMMCALL
            elif way & 15 == 1:
                width = 32
            else:
                reason, length = TrapReason.CPUID, 2
                width = 64 if way & 15 == 2 else 32
            if width == 64 and reason is TrapReason.CPUID:
                registers = Registers(rax=MAGIC, rcx=selector, r8=one, r9=two, **control)
            elif width == 64:
                registers = Registers(rcx=MAGIC, rdx=selector, r8=one, r9=two, **control)
            elif reason is TrapReason.CPUID:
                registers = Registers(rax=MAGIC, rcx=selector, rbx=one, rdx=two, **control)
            else:
                registers = Registers(rbp=MAGIC, rdx=selector, rsi=one, rdi=two, **control)
        else:
            if kind is Kind.BAD_POINTER and way & 256:
                # With paging, by tables that are not there.
                control |= {"cr0": 1 << 31 | 1, "cr4": 1 << 5, "efer": 1 << 10 | 1 << 8}
            registers = Registers(
                rcx=MAGIC, rdx=selector, r8=one, r9=two, r10=three, r11=four, **control
            )
        return TrapEvent(
            sent.seq,
            reason,
            registers,
            self.vm,
            lane.number,
            ip=0x1000,
            length=length,
            width=width,
            ring=3 if kind is Kind.RING else 0,
        )

    # Its answer.

    async def resume(self, event, writes):
        lane, ledger = self.lanes[event.vcpu], self._ledger
        sent = lane.open[0] if lane.open else None
        if sent is None or sent.seq != event.seq or sent.answered:
            opened = [each.seq for each in lane.open]
            ledger.wrong(f"trap {event.seq} is answered out of order or again, open: {opened}")
            return
        sent.answered = True
        if event.seq % 32 == 0:
            # A VM that takes its time.
            await anyio.sleep(0)
        lane.open.popleft()
        kind, process = sent.kind, sent.process
        reply = self._read_reply(event, writes, sent)
        if kind is Kind.LOST and reply is Reply.ANSWER:
            reply = Reply.LOST
        ledger.answered += 1
        ledger.replies[kind, reply] += 1
        if reply not in REPLIES[kind]:
            ledger.wrong(f"{kind.name} got {reply.value}, as {writes}")
        if reply is Reply.DENIED:
            self._denied(sent)
        elif reply is not Reply.NATIVE and kind is not Kind.LAST:
            self._let_through(sent)
        if sent.ask is not None:
            self._asked(lane, sent.ask, reply)
        elif kind is Kind.HAMMER and sent.nth == HAMMER_LENGTH:
            ledger.check(
                process.let_through >= BURST,
                f"a quota of {BURST} requests let {process.let_through} through",
            )
        if kind is not Kind.LAST:
            self._open -= 1
        self._feed_soon(lane)
        self._answered.set()
        if reply is Reply.LOST:
            raise BackendError("the VM did not take the answer")

    def _read_reply(self, event, writes, sent: Sent) -> Reply:
        if writes is None:
            return Reply.NATIVE
        if writes.rip != event.ip + event.length:
            return Reply.WRONG
        one, *others = writes.values
        if others == [None, None, STAMP]:
            if one == Gate.WAIT:
                return Reply.WAIT
            if one != sent.expected and (sent.ask is None or one not in sent.ask.seqs):
                return Reply.WRONG
            if sent.kind is Kind.MEMORY:
                slot = sent.slot
                data = bytes(self._memory[slot : slot + 16])
                return Reply.ANSWER if data[:8] == data[:7:-1] else Reply.WRONG
            return Reply.ANSWER
        if others != [None, None, None]:
            return Reply.WRONG
        return {None: Reply.UNTOUCHED, FALLBACK: Reply.FALLBACK, DENIED: Reply.DENIED}.get(
            one, Reply.WRONG
        )

    def _denied(self, sent: Sent) -> None:
        """Too many requests by now, or too many bytes: anything else is no reason."""
        process = sent.process
        if sent.kind in (Kind.RING, Kind.OVER, Kind.LAST, Kind.IN_DEBT):
            return
        # Another lane's retry may have been taken before this one.
        nth = sent.nth if sent.ask is None else process.fed
        self._ledger.check(
            nth > BURST, f"{sent.kind.name} is denied as request {nth} of its address space"
        )

    def _let_through(self, sent: Sent) -> None:
        process, now = sent.process, time.monotonic()
        self._ledger.let_through += 1
        process.let_through += 1
        if process.let_through > BURST:
            most = BURST + RATE * (now - process.since)
            self._ledger.check(
                process.let_through <= most + 1e-6,
                f"an address space had {process.let_through} requests, allowed are {most:g}",
            )
        if sent.kind is Kind.IN_DEBT:
            assert process.in_debt_since is not None
            self._ledger.check(
                now - process.in_debt_since >= DEBT_SECONDS,
                "an address space had a request while it owed bytes",
            )

    def _asked(self, lane: Lane, ask: Ask, reply: Reply) -> None:
        kind = ask.kind
        if reply is Reply.WAIT and kind in RETRIED:
            self._ask_later(lane, ask)
            if kind is Kind.ECHO and not ask.echoed:
                ask.echoed = True
                other = Ask(kind, ask.values, ask.process)
                other.echoed = True
                self._ask_later(lane, other, elsewhere=True)
            return
        if reply not in (Reply.WAIT, Reply.DENIED):
            self._ledger.ends[kind] += 1
        # Denied, it gives up.
        if kind is Kind.SLOW_READ:
            self._ask_slots.append(ask.values[0])

    def _ask_later(self, lane: Lane, ask: Ask, *, elsewhere: bool = False) -> None:
        way = ask.values[1]
        if elsewhere or way >> 4 & 3 == 0:
            lane = self.lanes[(lane.number + 1) % self._planned_lanes]
        # Once it was late, it hurries: else a result that expires each time is never collected.
        due = lane.steps + (0 if ask.retried else RETRY_AFTER[way % len(RETRY_AFTER)])
        ask.retried = True
        heappush(lane.again, (due, next(self._ties), ask))
        self._feed_soon(lane)

    def oldest(self) -> str:
        """What has been open for longest, for people."""
        first = sorted((lane.open[0] for lane in self.lanes if lane.open), key=lambda s: s.seq)
        return ", ".join(f"{sent.kind.name} ({sent.seq})" for sent in first[:10])
