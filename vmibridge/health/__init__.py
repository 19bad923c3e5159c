"""Whether this process serves: states and reasons, and the carriers that tell others of them.

| module | holds |
|---|---|
| `state` | checks, reasons, reports; knows no carrier |
| `protocol` | question and answer of the health socket, as bytes; no I/O |
| `answers` | the health socket: answers on the event loop |
| `ask` | who asks it: `vmibridge health`, which imports nothing else |
| `notices` | what a service manager is sent (sd_notify); no I/O |
| `reporting` | socket and notices beside the run of a command |
"""
