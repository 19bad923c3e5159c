"""Differential tests of transparency: a trap changes the answer's registers, and nothing else.

| module | holds |
|---|---|
| `program` | a generated program: its steps, and how it is laid out in memory |
| `steps` | the instructions that programs are made of |
| `generator` | programs by seed |
| `model`, `alu` | the reference |
| `layout`, `loader.asm` | the guest that runs them |
| `host`, `machines` | programs on a backend, and what is different there |
| `shrink` | smaller programs with the same difference |
| `run` | all of it by hand: `python tests/transparency/run.py --help` |
"""
