"""What handlers of many tests begin with."""

from typing import Any

from vmibridge import BridgeHandler
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4


class StandardHandler(BridgeHandler[Any]):
    """The standard magic and stamps, and the request that most guests of the tests make."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4


class HandlerWithLives(BridgeHandler[Any]):
    """Notes when it is entered and left, in `lives`."""

    def __init__(self):
        self.lives = []

    async def __aenter__(self):
        self.lives.append("entered")
        return self

    async def __aexit__(self, *error):
        self.lives.append("left")
