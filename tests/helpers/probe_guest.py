"""The guest code, the handlers and the command line of these tests."""

import sys

HANDLERS = '''
import sys
import anyio
from vmibridge import BridgeHandler, BridgeResponse, method

class Probe(BridgeHandler[str]):
    """Answers the guests of these tests."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = 0x213353522D494D56

    @method(1)
    async def add(self, vmi, packet):
        """Adds one."""
        return BridgeResponse(value1=packet.value1 + 1).with_output("\\x1b[31mred\\n")

    @method(2, timeout=0.05)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError("told to,\\x1b[2J twice")

    @method(4, timeout=60)
    async def wait_a_while(self, vmi, packet):
        print("waiting", file=sys.stderr, flush=True)
        await anyio.sleep_forever()

    @method(0xFFFF)
    async def exit(self, vmi, packet):
        return BridgeResponse()

    @method(5)
    async def give(self, vmi, packet):
        return BridgeResponse().with_output(object)
'''

CALL = """
    mov r8, {value}
    mov ecx, 0x42494d56
    mov edx, {method} << 16 | {request}
    vmcall
"""


def calls(*methods, value="0x41", request="0x100", tail="hlt"):
    return "".join(CALL.format(value=value, method=m, request=request) for m in methods) + tail


# Counts in r8, which no answer changes, so that each trap has a number. What it leaves in r9 to r15
# is like no trap before: a recording has at least 56 bytes of each, however well it is compressed.
_OTHERS = "".join(
    f"    imul r{at}, r{at}, 0x5851f42d\n    add r{at}, r{at - 1}\n" for at in range(9, 16)
)
COUNTING = f"""
    xor r8, r8
again:
    inc r8
{_OTHERS}
    mov ecx, 0x42494d56
    mov edx, 1 << 16 | 0x100
    vmcall
"""
ENDLESS = COUNTING + "    jmp again\n"


def counted(count):
    """A guest that makes so many calls."""
    return f"{COUNTING}    cmp r8, {count}\n    jne again\n    hlt\n"


def command(*arguments):
    return [sys.executable, "-m", "vmibridge", *arguments]


# `pause()` for a child that has said that it waits: a signal that comes between the two ends it,
# too. With `signal.pause` that one is lost: its handler runs only when another signal comes.
PAUSE = """
import os, signal
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
def pause():
    os.read(woken, 1)
"""
