"""What commands say of a recording beside their results; the same for each.

That is: places that could not be read, and that a selection takes no trap. Both go to standard
error.
"""

from collections.abc import Mapping

from vmibridge.cli.pipes import say
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.selection import Selection
from vmibridge.recording.unmatched import Unmatched
from vmibridge.text import counted

__all__ = ["counts_text", "say_problems", "say_unmatched", "unmatched_in"]


def say_problems(reader: RecordingReader) -> None:
    """What could not be read, after a pass."""
    for line in reader.problem_lines():
        say(line)


def say_unmatched(reader: RecordingReader, selection: Selection) -> None:
    """That a selection takes no trap, where it does not. Raises as `unmatched_in`."""
    line = unmatched_in(reader, selection)
    if line is not None:
        say(f"vmibridge: {line}")


def unmatched_in(reader: RecordingReader, selection: Selection) -> str | None:
    """That a selection takes no trap of a recording, and which traps there are; `None`: it takes
    one, or asks for all. Reads the file again. Raises `RecordingReadError`."""
    if selection == Selection():
        return None
    unmatched = Unmatched(selection)
    unmatched.look_at(reader.messages())
    return None if unmatched.has_some else f"{reader.path}: {unmatched}"


def counts_text(counts: Mapping[str, int]) -> str:
    """How many messages a new recording has, by channel."""
    words = {"memory": "memory access", "outside": "outside call"}
    texts = [counted(count, words.get(topic, topic)) for topic, count in counts.items() if count]
    return ", ".join([*texts, *([] if counts.get("trap") else ["no trap"])])
