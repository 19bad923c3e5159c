"""From a URL of NATS to a server there that has said WELCOME.

What trying again cannot mend, such as wrong credentials, is a final refusal to the agent, as if
a server had said it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from vmibridge.errors import BackendError, NatsRefusedError, RefusedByServerError
from vmibridge.transport.handshake import hello
from vmibridge.transport.links import Dialled
from vmibridge.transport.nats.agent_link import NatsAgentLink
from vmibridge.transport.nats.client import NatsClient
from vmibridge.transport.urls.nats import NatsUrl
from vmibridge.vm.backend import Backend


@asynccontextmanager
async def dial_nats(
    url: NatsUrl, session: bytes, vm: str, backend: Backend
) -> AsyncIterator[Dialled]:
    """Connect to NATS, and find a server there. Raises as `dial` does."""
    try:
        async with NatsClient(url, f"vmibridge agent {vm}"[:128]) as client:
            link = NatsAgentLink(
                client,
                hello(
                    session,
                    vm,
                    other_hypercalls=backend.other_hypercalls,
                    architecture=backend.architecture,
                ),
            )
            welcome = await link.shake_hands()
            try:
                yield Dialled(
                    link,
                    welcome,
                    lambda silence: [link.watch, partial(link.keep_alive, silence)],
                    link.shares,
                )
            finally:
                link.log_shares()
    except (BackendError, NatsRefusedError) as error:
        raise RefusedByServerError(str(error), final=True) from error
