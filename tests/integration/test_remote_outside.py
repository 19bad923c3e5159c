"""What handlers at a server get from outside: recorded there, and replayed anywhere."""

import anyio
import pytest
from determinism_parts import MEMORY, ask, loop_of
from outside_parts import LAST, CutOff, Outer, guest_of
from patience import HUNG
from remote_parts import carry, served

from vmibridge import Bridge, BridgeServer, open_backend
from vmibridge.errors import BackendSpecError
from vmibridge.recording import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.testing import FakeGuest

LOOPS = ["asyncio", "uvloop", "trio"]


EACH = range(1, LAST + 1)
PROMPT = [code for code in EACH if code != 4]
"""Those that tell no guest to wait, on a machine of any load."""


async def recorded_at_a_server(folder, codes=EACH):
    """The file that the server made."""
    url = f"unix:{folder}/s.sock"
    # Both are told to wait, or cut off, on any machine.
    packets = [ask(code, 1 if code == 5 else 20, 0, 1) for code in codes]
    guest = FakeGuest(guest_of(*packets), memory=MEMORY, vm="vm")
    path = folder / "run.mcap"
    with anyio.fail_after(HUNG):
        async with served(url, Outer(), taps=lambda vm: [Recorder(path)]) as server:
            await carry(guest, url)
            while server.vms:
                await anyio.sleep(0.001)
    return path


async def replayed_here(path):
    async with ReplayBackend(path, ReplayOptions(outside="refuse")) as backend:
        async for _ in BridgeServer(backend, Bridge(CutOff())).run():
            pass
    return backend.result


@pytest.mark.parametrize("loop", LOOPS)
def test_a_server_records_it_and_a_replay_gives_it(tmp_path, loop):
    path = anyio.run(recorded_at_a_server, tmp_path, **loop_of(loop, virtual=False))
    for other in ("asyncio", "trio"):
        result = anyio.run(replayed_here, path, **loop_of(other, virtual=True))
        assert (result.first, result.unchecked, result.outside) == (None, {}, {})
        assert result.compared == LAST


async def at_another_server(path, folder, handler, options="", refusal=None):
    url = f"unix:{folder}/s.sock"
    backend = open_backend(f"replay:{path}{options}")
    with anyio.fail_after(HUNG):
        async with served(url, handler):
            if refusal is None:
                await carry(backend, url)
            else:
                with pytest.raises(BackendSpecError, match=refusal):
                    await carry(backend, url)
    return backend.result


def test_a_server_elsewhere_gets_it_from_outside_again(tmp_path):
    path = anyio.run(recorded_at_a_server, tmp_path, PROMPT)
    handler = Outer()
    result = anyio.run(at_another_server, path, tmp_path, handler)
    assert result.compared == len(PROMPT)
    # Some call more than once.
    assert handler.fetched > len(PROMPT)


def test_an_agent_cannot_promise_that_nothing_is_called(tmp_path):
    path = anyio.run(recorded_at_a_server, tmp_path)
    handler = Outer()
    refusal = "the handlers run elsewhere"
    anyio.run(at_another_server, path, tmp_path, handler, "?outside=refuse", refusal)
    assert handler.fetched == 0
