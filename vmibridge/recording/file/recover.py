"""A clean recording made of a damaged one: everything that can be read, with an index.

A note at the end says what was lost. Times stay as they were. Blocking; one chunk in
memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec

from vmibridge.recording.export import new_files
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.damage import Problem
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import CHANNELS, NOTE, Note
from vmibridge.recording.new_recording import channel_of

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""

Watch: TypeAlias = Callable[[Iterator[TimedMessage], RecordingReader], Iterable[TimedMessage]]


class Recovered(msgspec.Struct, frozen=True):
    """What came of a recovery."""

    messages: dict[str, int]
    """Kept, by channel."""
    complete: bool
    """Whether there was nothing to recover."""
    problem_count: int
    problems: tuple[Problem, ...]
    """The first 100."""


def recover(source: Path, target: Path, watch: Watch | None = None) -> Recovered:
    """Write what can be read of `source` into a new file. `watch` sees it go by.

    Raises `RecordingReadError` when `source` is not a recording, `ConfigError` when `target` is
    there already, `RecordingError` when it cannot be written. Then there is no `target`.
    """
    with RecordingReader(source) as reader, new_files([target]) as (path,):
        messages = reader.messages()
        writer = RecordingWriter(path, "vmibridge recover", overwrite=True)
        try:
            counts = _copy(messages if watch is None else watch(messages, reader), reader, writer)
            writer.finish()
        except BaseException:
            writer.close()
            raise
        return Recovered(
            counts, not reader.problem_count, reader.problem_count, tuple(reader.problems)
        )


def _copy(
    messages: Iterable[TimedMessage], reader: RecordingReader, writer: RecordingWriter
) -> dict[str, int]:
    counts = dict.fromkeys((channel.topic for channel in CHANNELS), 0)
    chunk = ChunkBuilder()
    last = 0
    for last, message in messages:
        # Not by the type alone: a trap of another architecture has one of its own.
        channel = channel_of(message)
        counts[channel.topic] += 1
        if chunk.add(channel.id, last, message) >= _CHUNK:
            writer.add(chunk.pack())
            chunk = ChunkBuilder()
    if reader.problem_count:
        counts[NOTE.topic] += 1
        chunk.add(NOTE.id, last, Note("lost", "; ".join(map(str, reader.problems))))
    if len(chunk):
        writer.add(chunk.pack())
    return counts
