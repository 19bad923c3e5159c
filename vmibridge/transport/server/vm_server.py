"""The server of one VM among those of an `AgentServer`."""

from collections.abc import Sequence
from typing import Any

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.outcome import Outcome
from vmibridge.engine.engine import Engine
from vmibridge.engine.outcome_queue import OutcomeQueue
from vmibridge.engine.server import OUTCOMES_AHEAD, with_handshake
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.summary import Summary
from vmibridge.engine.taps import Tap
from vmibridge.transport.server.shared_handlers import Common
from vmibridge.vm.backend import Backend


class VmServer:
    """What a `BridgeServer` is to its VMs, with places and turns in common with other VMs'.

    Whoever starts it enters its shared handlers before (`Common.use`).
    """

    def __init__(
        self,
        backend: Backend,
        bridge: Bridge,
        settings: ServerSettings,
        taps: Sequence[Tap],
        common: Common,
    ) -> None:
        self._backend = backend
        self._outcomes = OutcomeQueue(OUTCOMES_AHEAD)
        self._error: BaseException | None = None
        self._engine = Engine(
            backend,
            with_handshake(bridge, settings),
            settings,
            self._outcomes.way_in(),
            common.in_flight,
            common.turns(),
            tuple(taps),
            self._on_end,
        )

    @property
    def summary(self) -> Summary:
        """Counts so far, and how the guest ended."""
        return self._engine.summary

    def start(self) -> None:
        """Run, in the backend's task group. Once."""
        self._backend.tasks.start_soon(self._main)

    async def outcome(self) -> Outcome[Any]:
        """The next outcome. Raises `StopAsyncIteration` at the end, or the error it ended with."""
        return await self._outcomes.get()

    def stop(self, *, now: bool = False) -> None:
        """As that of `BridgeServer`."""
        self._engine.stop(now=now)

    async def _main(self) -> None:
        try:
            await self._engine.main()
        finally:
            self._outcomes.end(self._error)

    def _on_end(self, vm: str, error: BaseException | None) -> None:
        self._error = error
