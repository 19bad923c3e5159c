"""To wait for something that happens elsewhere, and never for a time."""

import anyio
from patience import HUNG


async def until(condition):
    """Wait until `condition()` is true; it fails after a minute, which no test has to need."""
    with anyio.fail_after(HUNG):
        while not condition():
            await anyio.sleep(0.001)
