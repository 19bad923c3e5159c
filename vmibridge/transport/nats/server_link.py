"""The way from a server to the agent of one session, by subjects: a `Link`.

Which subject an answer goes to is in the message that brought the trap; it is another one each
time that the trap is sent.
"""

import time

from vmibridge.errors import WireError
from vmibridge.transport.handshake import refused
from vmibridge.transport.nats.client import NatsClient
from vmibridge.transport.nats.message import (
    FROM_NATS_AGENT,
    Ask,
    Messages,
    NatsFromAgent,
    Taken,
    pack,
)
from vmibridge.transport.session import Session
from vmibridge.transport.wire import (
    Answer,
    Cancel,
    Frame,
    Memory,
    Native,
    Read,
    Returned,
    Trap,
    Write,
)

_clock = time.monotonic

_SIGN = 0.05
"""Seconds between two words of a server to which something large comes. It does not know the
`silence` of the agent, which may be short."""


class _Open:
    """A trap that is not answered."""

    __slots__ = ("accesses", "asked", "reply", "vcpu")

    def __init__(self, vcpu: int, reply: str) -> None:
        self.vcpu = vcpu
        self.reply = reply
        """Where its answer goes."""
        self.accesses: dict[int, Read | Write] = {}
        """Guest memory that has been asked for."""
        self.asked: dict[int, int] = {}
        """How often the agent has asked while they were under way."""


class NatsSessionLink:
    """The way to the agent of one session; a `Link`."""

    def __init__(self, client: NatsClient, inbox: str, session: Session, hello: bytes) -> None:
        self.session = session
        self.hello = hello
        self.inbox: str = f"{inbox}.{session.incarnation.hex()}"
        self.heard: float = _clock()
        self.closed: bool = False
        self.agent = ""
        """The agent's own inbox."""
        self._client = client
        self._messages: Messages[NatsFromAgent] = Messages(FROM_NATS_AGENT)
        self._open: dict[int, _Open] = {}
        self._last: dict[int, int] = {}
        self._answers: dict[int, tuple[Answer | Native, str]] = {}
        self._reply = ""
        self._signed = 0.0

    def allow(self, size: int) -> None:
        """Messages are bounded by what any frame may have."""

    def close(self) -> None:
        """No word goes out any more."""
        self.closed = True

    def say(self, reply: str, frame: Frame | Taken) -> None:
        """Publish for the agent."""
        if not self.closed and reply:
            self._client.publish(reply, pack(frame), self.inbox)

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame to where its trap came from."""
        seq = getattr(frame, "seq", None)
        if seq is None:
            self.say(self._reply, frame)
            return
        found = self._open.get(seq)
        if found is None:
            return
        if isinstance(frame, Read | Write):
            found.accesses[frame.access] = frame
        elif isinstance(frame, Answer | Native):
            del self._open[seq]
            self._answers[found.vcpu] = (frame, found.reply)
        elif isinstance(frame, Returned):
            del self._open[seq]
            del self._last[found.vcpu]
        self.say(found.reply, frame)

    def take(self, data: bytes, reply: str) -> None:
        """Take the frames of a message. Raises `WireError`."""
        self.heard = _clock()
        if self.session.link is not self and not self.closed:
            # The agent was thought to be away.
            self.session.attach(self)
        frames = self._messages.frames(data)
        if not frames:
            self._give_a_sign()
        for frame in frames:
            self._reply = reply
            try:
                self._take(frame, reply)
            finally:
                self._reply = ""

    def _give_a_sign(self) -> None:
        """A part of something large has come: what the agent asks stands behind the rest of it."""
        if self.heard - self._signed >= _SIGN:
            self._signed = self.heard
            for seq, found in self._open.items():
                if found.accesses:
                    self.say(found.reply, Taken(seq))

    def _take(self, frame: NatsFromAgent, reply: str) -> None:
        if isinstance(frame, Trap):
            self._take_trap(frame, reply)
        elif isinstance(frame, Ask):
            self._say_taken(frame)
        elif isinstance(frame, Cancel):
            found = self._open.get(frame.seq)
            if found is not None and found.reply == reply:
                self.session.take(frame)
        elif isinstance(frame, Memory):
            for found in self._open.values():
                if found.accesses.pop(frame.access, None) is not None:
                    found.asked.pop(frame.access, None)
                    break
            self.session.take(frame)
        else:
            self.session.take(frame)

    def _take_trap(self, frame: Trap, reply: str) -> None:
        last = self._last.get(frame.vcpu, 0)
        if frame.seq < last:
            return
        if frame.seq > last:
            self._open.pop(last, None)
        self._last[frame.vcpu] = frame.seq
        before = self._open.get(frame.seq)
        if before is not None:
            before.reply = reply
        else:
            self._open[frame.seq] = _Open(frame.vcpu, reply)
        try:
            self.session.take_trap(frame)
        except WireError as error:
            self._open.pop(frame.seq, None)
            del self._last[frame.vcpu]
            self.say(reply, refused(error, final=False))
            raise
        if frame.seq in self._open:
            self.say(reply, Taken(frame.seq))

    def _ask_for_memory_again(self, found: _Open) -> None:
        """An access that is under way when the agent asks once more may be lost, or only large: so
        it is sent again at the second time, the fourth, the eighth, or a slow connection would
        have more to carry with each of them."""
        for number, access in found.accesses.items():
            asked = found.asked[number] = found.asked.get(number, 0) + 1
            if asked > 1 and not asked & asked - 1:
                self.say(found.reply, access)

    def _say_taken(self, ask: Ask) -> None:
        """That the trap is here, or its answer again."""
        found = self._open.get(ask.seq)
        kept = None if found is None else self.session.kept_answer(found.vcpu, ask.seq)
        if kept is not None:
            # It was answered, or given back, while the agent was thought to be away.
            self.post(kept)
        elif found is not None:
            self.say(found.reply, Taken(ask.seq))
            if not self._client.has_backlog:
                self._ask_for_memory_again(found)
        else:
            answer, reply = self._answers.get(ask.vcpu, (None, ""))
            if answer is not None and answer.seq == ask.seq:
                self.say(reply, answer)
