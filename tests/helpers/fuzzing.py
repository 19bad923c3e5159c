"""The seed of tests that mutate at random: another each time, or that of `VMIBRIDGE_FUZZ_SEED`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random


@contextmanager
def fuzzing() -> Iterator[Random]:
    """The numbers for a block; what it raises says the seed."""
    seed = int(os.environ.get("VMIBRIDGE_FUZZ_SEED", "0")) or int.from_bytes(
        os.urandom(4), "little"
    )
    try:
        yield Random(seed)
    except BaseException as error:
        error.add_note(f"VMIBRIDGE_FUZZ_SEED={seed}")
        raise
