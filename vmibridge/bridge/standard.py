"""A handler of the standard contract: its magic and stamps, and the WAIT of its statuses."""

from typing import Any, ClassVar

from vmibridge.bridge.contract import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
)
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.response import BridgeResponse, T
from vmibridge.bridge.status import Status, StatusKind

__all__ = ["StandardHandler"]


class StandardHandler(BridgeHandler[T]):
    """Base of handlers whose guests are of the standard contract; only `REQUEST` is left to say.

    value1 of each answer is a status, so a guest is told to wait by one, too: `WAITING`.
    """

    MAGIC: ClassVar[int | None] = STANDARD_MAGIC
    VERIFY_VALUE3: ClassVar[int | None] = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4: ClassVar[int | None] = STANDARD_VERIFY_VALUE4
    may_wait: ClassVar[bool] = True
    wait: ClassVar[BridgeResponse[Any] | None] = BridgeResponse(
        Status(kind=StatusKind.WAITING).encode()
    )
