"""The traps of an agent on NATS: who has each of them, and when it is sent again.

| a trap is | and then |
|---|---|
| sent, and no server has said TAKEN | its server is unknown: all are asked |
| taken by a server | that one is asked, now and then |
| with no server: no responders, or it was given back or refused | sent again after a pause |
| with a server that is silent, or gone | sent again, marked: it may have run there |

Each time that it is sent it has another attempt number, which is in the reply subject. So what
comes for an attempt that was given up is known as that, whenever it comes.

A state machine over a clock that it is given, which stands still while NATS is away: no I/O.
"""

import random
from collections.abc import Iterator

from vmibridge.transport.nats.peers import Peer
from vmibridge.transport.wire import Trap

_FIRST_PAUSE = 0.02
"""Seconds until a trap that no server has is sent again, before jitter; doubled each time."""
_MAX_PAUSE = 0.5
_MAX_MISSES = 2
"""No responders, so often in a row, and a server is gone. Once may be just before it has
subscribed again, after NATS was restarted."""


class Sent:
    """The trap of one vCPU."""

    __slots__ = (
        *("asked", "attempt", "deadline", "elsewhere", "frame", "heard", "holder"),
        *("key", "only", "pause", "subject", "waits_until"),
    )

    def __init__(self, frame: Trap, deadline: float, subject: str, key: object) -> None:
        self.frame = frame
        self.deadline = deadline
        """When the agent answers it by itself."""
        self.subject = subject
        self.key = key
        """What a guest asks again, when it was told to wait."""
        self.elsewhere: bool = frame.elsewhere
        """A server that is gone may have run it."""
        self.attempt = 0
        self.holder: Peer | None = None
        self.only: Peer | None = None
        """Who is to have it: it has told the guest to ask again."""
        self.heard: float = 0.0
        self.asked: float = 0.0
        self.waits_until: float | None = None
        """No server has it: when it is to be sent again."""
        self.pause = _FIRST_PAUSE


class SentTraps:
    """The traps that are not answered; one a vCPU."""

    def __init__(self, silence: float) -> None:
        self.silence = silence
        self._ask_after = silence / 6
        self._by_vcpu: dict[int, Sent] = {}
        self._by_seq: dict[int, Sent] = {}
        self._since = 0.0
        """When NATS was there again."""

    def __iter__(self) -> Iterator[Sent]:
        return iter(list(self._by_vcpu.values()))

    def __len__(self) -> int:
        return len(self._by_vcpu)

    def add(self, sent: Sent) -> None:
        """A new trap; the one of its vCPU before it is over."""
        before = self._by_vcpu.get(sent.frame.vcpu)
        if before is not None:
            self.drop(before)
        self._by_vcpu[sent.frame.vcpu] = sent
        self._by_seq[sent.frame.seq] = sent

    def get(self, seq: int, attempt: int | None = None) -> Sent | None:
        """The trap of this number that waits; with `attempt`, only if that is the last one."""
        sent = self._by_seq.get(seq)
        return None if sent is None or attempt not in (None, sent.attempt) else sent

    def drop(self, sent: Sent) -> None:
        """It is answered, or its answer is not awaited any more."""
        del self._by_vcpu[sent.frame.vcpu]
        del self._by_seq[sent.frame.seq]

    def on_connected(self, now: float) -> None:
        """NATS is there again; servers may reconnect later, and are not given up for that."""
        self._since = now

    def hear_all(self, now: float) -> None:
        """No server can be heard now: none of them is silent."""
        for sent in self._by_vcpu.values():
            sent.heard = now

    def excuse(self, seconds: float) -> None:
        """Nobody was listened to for so long: that is no silence of a server."""
        for sent in self._by_vcpu.values():
            sent.heard += seconds

    def begin(self, sent: Sent, now: float) -> None:
        """It is about to be sent."""
        sent.attempt += 1
        sent.holder = None
        sent.waits_until = None
        sent.heard = sent.asked = now

    def send_later(self, sent: Sent, now: float) -> None:
        """No server has it, and none has run it: it is to be sent again, without the mark."""
        sent.only = None
        sent.waits_until = now + sent.pause * random.uniform(0.5, 1.0)  # noqa: S311
        sent.pause = min(sent.pause * 2, _MAX_PAUSE)
        # So what still comes for this attempt is known as late.
        sent.attempt += 1
        sent.holder = None

    def held_by(self, sent: Sent, peer: Peer, now: float) -> bool:
        """`peer` speaks of it; returns whether it is the one that has it."""
        if sent.waits_until is not None:
            return False
        if sent.holder is None:
            sent.holder = peer
        if sent.holder is not peer:
            return False
        sent.heard = now
        return True

    def to_send(self, now: float) -> list[Sent]:
        """Those whose pause is over."""
        return [sent for sent in self if sent.waits_until is not None and sent.waits_until <= now]

    def to_ask(self, now: float) -> list[Sent]:
        """Those of which nothing was heard for a while."""
        found = []
        for sent in self._by_vcpu.values():
            if sent.waits_until is None and now - sent.asked >= self._ask_after:
                sent.asked = now
                found.append(sent)
        return found

    def to_give_up(self, now: float) -> list[Sent]:
        """Those whose server is gone; they are marked."""
        found = []
        # Servers may have lost NATS with us, and subscribe again later than we do: until then no
        # responders do not mean that a server is gone.
        settled = now - self._since >= self.silence
        for sent in self._by_vcpu.values():
            if sent.waits_until is not None:
                continue
            holder = sent.holder
            gone = settled and holder is not None and holder.misses >= _MAX_MISSES
            if gone or now - sent.heard >= self.silence:
                sent.elsewhere = True
                found.append(sent)
        return found
