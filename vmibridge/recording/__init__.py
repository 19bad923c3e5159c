"""Recording what a server does, and reading it back.

| module | holds |
|---|---|
| `messages` | what a recording holds, as structs |
| `redaction` | what is left out |
| `recorder` | the tap that records |
| `chunk`, `writer` | MCAP, on the way in |
| `reader` | MCAP, on the way out, believing nothing |
"""
