"""An output is of any type: to print, record, inspect, export or replay it ends nothing."""

import io
import json

import pytest
from odd_objects import OUTPUTS

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, OutcomeKind
from vmibridge.cli.listing import Listing
from vmibridge.cli.trap_line import trap_columns, trap_json
from vmibridge.recording import Recorder
from vmibridge.recording.export import FORMATS, Export
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.selection import Selection
from vmibridge.testing import FakeGuest

MAGIC = 0x42494D56


class Gives(BridgeHandler[object]):
    """The method code is the place of the output."""

    MAGIC = MAGIC
    REQUEST = 1

    async def handle(self, vmi, packet):
        return BridgeResponse(packet.method).with_output(list(OUTPUTS.values())[packet.method])


async def guest(vm):
    for place in range(len(OUTPUTS)):
        assert (await vm.call(BridgePacket(MAGIC, 1, place))).rax == place


def shown(reader, *, as_json):
    out = io.BytesIO()
    Listing(reader, Selection(), out, as_json=as_json, full=True).show(None)
    return out.getvalue().decode().splitlines()


@pytest.mark.anyio
async def test_each_is_printed_recorded_inspected_exported_and_replayed(tmp_path):
    path = tmp_path / "run.mcap"
    async with Recorder(path) as recorder, FakeGuest(guest) as vm:
        server = BridgeServer([vm], lambda _: Bridge(Gives()), taps=[recorder])
        outcomes = [outcome async for outcome in server.run()]
    assert recorder.error is None
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * len(OUTPUTS)
    for outcome in outcomes:
        assert b"\n" not in trap_json(outcome)
        assert all(cell.isprintable() for cell in trap_columns(outcome))
        assert repr(outcome)

    for name in FORMATS:
        with RecordingReader(path) as reader:
            made = Export(reader, name, tmp_path / name, Selection())
            assert len(list(made.write())) == len(OUTPUTS)
    with RecordingReader(path) as reader:
        lines = shown(reader, as_json=True)
        assert len(lines) == len(OUTPUTS) + 2
        assert all(type(json.loads(line).get("output", "")) is str for line in lines)
        assert all(line.isprintable() for line in shown(reader, as_json=False))

    async with ReplayBackend(path) as backend:
        server = BridgeServer(backend, Bridge(Gives()))
        again = [outcome async for outcome in server.run()]
        assert len(again) == len(OUTPUTS)
    assert (backend.result.compared, backend.result.different) == (len(OUTPUTS), 0)
