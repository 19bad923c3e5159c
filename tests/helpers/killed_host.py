"""A host that takes files from a guest until it is killed: `killed_host.py FOLDER SEED`.

For each line that it reads it takes one piece, and prints how many pieces of its file are left.
"""

import sys
from pathlib import Path
from random import Random

import anyio
from file_parts import files_guest, noise

from vmibridge.handlers.files import Mode

PIECE = 10_000
"""Bytes of a file that come at a time."""


def content(number: int) -> bytes:
    """What file `number` has in it."""
    return noise(Random(number).randrange(200_000), number)


async def main(folder: Path, seed: int) -> None:
    random = Random(seed)
    async with files_guest(folder, replace=True) as guest:
        for number in range(1000):
            data = content(number)
            mode = random.choice([Mode.CREATE, Mode.REPLACE])
            handle = (await guest.begin(f"sub/{number}", len(data), mode)).value
            for at in range(0, len(data), PIECE):
                if not sys.stdin.readline():
                    return
                await guest.put(handle, at, data[at : at + PIECE])
                sys.stdout.write(f"{(len(data) - at - 1) // PIECE}\n")
                sys.stdout.flush()
            await guest.end(handle)


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
