"""One set of handlers of one VM, at work; when handlers are loaded anew, another follows.

A set that was followed takes no new requests. It ends when it has answered those that it
has, and given the results of those that were told to wait, or they have expired.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import anyio

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.registers import read_packet
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
from vmibridge.errors import UnsupportedTrapError
from vmibridge.transport.server.backend import SessionBackend
from vmibridge.transport.server.shared_handlers import Common
from vmibridge.transport.server.vm_server import VmServer
from vmibridge.transport.server.welcome import declared_reads, highest_timeout
from vmibridge.transport.session import Session
from vmibridge.transport.wire import WireRead
from vmibridge.vm.trap import TrapEvent, TrapFilter


class Generation:
    """See the module. Raises `ValueError` as `BridgeServer` does."""

    def __init__(
        self,
        session: Session,
        bridge: Bridge,
        settings: ServerSettings,
        taps: Sequence[Tap],
        common: Common,
    ) -> None:
        self.taps = taps
        self.handlers: list[BridgeHandler[Any]] = bridge.handlers
        self.backend: SessionBackend = SessionBackend(session.vm, session)
        self.server: VmServer = VmServer(self.backend, bridge, settings, taps, common)
        self.filter: TrapFilter = bridge.trap_filter
        self.timeout: float = highest_timeout(bridge, settings)
        self.reads: list[WireRead] = declared_reads(bridge)
        self.ended: anyio.Event = anyio.Event()
        """No trap is answered by it any more."""
        self.done: anyio.Event = anyio.Event()
        """Nothing is left of it."""
        self.retired: bool = False
        self._result_timeout = settings.result_timeout
        # Of each vCPU that was told to wait there is a request; results are bounded, too.
        self._most_waiting = 2 * settings.in_flight
        self._waiting: OrderedDict[int, Hashable] = OrderedDict()

    @property
    def quiet(self) -> bool:
        """Whether nobody waits for anything of it."""
        return not self.backend.unanswered and not self._waiting

    def saw(self, outcome: Outcome[Any]) -> None:
        """Keep what was told to wait; a set that was followed ends when it is quiet."""
        event = outcome.event
        assert event is not None
        if outcome.kind is OutcomeKind.WAITING:
            first = outcome.retry_of or event.seq
            self._waiting[first] = _key(event, outcome.packet)
            if len(self._waiting) > self._most_waiting:
                self._waiting.popitem(last=False)
        elif outcome.retry_of is not None:
            self._waiting.pop(outcome.retry_of, None)
        if self.retired and self.quiet:
            self.server.stop()

    def awaits(self, event: TrapEvent) -> bool:
        """Whether this may ask again for what was told to wait here."""
        if not self._waiting:
            return False
        try:
            packet = read_packet(event)
        except (UnsupportedTrapError, ValueError):
            return False
        return _key(event, packet) in self._waiting.values()

    async def retire(self) -> None:
        """Another set takes the traps: end when all is answered."""
        self.retired = True
        if not self.quiet:
            # Results that nobody comes for expire.
            with anyio.move_on_after(self.timeout + self._result_timeout):
                await self.ended.wait()
        self.server.stop()


def _key(event: TrapEvent, packet: BridgePacket) -> Hashable:
    # Its values may differ, as the handler's `retry_values` say.
    return (event.address_space, event.ring, packet.magic, packet.request, packet.method)
