"""A host of the device in a process of its own, to be stopped and killed: `device_host.py SPEC`.

It says a line with the first call, and one with the hundredth.
"""

import sys

import anyio
from micro_guest import Work

from vmibridge import Bridge, BridgeServer, open_backend


async def main(spec: str) -> None:
    async with open_backend(spec) as backend:
        server = BridgeServer(backend, Bridge(Work()), timeout=60)
        seen = 0
        sys.stdout.write("listens\n")
        sys.stdout.flush()
        async for _ in server.run():
            seen += 1
            if seen in (1, 100):
                sys.stdout.write(f"{seen}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
