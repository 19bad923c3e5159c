"""Handlers on another machine: the agent beside the VM, and the server that runs handlers.

From top to bottom; imports run down only, which a contract in `pyproject.toml` checks.

| module or package | holds |
|---|---|
| `agent` | the end beside the VM: any `Backend`, and a connection |
| `server` | `AgentServer` for many agents; `RemoteBackend`, one VM of an agent |
| `sockets` | frames over unix sockets, TCP and TLS |
| `nats` | the same over NATS: subjects, messages, which server has which trap, recordings |
| `session` | what a server remembers of a VM: frames in, frames out, no I/O |
| `handshake` | HELLO, and the WELCOME or REFUSED that answers it |
| `links` | what agent and session ask of a transport |
| `urls` | where an agent connects to, and where a server listens |
| `wire` | the frames, as structs and as bytes |
| `limits` | what one agent may have a server keep |

The layer stands beside `recording`: like a replay, a remote VM is a backend, so that
`backends` may name it in a spec. It needs the engine below it, and no backend: an agent takes
whatever has the interface in `vm.backend`.

Another transport, such as another message broker, has to bring an `AgentLink` and a `Link`
(`links`), and a place in `agent.dial` and `server.listener`, which choose by the URL.
"""

from vmibridge.transport.agent.agent import Agent
from vmibridge.transport.limits import AgentLimits
from vmibridge.transport.server.server import AgentServer
from vmibridge.transport.server.single import RemoteBackend

__all__ = ["Agent", "AgentLimits", "AgentServer", "RemoteBackend"]
