"""An example: an overlay of your own has handlers of your own in its place."""

from vmibridge import U64, StandardHandler, method


class Example(StandardHandler[int]):
    """Says that a host is there, and doubles numbers."""

    REQUEST = 0x0100

    @method(0x0001)
    async def double(self, number: U64) -> U64:
        """Give twice the number."""
        return number * 2 % (1 << 64)
