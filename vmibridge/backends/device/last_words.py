"""Run by `keeper`, as a program of its own: ends a connection whose host was killed.

    last_words.py PIPE SOCKET MEMORY GENERATION_AT STATE_AT STRIDE COUNT

Waits until a byte comes through PIPE, which means that there is nothing to do, or its end, which
means that the host was killed. Imports nothing but what every Python has, so that it is small and
starts at once.
"""

import os
import socket
import sys

_CALLED, _TAKEN, _UNMATCHED = 1, 3, 4


def main(
    pipe: int,
    connected: int,
    memory: int,
    generation_at: int,
    state_at: int,
    stride: int,
    count: int,
) -> None:
    """Each open call gets state 4, and nothing is left unread when the connection ends."""
    if os.read(pipe, 1):
        return
    for at in range(state_at, state_at + stride * count, stride):
        if int.from_bytes(os.pread(memory, 4, at), "little") in (_CALLED, _TAKEN):
            os.pwrite(memory, _UNMATCHED.to_bytes(4, "little"), at)
    os.pwrite(memory, bytes(4), generation_at)
    with socket.socket(fileno=connected) as end:
        try:
            end.shutdown(socket.SHUT_RDWR)
            while end.recv(1 << 16):
                pass
        except OSError:
            pass  # it has ended already


if __name__ == "__main__":
    main(*map(int, sys.argv[1:8]))
