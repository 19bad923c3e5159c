"""A guest may send anything, in any order. The server answers, keeps serving, and ends.

The guests are real: code that hypothesis makes up, in Unicorn, against all ready-made
handlers. `make test-slow` runs ten times as many.
"""

import struct
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmibridge import Bridge, BridgeServer, OutcomeKind, open_backend
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.config import load_handlers
from vmibridge.engine.taps import Tap

# The same lines, for every example: other tests show that they are covered.
pytestmark = pytest.mark.no_cover

ROOT = Path(__file__).parents[2]
LOOPS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
EXAMPLES = 60
RUN_SECONDS = 0.2

# Where guests point: nowhere, into code, to the last byte of memory, around the ends of
# the address space, and anywhere at all.
pointers = st.sampled_from(
    [0, 1, 0x100000, 0xFFFFFF, 0x1000000, (1 << 32) - 1, 1 << 47, (1 << 64) - 1, -1 & (1 << 63)]
) | st.integers(0, (1 << 64) - 1)
sizes = st.sampled_from([0, 1, 4095, 65536, 1 << 24, 1 << 32, (1 << 64) - 1]) | pointers
requests = st.sampled_from([0x0001, 0x0021, 0x0022, 0x0023]) | st.integers(0, 0xFFFF)
methods = st.integers(0, 5) | st.integers(0, 0xFFFF)
calls = st.tuples(st.sampled_from(["vmcall", "cpuid"]), requests, methods, pointers, sizes, sizes)


def call_code(trap, request, method, value1, value2, value3):
    """mov r8..r10, values; load magic and selector; trap."""
    code = b"\x49\xb8" + struct.pack("<Q", value1)
    code += b"\x49\xb9" + struct.pack("<Q", value2)
    code += b"\x49\xba" + struct.pack("<Q", value3)
    selector = request | method << 16
    if trap == "cpuid":
        return code + struct.pack("<BIBI", 0xB8, STANDARD_MAGIC, 0xB9, selector) + b"\x0f\xa2"
    return code + struct.pack("<BIBI", 0xB9, STANDARD_MAGIC, 0xBA, selector) + b"\x0f\x01\xc1"


class Moment(Tap):
    """Cancels its scope when the guest has had its time. A machine with other work may take
    longer than that to begin."""

    def __init__(self):
        self.scope = anyio.CancelScope()

    def begin(self, *_):
        self.scope.deadline = anyio.current_time() + RUN_SECONDS


async def serve(image, options=""):
    """Run a guest for a moment; whatever it does, the server has to end in good order."""
    bridge = Bridge(*load_handlers([str(ROOT / "handlers")]))
    moment = Moment()
    async with open_backend(f"unicorn:{image}{options}") as backend:
        server = BridgeServer(backend, bridge, timeout=0.05, taps=[moment])
        with moment.scope:
            async for _ in server.run():
                pass
    summary = server.summary
    assert summary.guest is not None
    assert not any(end.reason == "lost" for end in summary.guest.vcpus)
    return summary


def run(image, loop, options=""):
    return anyio.run(serve, image, options, backend=loop[0], backend_options=loop[1])


def check_calls(tmp_path_factory, loop, made):
    image = tmp_path_factory.mktemp("fuzz") / "guest.bin"
    image.write_bytes(b"".join(call_code(*call) for call in made) + b"\xf4")
    summary = run(image, loop)
    # No handler lets a guest's input raise, and every call is answered.
    assert summary.outcomes[OutcomeKind.FAILED] == 0
    if summary.guest.vcpus[0].reason == "halted":
        assert summary.total == len(made)


def check_code(tmp_path_factory, loop, code, options):
    image = tmp_path_factory.mktemp("fuzz") / "guest.bin"
    image.write_bytes(code)
    run(image, loop, options)


# Hypothesis tries constants of the product, too; an ELF file is refused before it runs.
any_code = st.binary(min_size=1, max_size=200).filter(lambda code: not code.startswith(b"\x7fELF"))
any_options = st.sampled_from(["", "?width=32", "?width=16", "?vcpus=2"])
QUICK = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONG = settings(QUICK, max_examples=10 * EXAMPLES)


@QUICK
@given(loop=st.sampled_from(LOOPS), made=st.lists(calls, min_size=1, max_size=8))
def test_any_call_of_the_ready_made_handlers_gets_an_answer(tmp_path_factory, loop, made):
    check_calls(tmp_path_factory, loop, made)


@QUICK
@given(loop=st.sampled_from(LOOPS), code=any_code, options=any_options)
def test_any_code_at_all_runs_and_ends(tmp_path_factory, loop, code, options):
    check_code(tmp_path_factory, loop, code, options)


@pytest.mark.slow
@LONG
@given(loop=st.sampled_from(LOOPS), made=st.lists(calls, min_size=1, max_size=30))
def test_many_calls_of_the_ready_made_handlers_get_answers(tmp_path_factory, loop, made):
    check_calls(tmp_path_factory, loop, made)


@pytest.mark.slow
@LONG
@given(loop=st.sampled_from(LOOPS), code=any_code, options=any_options)
def test_much_code_of_any_kind_runs_and_ends(tmp_path_factory, loop, code, options):
    check_code(tmp_path_factory, loop, code, options)
