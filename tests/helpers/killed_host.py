"""A host that takes files from a guest until it is killed: `killed_host.py FOLDER SEED`.

It says the number of each piece that it has taken, and of each file that has its name.
"""

import sys
from pathlib import Path
from random import Random

import anyio
from file_parts import files_guest, noise

from vmibridge.handlers.files import Mode


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
            for at in range(0, len(data), 10_000):
                await guest.put(handle, at, data[at : at + 10_000])
                sys.stdout.write("piece\n")
                sys.stdout.flush()
            await guest.end(handle)
            sys.stdout.write("file\n")
            sys.stdout.flush()


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
