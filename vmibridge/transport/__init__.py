"""Handlers on another machine: the agent beside the VM, and the server that runs handlers.

| module or package | holds |
|---|---|
| `wire` | the frames, as structs and as bytes |
| `urls` | where an agent connects to, and where a server listens |
| `session` | what a server remembers of a VM: frames in, frames out, no I/O |
| `agent` | the end beside the VM: any `Backend`, and a connection |
| `server` | `AgentServer` for many agents; `RemoteBackend`, one VM of an agent |
| `sockets` | frames over unix sockets, TCP and TLS |
| `nats` | the same ends on NATS: subjects, messages, who has which trap, recordings |

The layer stands beside `recording`: like a replay, a remote VM is a backend, so that
`backends` may name it in a spec. It needs the server below it, and no backend: an agent takes
whatever has the interface in `vm.backend`.

A transport that has no connections, such as a message broker, has a seam in two places:
`Agent` talks to a `Link`, and `Session` answers to one; both are in `sockets.connection`.
"""

from vmibridge.transport.agent.agent import Agent
from vmibridge.transport.server.server import AgentServer
from vmibridge.transport.server.single import RemoteBackend
from vmibridge.transport.wire import AgentLimits

__all__ = ["Agent", "AgentLimits", "AgentServer", "RemoteBackend"]
