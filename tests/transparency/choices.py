"""Random instructions and traps, for one program."""

import random

from transparency import layout
from transparency.alu import AC, CF, DF, OF, PF, SF, ZF
from transparency.layout import DATA, FOREIGN_LEAF, MAGIC
from transparency.processor import RAX, RBP, RCX, RDI, RSP
from transparency.profiles import Profile
from transparency.steps import BINARY, SUB_PAGES, Assembler, Plain

_FLAGS = CF | PF | ZF | SF | OF | DF | AC
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63)
_LEGACY = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3"


class Choices:
    """Draws instructions. Registers that are in `keep` are not written."""

    def __init__(self, rng: random.Random, seed: int, profile: Profile) -> None:
        self.rng, self.seed, self.profile = rng, seed, profile
        self.width = rng.choice(profile.widths)
        self.ring = rng.choice((0, 3))
        self.asm = Assembler(self.width)
        self.faults = rng.random() < profile.faults
        self.sub_count = rng.randint(1, SUB_PAGES)
        self.flippable = _FLAGS & ~AC if profile.always_if else _FLAGS
        self.patchables = [0] * self.sub_count

    # --- values --------------------------------------------------------------------

    def value(self, size: int) -> int:
        bits = 8 * size
        if self.rng.random() < 0.5:
            return self.rng.choice(_EDGES) & (1 << bits) - 1
        return self.rng.getrandbits(bits)

    def register(self, *, but: tuple[int, ...] = ()) -> int:
        usual = [at for at in range(7) if at != RSP and at not in but]  # EDI holds a selector
        return self.rng.choice(usual + list(range(8, 16)) if self.width == 64 else usual)

    def data(self, size: int) -> int:
        return DATA + self.rng.randrange(layout.DATA_SIZE - size)

    # --- plain instructions --------------------------------------------------------

    def plain(self, *, keep: tuple[int, ...] = ()) -> list[Plain]:
        """A few instructions that do not write the registers `keep`."""
        makers = (
            (self.binary, 8), (self.unary, 4), (self.move, 3), (self.memory, 4),
            (self.flag, 4), (self.through_stack, 3), (self.setcc, 2), (self.nop, 2),
            (self.mov_ss, 2),
        )  # fmt: skip
        maker = self.rng.choices([m for m, _ in makers], [w for _, w in makers])[0]
        return maker(keep)

    def binary(self, keep: tuple[int, ...]) -> list[Plain]:
        rng, asm = self.rng, self.asm
        size, kind = rng.choice(asm.sizes), rng.randrange(8)
        left, right = self.register(but=keep), self.register()
        into = asm.name(left, size)
        if rng.random() < 0.5:
            code = asm.on_register(bytes([kind << 3 | 1]), right, left, size)
            return [Plain(f"{BINARY[kind]} {into}, {asm.name(right, size)}", code)]
        value = rng.randint(-128, 127)
        code = asm.on_register(b"\x83", kind, left, size) + bytes([value & 0xFF])
        return [Plain(f"{BINARY[kind]} {into}, {value}", code)]

    def unary(self, keep: tuple[int, ...]) -> list[Plain]:
        rng, asm = self.rng, self.asm
        size, register = rng.choice(asm.sizes), self.register(but=keep)
        name, opcode, middle = rng.choice(
            (
                ("inc", b"\xff", 0), ("dec", b"\xff", 1), ("not", b"\xf7", 2), ("neg", b"\xf7", 3),
                ("shl", b"\xd1", 4), ("shr", b"\xd1", 5), ("sar", b"\xd1", 7),
            )
        )  # fmt: skip
        tail = ", 1" if opcode == b"\xd1" else ""
        code = asm.on_register(opcode, middle, register, size)
        return [Plain(f"{name} {asm.name(register, size)}{tail}", code)]

    def move(self, keep: tuple[int, ...]) -> list[Plain]:
        asm, size = self.asm, self.rng.choice(self.asm.sizes)
        into = self.register(but=keep)
        if self.rng.random() < 0.5:
            return [asm.mov(into, self.value(size), size)]
        other = self.register()
        code = asm.on_register(b"\x89", other, into, size)
        return [Plain(f"mov {asm.name(into, size)}, {asm.name(other, size)}", code)]

    def memory(self, keep: tuple[int, ...]) -> list[Plain]:
        rng, asm = self.rng, self.asm
        size = rng.choice(asm.sizes)
        address, register = self.data(size), self.register(but=keep)
        name, kind = asm.name(register, size), rng.randrange(5)
        if kind == 0:
            return [
                Plain(
                    f"mov [{address:#x}], {name}", asm.on_memory(b"\x89", register, address, size)
                )
            ]
        if kind == 1:
            return [
                Plain(
                    f"mov {name}, [{address:#x}]", asm.on_memory(b"\x8b", register, address, size)
                )
            ]
        if kind == 2:
            return [
                Plain(
                    f"xchg [{address:#x}], {name}", asm.on_memory(b"\x87", register, address, size)
                )
            ]
        operation = rng.randrange(7)
        lock = b"\xf0" if kind == 3 else b""
        code = lock + asm.on_memory(bytes([operation << 3 | 1]), register, address, size)
        return [Plain(f"{'lock ' if lock else ''}{BINARY[operation]} [{address:#x}], {name}", code)]

    def flag(self, _keep: tuple[int, ...]) -> list[Plain]:
        names = {0xF8: "clc", 0xF9: "stc", 0xF5: "cmc", 0xFC: "cld", 0xFD: "std"}
        opcode = self.rng.choice(list(names))
        return [Plain(names[opcode], bytes([opcode]))]

    def flip(self, mask: int) -> list[Plain]:
        """PUSHF, flip flags on the stack, POPF: without a register."""
        asm = self.asm
        size = 8 if self.width == 64 else self.rng.choice((2, 4))
        narrow = b"" if size == 8 or (size == 2) == (self.width == 16) else b"\x66"
        # XOR [stack], mask: the stack pointer is known here by the model alone, so in a register.
        register = self.register(but=(RAX, RCX, RBP))
        rex = b"\x41" if register > 7 else b""
        mask &= 0xFFFF if size == 2 else 0xFFFF_FFFF
        wide = asm.on_register(b"\x81", 6, register, size) + mask.to_bytes(min(size, 4), "little")
        name = asm.name(register, size)
        return [
            Plain("pushf", narrow + b"\x9c"),
            Plain(f"pop {name}", narrow + rex + bytes([0x58 | register & 7])),
            Plain(f"xor {name}, {mask:#x}", wide),
            Plain(f"push {name}", narrow + rex + bytes([0x50 | register & 7])),
            Plain("popf", narrow + b"\x9d"),
        ]

    def through_stack(self, keep: tuple[int, ...]) -> list[Plain]:
        kind = self.rng.randrange(4)
        if kind == 0:
            return self.flip(self.rng.getrandbits(19) & self.flippable)
        if kind == 1 and RAX not in keep:
            return [Plain("lahf", b"\x9f")]
        if kind == 2:
            return [Plain("sahf", b"\x9e")]
        from_, to = self.register() & 7, self.register(but=keep) & 7
        if {from_, to} & {RSP, RDI} or to in keep:
            return [Plain("nop", b"\x90")]
        size = 8 if self.width == 64 else self.width >> 3
        return [
            Plain(f"push {self.asm.name(from_, size)}", bytes([0x50 | from_])),
            Plain(f"pop {self.asm.name(to, size)}", bytes([0x58 | to])),
        ]

    def setcc(self, keep: tuple[int, ...]) -> list[Plain]:
        condition, register = self.rng.randrange(16), self.rng.choice((0, 1, 2, 3))
        if register in keep:
            address = self.data(1)
            code = self.asm.on_memory(bytes([0x0F, 0x90 | condition]), 0, address, 4)
            code = code.removeprefix(b"\x66") if self.width == 16 else code
            return [Plain(f"set{condition:x} [{address:#x}]", code)]
        name = "acdb"[register] + "l"
        return [Plain(f"set{condition:x} {name}", bytes([0x0F, 0x90 | condition, 0xC0 | register]))]

    def nop(self, _keep: tuple[int, ...]) -> list[Plain]:
        return [Plain("nop", b"\x90")] * self.rng.choice((1, 1, 2, 9))

    def mov_ss(self, _keep: tuple[int, ...]) -> list[Plain]:
        # Its selector is in a register that nothing else here writes.
        return [Plain("mov ss, edi", b"\x8e\xd7")] if self.rng.random() < 0.3 else self.flag(())

    # --- traps ---------------------------------------------------------------------

    def prefixes(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.6:
            return b""
        found = bytes(rng.choice(_LEGACY) for _ in range(rng.choice((0, 1, 1, 2, 3, 12))))
        if self.width == 64 and rng.random() < 0.4:
            rex = bytes([0x40 | rng.randrange(16)])
            at = rng.randint(0, len(found))
            found = found[:at] + rex + found[at:]
        if self.faults and rng.random() < 0.4:
            at = rng.randint(0, len(found))
            found = found[:at] + b"\xf0" + found[at:]
        return found[: rng.choice((13, 12))] if not self.faults else found

    def trap(self) -> list[Plain]:
        rng, asm = self.rng, self.asm
        reason = rng.choice(self.profile.reasons)
        where = RAX if reason == "cpuid" else RCX if self.width == 64 else RBP
        is_foreign = rng.random() < 0.2 and (reason == "cpuid" or self.faults)
        value = (FOREIGN_LEAF if reason == "cpuid" else 0x1234) if is_foreign else MAGIC
        size = 8 if self.width == 64 and rng.random() < 0.3 else 4
        if size == 8:
            value |= rng.getrandbits(32) << 32
        between = [
            plain
            for _ in range(rng.choice((0, 0, 1, 1, 2, 4)))
            for plain in self.plain(keep=(where,))
        ]
        prefixes = self.prefixes()
        if reason == "cpuid" and not self.profile.locked_cpuid:
            prefixes = prefixes.replace(b"\xf0", b"\x2e")
        if reason != "cpuid" and len(prefixes) > 12 and not self.faults:
            prefixes = prefixes[:12]
        return [asm.mov(where, value, size), *between, asm.trap(reason, prefixes)]

    def shadowed(self) -> list[Plain]:
        """An interrupt that waits, STI or MOV SS, and a trap in its shadow."""
        trap = self.trap()[-1]
        reason = trap.text.rsplit(" ", 1)[-1]
        where = RAX if reason == "cpuid" else RCX if self.width == 64 else RBP
        setup = self.asm.mov(where, MAGIC, 4)
        pend = self.asm.store(layout.APIC + 0x300, 0x4_0000 | layout.INTERRUPT)
        return [
            Plain("cli", b"\xfa"), pend, setup, Plain("sti", b"\xfb"), trap, *self.plain(),
            Plain("cli", b"\xfa"),
        ]  # fmt: skip
