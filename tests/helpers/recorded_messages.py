"""Messages of recordings made by chance: whatever a file may hold."""

from random import Random

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.export import Export
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import (
    MemoryAccess,
    Note,
    Outside,
    RecordedHandler,
    RecordedMethod,
    Reply,
    Session,
    Step,
)
from vmibridge.recording.selection import Selection
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapReason

MAX_U64 = (1 << 64) - 1
NUMBERS = [0, 1, 2, 5, 1 << 32, MAX_U64, -1, -(1 << 63), (1 << 53) + 1]
WORDS = ["", "a", "null", "1", "inf", "nan", "\u202e", "\x7f", '"', "\n", "\0", "\U0001f600"]
# Few, so that messages meet.
VMS = ["vm", "red", "\u202e"]
SEQS = [0, 1, 2, 3, -1, MAX_U64]
DURATIONS = [0.0, 1e-9, 0.1, 1 / 3, 1e300, -0.5, float("inf"), float("-inf")]
SETTINGS = [ServerSettings(), ServerSettings(blocked_after=float("inf"), retry_values=(1,))]
REGISTERS = ("rax", "rcx", "rdx", "rbx", "r8", "rflags", "cr3")


def maybe(value):
    return lambda rng: rng.choice([None, value(rng)])


def one_of(values):
    return lambda rng: rng.choice(values)


def some(value):
    return lambda rng: tuple(value(rng) for _ in range(rng.randrange(3)))


def counts(rng):
    return {rng.choice(WORDS): number(rng) for _ in range(rng.randrange(3))}


def packet(rng):
    widths = (32, 16, 16, 64, 64, 64, 64)
    return BridgePacket(*(rng.getrandbits(rng.choice([1, width])) for width in widths))


def registers(rng):
    return Registers(**{name: number(rng) for name in REGISTERS if rng.random() < 0.5})


def handler(rng):
    methods = some(lambda rng: RecordedMethod(rng.getrandbits(16), word(rng)))(rng)
    return RecordedHandler(word(rng), word(rng), 7, maybe(number)(rng), methods=methods)


def written(rng):
    return RegisterWrites(number(rng), *(maybe(number)(rng) for _ in range(4)))


number, word, vm, seq = map(one_of, (NUMBERS, WORDS, VMS, SEQS))
flag = one_of([True, False])

FIELDS = {
    Session: {
        "vm": vm,
        "format": one_of([1]),
        "started": word,
        "versions": lambda rng: {word(rng): word(rng)},
        "loop": word,
        "handlers": some(handler),
        "settings": one_of(SETTINGS),
        "redaction": one_of([()]),
        "architecture": one_of([None]),
        "seed": maybe(number),
        "clock": number,
        "part": number,
        "accepted": flag,
    },
    TrapEvent: {
        "seq": seq,
        "reason": one_of(list(TrapReason)),
        "registers": registers,
        "vm": vm,
        "vcpu": number,
        "ip": number,
        "length": number,
        "width": one_of([16, 32, 64, 7]),
        "ring": number,
        "flags_known": flag,
    },
    MemoryAccess: {
        "vm": vm,
        "seq": seq,
        "address": number,
        "size": number,
        "data": one_of([None, b"", b"\0\xff"]),
        "write": flag,
        "error": maybe(word),
    },
    Reply: {
        "vm": vm,
        "seq": seq,
        "vcpu": number,
        "kind": one_of(list(OutcomeKind)),
        "packet": packet,
        "writes": maybe(written),
        "handler": maybe(word),
        "error": maybe(word),
        "output": maybe(word),
        "duration": one_of(DURATIONS),
        "retry_of": maybe(number),
        "output_sha256": maybe(word),
    },
    Note: {
        "kind": one_of(["end", "retry", "lost"]),
        "text": word,
        "vm": maybe(vm),
        "seq": maybe(seq),
        "retry_of": maybe(number),
        "counts": counts,
    },
    Step: {
        "vm": vm,
        "seq": seq,
        "kind": one_of(["queued", "began", "resumed", "thrown", "ended", "parked", "cut off"]),
    },
    Outside: {
        "vm": vm,
        "seq": seq,
        "key": word,
        "number": number,
        "data": one_of([None, b"", b"\xc0", b"\x81\xa1a\x01", b"\0\xff"]),
        "error": maybe(word),
        "types": some(word),
        "at_once": flag,
        "left_out": flag,
    },
}
"""Of each kind of message, what each field may be."""


def some_messages(seed, count=20):
    """Messages with their times."""
    rng = Random(seed)
    made = []
    for _ in range(rng.randrange(1, count)):
        kind = rng.choice([*FIELDS])
        fields = {name: value(rng) for name, value in FIELDS[kind].items()}
        made.append((rng.getrandbits(rng.choice([1, 64])), kind(**fields)))
    return made


def read(path):
    """What a recording has, whole: times and messages."""
    with RecordingReader(path) as reader:
        found = [tuple(each) for each in reader.messages()]
        assert (reader.problems, reader.complete) == ([], True)
    return found


def export(path, target, to="jsonl", **selected):
    """An export of it; returns its bytes."""
    with RecordingReader(path) as reader:
        list(Export(reader, to, target, Selection.parse(**selected)).write())
    return target.read_bytes()
