"""Two recordings, compared without handlers.

| module | holds |
|---|---|
| `requests` | a recording request by request, with the fields that are compared |
| `alignment` | which request of one is which of the other |
| `comparison` | all of it, and the differences in groups |

Invariants:

- Requests are compared, not traps: how often a guest asked again is a matter of time.
- What could not be compared is never called equal: it is counted by itself.
- What is held is some 40 bytes a request, and the first of each group.
"""
