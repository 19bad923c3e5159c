"""One run of a server, and what each format makes of it."""

import pytest
from exports import export
from recorded_session import record

from vmibridge.recording.export import FORMATS
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.traps import recorded_traps


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The file, the outcomes of the server, and the traps as the reader has them."""
    path = tmp_path_factory.mktemp("run") / "run.mcap"
    outcomes = record(path)
    with RecordingReader(path) as reader:
        traps = list(recorded_traps(reader.messages()))
    assert len(traps) == len(outcomes)
    return path, outcomes, traps


@pytest.fixture(scope="session")
def exported(run):
    return {name: export(run[0], name)[1] for name in FORMATS}
