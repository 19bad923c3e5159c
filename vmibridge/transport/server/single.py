"""One VM of an agent, as a backend: for a `BridgeServer` of one's own.

    async with RemoteBackend("unix:/run/vmibridge.sock") as backend:
        server = BridgeServer(backend, Hello())
        async for outcome in server.run():
            ...

It listens, takes the first agent that comes, and is the VM of that agent from there on:
others are refused. The run ends with the guest, or when the agent was away for too long.
"""

import anyio

from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import RefusedError
from vmibridge.transport.limits import AgentLimits
from vmibridge.transport.server.away import give_up_agents
from vmibridge.transport.server.backend import SessionBackend
from vmibridge.transport.server.listener import Listener
from vmibridge.transport.server.welcome import welcome_to
from vmibridge.transport.session import Repeated, Session
from vmibridge.transport.wire import Hello, Welcome
from vmibridge.vm.backend import GuestEnd, TrapSink
from vmibridge.vm.trap import TrapFilter


class RemoteBackend(SessionBackend):
    """See the module. `timeout` is the highest deadline of the server that it is given to:
    the agent answers by itself a little later. `repeated` says what becomes of a trap that a
    server which is gone may have run.

    Raises `BackendSpecError` for a URL that is wrong.
    """

    def __init__(
        self,
        *urls: str,
        vm: str = "vm",
        timeout: float = 5.0,
        fallback: BridgeResponse[object] | None = None,
        repeated: Repeated = "refuse",
        limits: AgentLimits | None = None,
    ) -> None:
        super().__init__(vm)
        self.limits: AgentLimits = limits or AgentLimits()
        self._listener = Listener(urls, self.limits, self._admit)
        self._timeout = timeout
        self._fallback = fallback or BridgeResponse()
        self._repeated: Repeated = repeated
        self._filter = TrapFilter()
        self._came = anyio.Event()

    @property
    def ports(self) -> list[int]:
        """The TCP ports that it listens at; 0 for unix sockets."""
        return self._listener.ports

    async def open(self) -> None:
        """Listen. Raises `BackendError`."""
        await self._listener.open()

    async def close(self) -> None:
        await self._listener.end()

    async def _admit(self, hello: Hello, peer: str) -> tuple[Session, Welcome]:
        if not hasattr(self, "session"):
            # Taps see the VM before its agent comes.
            if hello.architecture != self.architecture.name:
                raise RefusedError(f"only a guest of {self.architecture.name} is served here")
            self.session: Session = Session(
                hello,
                peer,
                vcpus=self.limits.vcpus,
                repeated=self._repeated,
                fallback=self._fallback,
            )
            self.session.vm = self.vm
            self.architecture = self.session.architecture
            self.session.route = lambda _: self
            self.other_hypercalls: bool = hello.other_hypercalls
            self._came.set()
        session = self.session
        if (session.id, session.owner) != (hello.session, peer):
            raise RefusedError("another agent is served here", final=False)
        return session, welcome_to(
            session, self._filter, self._timeout, self._fallback, self.limits, ()
        )

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Wait for an agent, and serve its guest to the end."""
        self._filter = traps
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listener.run)
            await self._came.wait()
            end = GuestEnd()
            if hasattr(self, "session"):
                tasks.start_soon(give_up_agents, lambda: [self.session], self.limits.keep)
                end = await super().run(traps, sink)
            self._listener.close()
            tasks.cancel_scope.cancel()
        return end

    def stop(self) -> None:
        """Hang up: the guest is with the agent, and goes on."""
        super().stop()
        self._came.set()
