"""Numbers of a fixed width, as handlers give them: a whole number of another type becomes an `int`.

What is checked here is not checked again on its way into registers, files and frames.
"""

import operator

from vmibridge.text import type_name

__all__ = ["unsigned"]

MAX_SHOWN = 256
"""Bits of a number in a message."""


def unsigned(value: object, name: str, bits: int) -> int:
    """`value` as an exact `int` of at most so many bits; messages call it `name`.

    A bool, a member of an enum, and whatever has `__index__` count as whole numbers, as they
    do where Python wants an index. Raises `TypeError` for what is none, `ValueError` for
    one that is negative or too large.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception as error:
        # `__index__` may raise anything.
        raise TypeError(
            f"{name} is a whole number of {bits} bits, not of type {type_name(value)}"
        ) from error
    if number >> bits:
        # In hex, since Python refuses to write long numbers as decimals.
        shown = f"{number:#x}" if number.bit_length() <= MAX_SHOWN else "one that is far too large"
        raise ValueError(f"{name} has {bits} bits, got {shown}: out of range")
    return number
