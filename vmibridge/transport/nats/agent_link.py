"""The end of an agent on NATS: traps as requests that any server of the queue group may take.

To `Agent` this is one connection, with one incarnation behind it. Which server has which trap is
kept here (`attempts`); what a server says of a trap that it does not have is dropped, and
gets an error for its access to guest memory.

A connection to NATS that is lost is made again by nats-py, below this: the link goes on.
"""

import logging
import math
import secrets
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import msgspec

from vmibridge.aio.listening import fail_after_listening, sleep_late
from vmibridge.bridge.request import request_in, retry_key
from vmibridge.bridge.status import Gate
from vmibridge.errors import (
    ConnectionLostError,
    NatsRefusedError,
    WireError,
)
from vmibridge.text import printable
from vmibridge.transport.handshake import WELCOME_SECONDS, check_welcome
from vmibridge.transport.nats.accesses import PeerAccesses
from vmibridge.transport.nats.attempts import Sent, SentTraps
from vmibridge.transport.nats.client import NatsClient, is_no_responders
from vmibridge.transport.nats.message import (
    Ask,
    NatsFromServer,
    Taken,
    pack,
)
from vmibridge.transport.nats.peers import MAX_PEERS, Peer, Peers, Waiting
from vmibridge.transport.nats.subjects import (
    hello_subject,
    to_all_subject,
    trap_subject,
    vm_token,
)
from vmibridge.transport.wire import (
    Answer,
    Cancel,
    End,
    Ended,
    Frame,
    FromServer,
    Hello,
    Memory,
    Native,
    Ping,
    Read,
    Refused,
    Returned,
    Trap,
    Welcome,
    Write,
    layout_of,
    milliseconds,
    trap_event,
)
from vmibridge.vm.arch import architecture_named

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log: logging.Logger = logging.getLogger(__name__)

_clock = time.monotonic

_TROUBLE = 20
"""Times the silence that traps go straight to servers that are heard, after one was silent."""
_NOT_YOURS = "the trap is not yours any more: it was sent to another server"


class NatsAgentLink:
    """See the module; an `AgentLink`."""

    def __init__(self, client: NatsClient, hello: Hello) -> None:
        self.shares: dict[str, int] = {}
        """Traps that each server answered, by the first digits of the id of its incarnation."""
        self._client = client
        self._url = client.url
        self._vm = hello.vm
        self._token = vm_token(hello.vm)
        self._hello = pack(hello)
        self._architecture = architecture_named(hello.architecture, hello.architecture_version)
        self._layout = layout_of(self._architecture)
        self._inbox = client.nats.new_inbox()
        self._to_all = to_all_subject(self._token, hello.session)
        self._sent = SentTraps(client.url.silence)
        self._peers = Peers(client.url.silence)
        self._waiting = Waiting()
        self._accesses = PeerAccesses()
        self._frames: deque[FromServer] = deque()
        self._came = anyio.Event()
        self._welcome: Welcome | Refused | None = None
        self._no_responders = False
        self._end: End | None = None
        self._ended_at = 0.0
        self._logged: set[str] = set()
        self._trouble_until = self._pinged = 0.0
        self._silence = math.inf
        """Seconds after which a server that answers no ping does not count: of `keep_alive`."""
        client.on_reconnect = self._on_reconnect
        client.on_trouble = self._wake

    async def shake_hands(self) -> Welcome:
        """Raises `ConnectionLostError`, `RefusedByServerError`, `WireError`; `TimeoutError` when
        no server says a word; `NatsRefusedError` when NATS does not let us ask.
        """
        await self._client.subscribe(f"{self._inbox}.>", self._take)
        self._say_hello()
        with suppress(TimeoutError), fail_after_listening(WELCOME_SECONDS):
            while not (self._welcome or self._no_responders or self._client.denied):
                self._look_whether_closed()
                await self._wait()
        first = self._welcome
        if first is None:
            if self._no_responders:
                raise ConnectionLostError("no server listens on this NATS")
            if self._client.denied:
                raise NatsRefusedError(self._client.denied[0])
            raise TimeoutError(f"no server has said WELCOME in {WELCOME_SECONDS:g} s")
        welcome = check_welcome(first, self._architecture)
        self._client.at_work = True
        # To the agent this is one incarnation: which server has a trap is kept track of here.
        return msgspec.structs.replace(welcome, incarnation=secrets.token_bytes(16))

    def _say_hello(self) -> None:
        self._client.publish(hello_subject(self._token), self._hello, f"{self._inbox}.hello")

    # --- what the agent posts -------------------------------------------------------

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame; never waits, raises nothing."""
        if isinstance(frame, Trap):
            self._post_trap(frame)
        elif isinstance(frame, Memory):
            self._reply(frame)
        elif isinstance(frame, Cancel):
            sent = self._sent.get(frame.seq)
            if sent is not None:
                self._sent.drop(sent)
                self._cancel(frame.seq, sent.attempt, sent.holder)
        elif isinstance(frame, End):
            self._end = frame
            self._ended_at = _clock()
            for peer in self._peers:
                self._publish_to(peer, pack(frame))
            self._look_for_end()

    @property
    def away(self) -> str:
        """As of an `AgentLink`."""
        if not self._client.is_up:
            return "NATS is not there"
        return "" if self._is_any_heard() else "no server is heard on this NATS"

    def _is_any_heard(self) -> bool:
        return self._peers.is_any_heard(self._client.uptime(), self._silence)

    @property
    def closed(self) -> bool:
        """NATS has closed the connection for good."""
        return self._client.closed.is_set()

    def cork(self) -> None:
        """nats-py coalesces by itself."""

    def uncork(self) -> None:
        """As `cork`."""

    def _post_trap(self, frame: Trap) -> None:
        event = trap_event(frame, self._vm, self._layout)
        packet = request_in(event)
        key = None if packet is None else retry_key(event, packet)
        deadline = _clock() + frame.left / 1000
        subject = trap_subject(self._token, packet, self._url.partitions)
        sent = Sent(frame, deadline, subject, key)
        sent.only = self._waiting.get(key)
        self._sent.add(sent)
        self._send(sent)

    def _send(self, sent: Sent) -> None:
        now = self._client.uptime()
        if sent.only is None and now < self._trouble_until:
            sent.only = self._peers.heard_of(now)
        self._sent.begin(sent, now)
        left = milliseconds(sent.deadline - _clock())
        frame = msgspec.structs.replace(sent.frame, left=left, elsewhere=sent.elsewhere)
        message = self._hello + pack(frame)
        if len(message) > self._client.nats.max_payload:
            # Memory that travels along only saves a trip.
            message = self._hello + pack(msgspec.structs.replace(frame, memory=()))
        subject = sent.subject if sent.only is None else sent.only.subject
        reply = f"{self._inbox}.{frame.seq:x}.{sent.attempt:x}"
        self._client.publish(subject, message, reply)

    def _publish_to(self, peer: Peer | None, message: bytes) -> None:
        """To one server, or to all."""
        if peer is None:
            self._client.publish(self._to_all, message)
        else:
            self._client.publish(peer.subject, message, f"{self._inbox}.to.{peer.number}")

    def _cancel(self, seq: int, attempt: int, peer: Peer | None) -> None:
        """This attempt is given up: a server may have a later one of the same trap."""
        subject = self._to_all if peer is None else peer.subject
        self._client.publish(subject, pack(Cancel(seq)), f"{self._inbox}.{seq:x}.{attempt:x}")

    # --- what servers say -----------------------------------------------------------

    async def receive(self) -> list[FromServer]:
        """Wait for frames. Raises `ConnectionLostError`."""
        while not self._frames:
            self._look_whether_closed()
            await self._wait()
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def _look_whether_closed(self) -> None:
        if self._client.closed.is_set():
            raise ConnectionLostError("NATS has closed the connection")

    async def _wait(self) -> None:
        self._came = anyio.Event()
        await self._came.wait()

    def _wake(self) -> None:
        self._came.set()

    async def _take(self, message: "Msg") -> None:
        """A message has come to the inbox: nothing in it may hurt."""
        place = message.subject[len(self._inbox) + 1 :].split(".")
        try:
            if is_no_responders(message):
                self._on_no_responders(place)
            elif place == ["probe"]:
                self._client.publish(message.reply, pack(Ping()))
            else:
                self._take_frames(place, message)
        except (WireError, ValueError, IndexError) as error:
            log.debug("vm %s: %s: malformed message: %s", self._vm, self._url, error)

    def _on_no_responders(self, place: list[str]) -> None:
        """No responders to the message that had this reply subject."""
        if place == ["hello"]:
            self._no_responders = True
            self._came.set()
        elif place[0] == "to":
            peer = self._peers.numbered(int(place[1]))
            if peer is not None:
                peer.misses += 1
                self._look_for_end()
        else:
            sent = self._sent.get(int(place[0], 16), int(place[1], 16))
            if sent is not None and sent.holder is None:
                if sent.only is not None:
                    self._waiting.drop(sent.key)
                self._sent.send_later(sent, self._client.uptime())
                self._log_once("no responders", "no server takes traps on this NATS; trying again")

    def _take_frames(self, place: list[str], message: "Msg") -> None:
        now = self._client.uptime()
        peer = self._peers.speaking(message.reply, now)
        if peer is None:
            raise WireError("no reply subject, or one server too many")
        frames = peer.messages.frames(message.data)
        peer.speaks(now)
        if place == ["hello"]:
            for frame in frames:
                if isinstance(frame, Welcome | Refused) and self._welcome is None:
                    self._welcome = frame
                    self._came.set()
            return
        if place[0] == "to":
            if any(isinstance(frame, Ended) for frame in frames):
                peer.ended = True
                self._look_for_end()
            return
        seq, attempt = int(place[0], 16), int(place[1], 16)
        if not frames:
            # A part of something large: its server is not silent.
            sent = self._sent.get(seq, attempt)
            if sent is not None:
                self._sent.held_by(sent, peer, now)
        for each in frames:
            self._take_frame(each, peer, seq, attempt)

    def _take_frame(self, frame: NatsFromServer, peer: Peer, seq: int, attempt: int) -> None:
        if getattr(frame, "seq", seq) != seq:
            raise WireError("about another trap")
        sent = self._sent.get(seq, attempt)
        # Before `held_by`, which would take the server that refuses it for the one that has it.
        if sent is not None and isinstance(frame, Refused):
            self._sent.send_later(sent, self._client.uptime())
            self._log_once(frame.why, f"a server refuses its traps: {printable(frame.why)}")
            return
        if sent is None or not self._sent.held_by(sent, peer, self._client.uptime()):
            self._refuse(frame, peer, attempt)
        elif isinstance(frame, Answer | Native):
            self._sent.drop(sent)
            peer.answered += 1
            self.shares[peer.name] = peer.answered
            self._mind_waiting(sent, frame, peer)
            self._pass_on(frame)
        elif isinstance(frame, Returned):
            # It stops, and has asked no handler.
            self._sent.send_later(sent, self._client.uptime())
        elif isinstance(frame, Read | Write):
            access = self._accesses.take(frame, peer)
            if access is not None:
                self._pass_on(access)

    def _refuse(self, frame: NatsFromServer, peer: Peer, attempt: int) -> None:
        """Of a trap that it does not have."""
        if isinstance(frame, Taken):
            # Late: it is not that server's any more, and its handler must not go on for it.
            self._cancel(frame.seq, attempt, peer)
        elif isinstance(frame, Read | Write):
            self._publish_to(peer, pack(Memory(frame.access, error=_NOT_YOURS)))

    def _mind_waiting(self, sent: Sent, frame: Answer | Native, peer: Peer) -> None:
        """A guest that is told to wait asks again, and the handler is with that server."""
        if sent.key is None:
            return
        if isinstance(frame, Answer) and frame.rax == Gate.WAIT:
            self._waiting.add(sent.key, peer)
        else:
            self._waiting.drop(sent.key)

    def _pass_on(self, frame: FromServer) -> None:
        self._frames.append(frame)
        self._came.set()

    def _reply(self, frame: Memory) -> None:
        found = self._accesses.reply(frame)
        if found is not None:
            peer, memory = found
            self._publish_to(peer, pack(memory))
            following = self._accesses.following()
            if following is not None:
                self._pass_on(following)

    # --- time -----------------------------------------------------------------------

    async def watch(self) -> None:
        """Ask about traps, and send those again that no server has."""
        step = max(0.01, self._sent.silence / 60)
        while True:
            # What came while the loop stood still is taken behind this.
            late = await sleep_late(step)
            self._sent.excuse(late)
            self._peers.excuse(late)
            self._ended_at += late
            self._look_for_end()
            if self._client.nats.is_connected:
                now = self._client.uptime()
                if self._client.has_backlog:
                    # Memory that a handler reads, on its way to the server that is silent.
                    self._sent.hear_all(now)
                self._look_after(now)

    def _look_after(self, now: float) -> None:
        if now < self._trouble_until and now - self._pinged >= self._url.silence / 3:
            self._ping(now)
        for sent in self._sent.to_give_up(now):
            if sent.holder is None or not sent.holder.misses:
                self._trouble_until = now + _TROUBLE * self._url.silence
            if sent.holder is not None:
                self._log_once(
                    sent.holder.name,
                    f"the server {sent.holder.name} is gone: its traps are sent to others",
                )
                self._waiting.drop_peer(sent.holder)
            # If it runs after all, its answer is not waited for.
            self._cancel(sent.frame.seq, sent.attempt, sent.holder)
            sent.only = None
            self._send(sent)
        for sent in self._sent.to_send(now):
            self._send(sent)
        for sent in self._sent.to_ask(now):
            # Its answer goes to this attempt's subject.
            self._publish_to(sent.holder, pack(Ask(sent.frame.seq, sent.frame.vcpu)))

    def _ping(self, now: float) -> None:
        """Whether they are there, and that this VM is."""
        self._pinged = now
        for peer in self._peers:
            self._publish_to(peer, pack(Ping()))

    async def keep_alive(self, silence: float) -> None:
        """Let servers know that the VM is there; forget those that are gone."""
        self._silence = silence
        while True:
            late = await sleep_late(silence / 3)
            now = self._client.uptime()
            # `watch` may excuse them behind this.
            for peer in self._peers.forget_silent(
                now - late, 4 * silence, {sent.holder for sent in self._sent}
            ):
                self._waiting.drop_peer(peer)
            self._ping(now)
            if not self._is_any_heard():
                # One that has come meanwhile would be found by the next trap alone.
                self._say_hello()

    def _on_reconnect(self) -> None:
        self._sent.on_connected(self._client.uptime())
        if self._welcome is None:
            self._say_hello()
        for peer in self._peers:
            peer.misses = 0
            if self._end is not None:
                self._publish_to(peer, pack(self._end))

    # --- the end --------------------------------------------------------------------

    def _look_for_end(self) -> None:
        """ENDED, when every server has said so that is there."""
        if self._end is None:
            return
        silent = _clock() - self._ended_at >= self._url.silence
        if silent or all(peer.ended or peer.misses for peer in self._peers):
            self._pass_on(Ended())

    def _log_once(self, what: str, text: str) -> None:
        if what not in self._logged and len(self._logged) < MAX_PEERS:
            self._logged.add(what)
            log.warning("vm %s: %s: %s", self._vm, self._url, text)

    def log_shares(self) -> None:
        """Which server answered how many traps."""
        if self.shares:
            shares = ", ".join(f"{name} {count}" for name, count in self.shares.items())
            log.info("vm %s: answered by server: %s", self._vm, shares)
