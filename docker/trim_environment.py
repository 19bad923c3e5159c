#!/usr/bin/env python
"""Makes a virtual environment smaller, and the same in each build.

    PYTHONHASHSEED=0 python trim_environment.py FOLDER

- Compiled modules lose their debug information, three quarters of their size. Names of functions
  stay.
- Bytecode is made anew, and is valid whatever the time stamp of its source is: an image has other
  time stamps than the stage that it was made in, and bytecode that goes by them would be made again
  at each start. So a source that is edited there needs `python -m compileall -f` to have an effect.
- RECORD, the list that pip keeps of a package's files, has the hashes of what is there.

Needs `strip`, of Debian's package binutils. To be run by the Python of the image.
"""

import base64
import compileall
import csv
import hashlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

SECONDS = 60


def main(folder: Path) -> None:
    (packages,) = folder.glob("lib/python3*/site-packages")
    stripped = {path for path in packages.rglob("*.so*") if is_elf(path)}
    for path in sorted(stripped):
        strip(path)
    for record in sorted(packages.glob("*.dist-info/RECORD")):
        record.write_text(renewed(record, stripped))
    # pip compiles scripts in bin, too.
    for cache in sorted(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    mode = PycInvalidationMode.UNCHECKED_HASH
    if not compileall.compile_dir(packages, quiet=1, invalidation_mode=mode):
        sys.exit(f"{packages}: not all can be compiled")


def is_elf(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def strip(path: Path) -> None:
    """Raises `CalledProcessError`."""
    subprocess.run(["strip", "--strip-debug", path], check=True, timeout=SECONDS)


def renewed(record: Path, stripped: set[Path]) -> str:
    """A RECORD without bytecode, with hash and size of each file of `stripped` as it is now.

    Its form is PyPA's "Recording installed projects".
    """
    packages = record.parents[1]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in csv.reader(record.read_text().splitlines()):
        path = packages / line[0]
        if path in stripped:
            writer.writerow([line[0], *hash_and_size(path.read_bytes())])
        elif path.suffix != ".pyc":
            writer.writerow(line)
    return text.getvalue()


def hash_and_size(data: bytes) -> tuple[str, str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={digest.decode().rstrip('=')}", str(len(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
