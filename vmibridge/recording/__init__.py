"""Recording what a server does, and reading it back.

    async with Recorder("run.mcap") as recorder:
        server = BridgeServer(backend, bridge, taps=[recorder])

| module | holds |
|---|---|
| `messages` | what a recording holds, as structs |
| `redaction` | what is left out |
| `recorder` | the tap that records |
| `file` | MCAP: written, read believing nothing, a clean file from a damaged one |
| `decoder` | the messages of a recording for other readers of MCAP |
| `traps`, `selection` | a recording trap by trap, and which of them |
| `new_recording` | a recording written message by message |
| `json_lines`, `message_order` | JSON lines, read back |
| `replay` | a recording as a backend, the comparison, and `Replay` for tests |
| `export`, `report` | for other tools, and for people |
"""

from vmibridge.errors import MissingExtraError

try:
    from vmibridge.recording.decoder import DecoderFactory
    from vmibridge.recording.file.reader import RecordingReader
    from vmibridge.recording.messages import MemoryAccess, Note, Reply, Session
    from vmibridge.recording.new_recording import NewRecording
    from vmibridge.recording.recorder import Recorder
    from vmibridge.recording.redaction import RedactionRule
    from vmibridge.recording.replay.backend import ReplayBackend
    from vmibridge.recording.replay.compare import Difference, FieldDifference
    from vmibridge.recording.replay.door import Replay
    from vmibridge.recording.replay.options import ReplayOptions, ReplayResult
    from vmibridge.recording.replay.request_result import RequestResult
    from vmibridge.recording.traps import RecordedTrap, recorded_traps
except ModuleNotFoundError as _error:
    raise MissingExtraError("a recording", "recording") from _error

__all__ = [
    "DecoderFactory",
    "Difference",
    "FieldDifference",
    "MemoryAccess",
    "NewRecording",
    "Note",
    "RecordedTrap",
    "Recorder",
    "RecordingReader",
    "RedactionRule",
    "Replay",
    "ReplayBackend",
    "ReplayOptions",
    "ReplayResult",
    "Reply",
    "RequestResult",
    "Session",
    "recorded_traps",
]
