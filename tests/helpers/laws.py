"""How many examples a law of hypothesis gets: a part by default, all in `make test-slow`."""

import os

LONG = os.environ.get("VMIBRIDGE_LAWS") == "long"
_PART, _LEAST = 4, 25


def examples(long: int) -> int:
    """`long` of them in the long form, in the short form a quarter, and 25 at least."""
    return long if LONG else min(long, max(_LEAST, long // _PART))
