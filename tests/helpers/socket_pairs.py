"""Two ends of a connection that has little room."""

import socket
from contextlib import contextmanager


@contextmanager
def socket_pair(room):
    """Neither end blocks; each holds about `room` bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for each in (ours, theirs):
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        yield ours, theirs
