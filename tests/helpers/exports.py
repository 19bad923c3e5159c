"""A recording, exported."""

from vmibridge.recording.export import Export, target_of
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.selection import Selection


def export(path, name, target=None, **words):
    target = target or target_of(path, name)
    with RecordingReader(path) as reader:
        job = Export(reader, name, target, Selection.parse(**words))
        count = sum(1 for _ in job.write())
    return count, job.targets
