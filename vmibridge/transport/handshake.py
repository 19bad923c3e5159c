"""HELLO, and the WELCOME or REFUSED that answers it: what every transport says in the same words.

- Each function checks one frame or makes one; no I/O. How long a peer has, and how it proves who
  it is, is the transport's.
- Nothing of a HELLO is believed before `check_hello`: its bytes come from a stranger.
- A refusal crosses the connection as REFUSED. `RefusedError` is its form in the server,
  `RefusedByServerError` that in the agent; the two are made from each other only here.
"""

from typing import Any, Final

from vmibridge.errors import (
    RefusedByServerError,
    RefusedError,
    UnknownArchitectureError,
    WireError,
)
from vmibridge.text import printable
from vmibridge.transport.wire import FromServer, Hello, Refused, Welcome
from vmibridge.vm.arch import architecture_named
from vmibridge.vm.arch.architecture import Architecture

VERSION: Final = 1
"""Of the protocol: what this end speaks, and nothing else."""
WORD: Final = "vmibridge"
"""The second element of HELLO."""
WELCOME_SECONDS: Final = 10.0
"""How long an agent waits for WELCOME. Longer than `AgentLimits.handshake`: once the peer is
known, a server may have to load handlers before it can say which traps it wants."""


def hello(
    session: bytes, vm: str, *, other_hypercalls: bool, architecture: Architecture[Any]
) -> Hello:
    """The first frame of an agent."""
    return Hello(
        WORD,
        VERSION,
        VERSION,
        session,
        vm,
        0,
        other_hypercalls,
        architecture.name,
        architecture.version,
    )


def check_hello(frame: Hello) -> None:
    """Raises `RefusedError` for an agent that this server does not understand."""
    if frame.word != WORD:
        raise RefusedError("this is not an agent of vmibridge")
    if not frame.oldest <= VERSION <= frame.version:
        raise RefusedError(
            f"the agent speaks versions {frame.oldest} to {frame.version} of the protocol, this"
            f" server {VERSION}"
        )
    # It goes into logs and names of files from here on.
    if not frame.vm.isprintable():
        raise RefusedError("the name of the VM is not printable")
    try:
        architecture_named(frame.architecture, frame.architecture_version)
    except UnknownArchitectureError as error:
        raise RefusedError(str(error)) from error


def refused(error: Exception, *, final: bool) -> Refused:
    """The frame that tells an agent why; a frame has no more than 1,000 characters for it."""
    return Refused(str(error)[:1000], final)


def check_welcome(frame: FromServer, architecture: Architecture[Any]) -> Welcome:
    """The WELCOME that `frame` is to be, to an agent whose guest is of this architecture.

    Raises `RefusedByServerError` for REFUSED, and for a server that takes the guest for one of
    another architecture; `WireError` for any other frame, and for a version that this agent did
    not offer.
    """
    if isinstance(frame, Refused):
        # The words are the server's, and go into the agent's log.
        raise RefusedByServerError(printable(frame.why), final=frame.final)
    if not isinstance(frame, Welcome) or frame.version != VERSION:
        raise WireError("no WELCOME")
    if (frame.architecture, frame.architecture_version) != (
        architecture.name,
        architecture.version,
    ):
        # One from before HELLO named architectures takes registers of any for those of x86.
        raise RefusedByServerError(
            f"the server takes the guest for {frame.architecture!a} version"
            f" {frame.architecture_version}, and it is {architecture}",
            final=True,
        )
    return frame
