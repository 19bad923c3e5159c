"""What an agent and a session ask of a transport; a transport is whatever has these interfaces.

- A session answers over a `Link`; an agent sends and receives over an `AgentLink`, which `Dialled`
  holds with the WELCOME that came over it.
- `post` never waits and raises nothing: a peer that is gone is the receiver's to find out. So an
  answer can be given from anywhere on the loop, in a task or outside of any.
- Nothing here knows a transport. `sockets` and `nats` each implement both, and import this;
  this imports neither, or the choice between them (`agent.dial`) would close a circle.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from vmibridge.transport.wire import Frame, FromServer, Welcome


class Link(Protocol):
    """What a session asks of the connection to its agent."""

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame, in the order of the calls; never waits, raises nothing."""

    def allow(self, size: int) -> None:
        """A frame of so many bytes may come, from here on."""

    def close(self) -> None:
        """Hang up."""


class AgentLink(Protocol):
    """What an agent asks of the connection to its server."""

    @property
    def away(self) -> str:
        """Why no server would answer now, while the link itself goes on; "" where one would."""

    @property
    def closed(self) -> bool:
        """Nothing comes or goes any more; `receive` raises, too."""

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame; never waits, raises nothing."""

    def cork(self) -> None:
        """Keep what is posted until `uncork`."""

    def uncork(self) -> None:
        """Send what was posted since `cork`."""

    async def receive(self) -> list[FromServer]:
        """Wait for frames. Raises `ConnectionLostError` and `WireError`."""


class Dialled:
    """A connection to a server, after the handshake."""

    def __init__(
        self,
        link: AgentLink,
        welcome: Welcome,
        tasks: Callable[[float], list[Callable[[], Coroutine[Any, Any, None]]]],
        shares: dict[str, int] | None = None,
    ) -> None:
        self.link = link
        self.welcome = welcome
        self.tasks = tasks
        """What has to run beside it, given the seconds of silence that are too many."""
        self.shares: dict[str, int] = {} if shares is None else shares
        """Where several servers answer: how many traps each of them has answered."""
