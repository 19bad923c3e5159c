"""What is done for a host that was killed, and what is not for one that has ended."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from children import SECONDS

from vmibridge.backends.device import last_words, slots
from vmibridge.backends.device.mailbox import Mailbox


@pytest.mark.parametrize("is_killed", [True, False])
def test_open_calls_get_no_answer_and_nothing_is_left_unread(is_killed):
    qemu, host = socket.socketpair()
    reading, writing = os.pipe()
    with Mailbox(3) as mailbox, qemu, host:
        generation = mailbox.slots.generation
        states = (slots.STATE_CALLED, slots.STATE_ANSWERED, slots.STATE_TAKEN)
        at = [slots.slot_offset(slot) + slots.STATE_AT for slot in range(3)]
        for place, state in zip(at, states, strict=True):
            os.pwrite(mailbox.descriptor, bytes([state]), place)
        qemu.send(b"unread")
        host.setblocking(False)
        numbers = [reading, host.fileno(), mailbox.descriptor, slots.GENERATION_AT]
        numbers += [at[0], 2 * slots.PAGE, 3]
        command = [sys.executable, "-I", "-S", Path(last_words.__file__), *map(str, numbers)]
        with subprocess.Popen(command, pass_fds=numbers[:3]) as process:
            os.close(reading)
            if is_killed:
                host.close()
            else:
                os.write(writing, b"\0")
            os.close(writing)
            assert process.wait(SECONDS) == 0
        found = [os.pread(mailbox.descriptor, 4, place)[0] for place in at]
        left = os.pread(mailbox.descriptor, 4, slots.GENERATION_AT)
        if is_killed:
            assert found == [slots.STATE_UNMATCHED, slots.STATE_ANSWERED, slots.STATE_UNMATCHED]
            assert left == bytes(4)
            assert qemu.recv(1) == b"", "and not a reset"
        else:
            assert tuple(found) == states
            assert int.from_bytes(left, "little") == generation
