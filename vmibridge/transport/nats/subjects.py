"""The subjects of the transport on NATS; docs/remote.md has them in a table.

| subject | what is published there |
|---|---|
| `vmibridge.hello.VM` | an agent that looks for a server |
| `vmibridge.VM.MAGIC.REQUEST` | a trap: magic in 8 hexadecimal digits, request in 4 |
| `vmibridge-pinned.PARTITION.VM.MAGIC.REQUEST` | a trap of a VM that is pinned |
| `vmibridge.VM.agent.all.SESSION` | what an agent asks all servers |

The name of a VM is made safe for a token: letters, digits, `-` and `_` stay, any other byte of
its UTF-8 is `=` and two hexadecimal digits. So no two names share a token, and the rights
that NATS gives for a subject are rights for one VM.
"""

import re
from typing import Final

from vmibridge.bridge.packet import BridgePacket
from vmibridge.transport.urls.nats import is_subject

QUEUE: Final = "vmibridge"
"""The queue group of the servers."""
HELLO: Final = "vmibridge.hello"
FROM_ALL_AGENTS: Final = "vmibridge.*.agent.all.*"

_SAFE = re.compile(rb"[^A-Za-z0-9_-]")


def vm_token(vm: str) -> str:
    """The name of a VM as one token of a subject."""
    return _SAFE.sub(lambda found: b"=%02x" % ord(found[0]), vm.encode()).decode()


def trap_subject(token: str, packet: BridgePacket | None, partitions: int = 0) -> str:
    """Where a trap is published. `None`: it carries no request that can be read."""
    magic, request = (0, 0) if packet is None else (packet.magic, packet.request)
    place = f"{token}.{magic:08x}.{request:04x}"
    if partitions:
        return f"vmibridge-pinned.{partition_of(token, partitions)}.{place}"
    return f"vmibridge.{place}"


def hello_subject(token: str) -> str:
    """Where an agent looks for a server."""
    return f"{HELLO}.{token}"


def to_all_subject(token: str, session: bytes) -> str:
    """What all servers hear that serve this session."""
    return f"vmibridge.{token}.agent.all.{session.hex()}"


def partition_of(token: str, partitions: int) -> int:
    """As NATS has it for `{{partition(N,1)}}`: FNV-1a in 32 bits, modulo `partitions`."""
    found = 0x811C9DC5
    for byte in token.encode():
        found = (found ^ byte) * 0x01000193 & 0xFFFF_FFFF
    return found % partitions


def token_in(subject: str) -> str | None:
    """The VM that a subject of a hello or a trap is about; `None`: it is neither.

    A server may subscribe to subjects of the user's own, so the end of a subject counts.
    """
    parts = subject.split(".")
    if len(parts) >= 3 and parts[-2] == "hello":
        return parts[-1]
    if len(parts) >= 4 and len(parts[-2]) == 8 and len(parts[-1]) == 4:
        return parts[-3]
    return None


def may_be_answered(reply: str) -> bool:
    """Whether a stranger's reply subject may be published to: not where servers listen."""
    return is_subject(reply) and not reply.startswith(("vmibridge", "$"))
