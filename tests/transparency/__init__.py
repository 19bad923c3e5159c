"""Differential tests of transparency: a trap changes the answer's registers, and nothing else.

| module | holds |
|---|---|
| `profiles` | what is generated for each kind of backend, and why not all for each |
| `generator`, `choices` | programs by seed |
| `program`, `steps` | a program: its steps, and how it is laid out in memory |
| `model` | the reference, with `processor`, `instructions`, `alu` and `records` |
| `layout`, `loader.asm` | the guest that runs them |
| `host` | the answers to traps, and what is different from the reference |
| `unicorn_machine`, `qemu_machine`, `gdb_machine` | programs on a backend |
| `kvm_machine` | the reference against a real processor |
| `search`, `shrink`, `kinds` | which programs differ, the smallest ones, after how many |
| `run` | all of it by hand: `cd tests && python -m transparency.run --help` |

Not generated: legacy protected mode, real and virtual-8086 mode (16- and 32-bit code is that of
compatibility mode); several vCPUs; data breakpoints; far jumps and calls, task switches; NMI and
interrupts at no certain place; x87 and SSE; page faults; code that another vCPU writes. Handlers
answer and write memory only: deadlines, fallbacks and retries are the engine's.
"""
