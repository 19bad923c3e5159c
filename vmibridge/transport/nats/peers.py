"""The servers that an agent has heard of, on one NATS.

A server is known by the inbox that it gives; it is forgotten when it is gone. A guest that was
told to wait asks again, and the handler that it waits for is with one of them (`Waiting`).

State machines over a clock that they are given: no I/O.
"""

import itertools
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator

from vmibridge.text import printable
from vmibridge.transport.nats.message import FROM_NATS_SERVER, Messages, NatsFromServer

MAX_PEERS = 4096
_MAX_WAITING = 1024


class Peer:
    """One server, as an agent knows it: one incarnation."""

    __slots__ = (
        *("answered", "ended", "heard", "messages", "misses"),
        *("name", "number", "subject", "under_way"),
    )

    def __init__(self, number: int, subject: str, now: float) -> None:
        self.number = number
        self.subject = subject
        """Where it listens."""
        self.name: str = printable(subject.rpartition(".")[2][:8])
        self.messages: Messages[NatsFromServer] = Messages(FROM_NATS_SERVER)
        self.heard: float = now
        self.misses: int = 0
        """How often there were no responders at `subject`, since it was heard."""
        self.answered = 0
        self.under_way = 0
        """Accesses to guest memory that it waits for."""
        self.ended = False
        """It knows that the guest has ended."""

    def speaks(self, now: float) -> None:
        """Something came from it."""
        self.heard, self.misses = now, 0


class Peers:
    """Those that are known. `silence`: seconds until one that says nothing does not count."""

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._by_subject: dict[str, Peer] = {}
        self._by_number: dict[int, Peer] = {}
        self._numbers = itertools.count(1)
        self._turn = 0

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_subject.values()))

    def speaking(self, subject: str, now: float) -> Peer | None:
        """The one that listens at `subject`, which may be new; `None`: there are too many."""
        peer = self._by_subject.get(subject)
        if peer is None and subject and len(self._by_subject) < MAX_PEERS:
            peer = Peer(next(self._numbers), subject, now)
            self._by_subject[subject] = self._by_number[peer.number] = peer
        return peer

    def numbered(self, number: int) -> Peer | None:
        """The one of this number, if it is not forgotten."""
        return self._by_number.get(number)

    def is_any_heard(self, now: float, silence: float) -> bool:
        """Whether one has said something within the last `silence` seconds, and is not gone."""
        return any(
            not peer.misses and now - peer.heard < silence for peer in self._by_subject.values()
        )

    def heard_of(self, now: float) -> Peer | None:
        """One that is there, each in turn. NATS would go on to give a silent one its share."""
        heard = [
            peer
            for peer in self._by_subject.values()
            if not peer.misses and now - peer.heard < self._silence
        ]
        self._turn += 1
        return heard[self._turn % len(heard)] if heard else None

    def excuse(self, seconds: float) -> None:
        """None was listened to for so long: that is no silence of theirs."""
        for peer in self._by_subject.values():
            peer.heard += seconds

    def forget_silent(
        self, now: float, silence: float, holders: Container[Peer | None]
    ) -> list[Peer]:
        """Those that are gone, or said nothing for so long, and have nothing of ours."""
        found = [
            peer
            for peer in self
            if (peer.misses or now - peer.heard >= silence)
            and peer not in holders
            and not peer.under_way
        ]
        for peer in found:
            del self._by_subject[peer.subject], self._by_number[peer.number]
        return found


class Waiting:
    """Which server has told a guest to ask again, by what it asks."""

    def __init__(self) -> None:
        self._peers: OrderedDict[Hashable, Peer] = OrderedDict()

    def get(self, key: Hashable) -> Peer | None:
        """Who is to have it."""
        return self._peers.get(key)

    def add(self, key: Hashable, peer: Peer) -> None:
        """The guest was told so; the oldest are forgotten."""
        self._peers[key] = peer
        if len(self._peers) > _MAX_WAITING:
            self._peers.popitem(last=False)

    def drop(self, key: Hashable) -> None:
        """It has its answer, or has to be asked again from the start."""
        self._peers.pop(key, None)

    def drop_peer(self, peer: Peer) -> None:
        """It is gone, and its handlers are."""
        for key in [key for key, other in self._peers.items() if other is peer]:
            del self._peers[key]
