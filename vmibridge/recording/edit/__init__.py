"""Recordings made of recordings: cut, merged, split, renamed, redacted, shifted in time.

| module | holds |
|---|---|
| `merging` | several recordings as one stream of messages; parts of one recording are joined |
| `keeping` | which traps are kept, and in which file: whole requests |
| `fates` | what becomes of each trap, while something may name it |
| `changes` | what becomes of one message: names, times, what is left out |
| `editing` | all of it, into new files |

Invariants:

- A request is kept or cut whole: each of its traps, with what belongs to them.
- What is kept stays in its order, and nothing of it changes but what was asked for.
- Where a kept trap had others of its VM before it that are cut, a note of kind `lost` says so.
- What is held does not grow with the recording, but for a byte a message.
"""
