"""The socket of one QEMU: bytes with the descriptors that come along, and when they were sent.

A reply that comes after QEMU has given its request up makes QEMU take the body of that reply for
the next header, and the device is of no use any more. When a request was sent is not known here: a
process that was stopped finds it late. What is known is when there was nothing to receive: the
request was sent after that. So each reception has the last such time (`sent_after`), and `is_late`
says whether a reply to what came with it might come too late.

Not safe for threads: its caller has a lock.
"""

import array
import os
import socket
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import Final

import anyio

from vmibridge.backends.device.vfio_user import MAX_DESCRIPTORS

__all__ = ["MessageStream"]

_PIECE: Final = 1 << 16
"""Bytes that are received at a time, at most."""
_CONTROL: Final = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
_CUT_SHORT: Final = int(socket.MSG_CTRUNC)
"""As a plain number: an enum's `&` takes a microsecond."""
_MAX_UNSENT: Final = 4096
"""Messages that are kept for a QEMU that does not read."""
_IN_TIME: Final = 0.8
"""The part of the timeout in which a reply may be sent."""


class MessageStream:
    """A connected socket that does not block, which it owns. `timeout` in seconds; 0: for ever."""

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        self.socket = connected
        self._in_time = timeout * _IN_TIME
        self.empty_at: float = monotonic()
        """When there was nothing to receive last."""
        self.received_at: float = self.empty_at
        """When the last reception was."""
        self.sent_after: float = self.empty_at
        """What came last was sent after this."""
        self.receptions: int = 0

    def receive(self) -> tuple[bytes, list[int]] | None:
        """What has come, with its descriptors, which the caller owns; `None`: nothing.

        Raises `anyio.EndOfStream` at the end, `OSError` when the connection is broken, `ValueError`
        when more descriptors came than may.
        """
        before = monotonic()
        try:
            data, control, flags, _ = self.socket.recvmsg(_PIECE, _CONTROL, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            self.empty_at = before
            return None
        descriptors: list[int] = []
        for _, _, passed in control:
            descriptors += array.array("i", passed[: len(passed) // 4 * 4])
        if flags & _CUT_SHORT:
            close_all(descriptors)
            raise ValueError("more descriptors with one message than may come")
        if not data:
            raise anyio.EndOfStream
        self.receptions += 1
        self.received_at, self.sent_after = before, self.empty_at
        # The kernel stops behind descriptors; else all that there was has been received.
        if len(data) < _PIECE and not descriptors:
            self.empty_at = before
        return data, descriptors

    def is_late(self, sent_after: float) -> bool:
        """Whether QEMU may have given up by now what was sent after that time."""
        return self._in_time > 0 and monotonic() - sent_after > self._in_time

    def flush(self, out: deque[tuple[bytes, tuple[int, ...]]]) -> None:
        """Send what there is room for, and keep the rest in `out`.

        Raises `OSError` when the connection is broken, also if QEMU does not read.
        """
        while out:
            data, descriptors = out[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self.socket, [data], descriptors)
                else:
                    sent = self.socket.send(data)
            except BlockingIOError:
                break
            if sent == len(data):
                out.popleft()
            else:
                out[0] = (data[sent:], ())
        if len(out) > _MAX_UNSENT:
            raise OSError("QEMU does not read what it is sent")

    def hang_up(self) -> None:
        """End both directions: who receives sees the end."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and close, with nothing left to be received.

        A socket that is closed with something unread resets its connection, and QEMU 11.1.3 aborts
        at that: `error_setv: Assertion *errp == NULL`. After the hang-up nothing more can come.
        """
        self.hang_up()
        with suppress(OSError, ValueError, anyio.EndOfStream):
            while (came := self.receive()) is not None:
                close_all(came[1])
        self.socket.close()


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for each in descriptors:
        os.close(each)
