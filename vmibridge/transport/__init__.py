"""Handlers on another machine: the agent beside the VM, and the server that runs handlers.

| module | holds |
|---|---|
| `wire` | the frames, as structs and as bytes |
| `urls` | where an agent connects to, and where a server listens |
| `sockets`, `connection` | sockets, TLS; frames over a connection |
| `agent` | the end beside the VM: any `Backend`, and a connection |
| `carrier`, `flights` | from a trap to its answer; what is in flight |
| `session`, `session_backend` | what a server remembers of a VM; that VM as a `Backend` |
| `listener` | who may become a session: connections, the handshake, limits |
| `remote` | `RemoteBackend`: one VM of an agent, for a server of one's own |
| `serve` | `AgentServer`: many agents, handlers of their own for each VM |
| `generation`, `vm_server` | one set of handlers of one VM; the server that runs it |
| `shared` | what the VMs of a server have in common: shared handlers, places, turns |
| `nats_*` | the same ends on NATS: subjects, messages, who has which trap, recordings |

The layer stands beside `recording`: like a replay, a remote VM is a backend, so that
`backend` may name it in a spec. It needs the server below it, and no backend: an agent takes
whatever has the interface in `vmi`.

A transport that has no connections, such as a message broker, has a seam in two places:
`Agent` talks to a `Link`, and `Session` answers to one; both are in `connection`.
"""

from vmibridge.transport.agent.agent import Agent
from vmibridge.transport.server.server import AgentServer
from vmibridge.transport.server.single import RemoteBackend
from vmibridge.transport.wire import AgentLimits

__all__ = ["Agent", "AgentLimits", "AgentServer", "RemoteBackend"]
