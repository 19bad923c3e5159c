"""Programs by seed: the same seed is the same program, wherever it runs.

What the reference cannot run is drawn again.
"""

import itertools
import random

from transparency import layout
from transparency.alu import IF, IOPL, TF
from transparency.choices import Choices
from transparency.layout import CODE, WINDOW
from transparency.processor import RDI
from transparency.profiles import EVERYTHING, Profile
from transparency.program import AnswerPlan, Linked, Program
from transparency.records import UnmodelledError
from transparency.steps import (
    ALIASES,
    MAIN_PAGES,
    Branch,
    Call,
    PageEnd,
    Patch,
    Patchable,
    Plain,
    Redescribe,
    Remap,
    Step,
    Switch,
)

_MAX_ANSWERS = 48


def generate(seed: int, profile: Profile = EVERYTHING) -> Linked:
    """The program of a seed, in memory, with what it has to do."""
    for attempt in itertools.count():
        program = _Generator(random.Random(f"{seed}/{attempt}"), seed, profile).program()
        try:
            return Linked(program, ends_at_fault=profile.ends_at_fault)
        except UnmodelledError:
            continue
    raise AssertionError


class _Generator(Choices):
    # --- programs ------------------------------------------------------------------

    def sub(self, number: int) -> tuple[Step, ...]:
        rng, steps = self.rng, []
        for _ in range(rng.randint(1, 5)):
            kind = rng.random()
            if kind < 0.45:
                steps += self.trap()
            elif kind < 0.65:
                first, second = self.patchable()
                steps.append(Patchable((first, second)))
                self.patchables[number] += 1
            else:
                steps += self.plain()
        return tuple(steps)

    def patchable(self) -> tuple[Plain, Plain]:
        def one() -> Plain:
            if self.rng.random() < 0.5:
                return self.trap()[-1]
            return self.rng.choice(self.plain())

        def merged(parts: list[Plain]) -> Plain:
            return Plain("; ".join(p.text for p in parts), b"".join(p.code for p in parts))

        if self.rng.random() < 0.5:
            return merged(self.trap()), merged(self.trap())
        size = self.rng.choice((2, 4))
        register = self.register()
        return self.asm.mov(register, self.value(size), size), self.asm.mov(
            register, self.value(size), size
        )

    def patch(self) -> tuple[int, int, int] | None:
        found = [(s, n) for s, count in enumerate(self.patchables) for n in range(count)]
        if not found:
            return None
        sub, number = self.rng.choice(found)
        return sub, number, self.rng.choice((0, 1, 1))

    def alias(self) -> int:
        # 16-bit code reaches 64 KiB: not its physical pages.
        return self.rng.randint(0, ALIASES - (self.width == 16))

    def main_step(self) -> list[Step]:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.25:
            return list(self.trap())
        if kind < 0.5:
            sub = rng.randrange(self.sub_count)
            return [Call(sub, self.alias()) for _ in range(rng.choice((1, 1, 2, 3)))]
        if kind < 0.55:
            return [PageEnd(rng.randint(0, 30))]
        if kind < 0.62 and (patch := self.patch()):
            return [Patch(*patch, rng.randint(0, ALIASES))]
        if kind < 0.72 and self.ring == 0:
            sub, target = rng.randrange(self.sub_count), rng.randrange(self.sub_count)
            if rng.random() < 0.4:
                return [Switch(self.in_b), *self.toggle()]
            alias = rng.randrange(ALIASES)
            remap = Remap(sub, alias, target, rng.random() < 0.5, self.in_b)
            return [Call(sub, alias), remap, Call(sub, alias)]
        if kind < 0.76:
            condition = rng.randrange(16)
            return [Branch(condition, tuple(self.plain() + self.plain()))]
        if kind < 0.8 and self.profile.interrupts and self.may_interrupt:
            return list(self.shadowed())
        if kind < 0.83 and self.profile.single_step and self.may_step:
            return [*self.flip(TF), *self.trap(), *self.plain(), *self.flip(TF)]
        if kind < 0.86 and self.profile.hidden_segments:
            # Another width, base, limit or ring; the segment that is loaded stays what it is.
            return [Redescribe(rng.choice((1 << 22, 3 << 21, 0xFF << 24, 1 << 16, 3 << 13)))]
        if kind < 0.88 and self.faults:
            return [Plain("ud2", b"\x0f\x0b")]
        return list(self.plain())

    def toggle(self) -> list[Step]:
        self.in_b = not self.in_b
        return [Switch(self.in_b)]

    def program(self) -> Program:
        rng = self.rng
        self.in_b = False
        state = rng.random()
        self.may_step = state < 0.35
        has_points = 0.35 <= state < 0.5 and self.profile.breakpoints
        self.may_interrupt = state >= 0.5
        flags = 2 | rng.getrandbits(19) & self.flippable
        if self.ring == 0 or rng.random() < 0.5:
            flags |= IOPL if rng.random() < 0.5 or self.may_interrupt else 0
        often = 0.1 if self.profile.ends_at_fault else 0.4
        if self.may_step and self.profile.single_step and rng.random() < often:
            flags |= TF
        if self.may_interrupt and rng.random() < 0.3 and self.profile.interrupts:
            flags |= IF
        if self.profile.always_if:
            flags = flags & ~IOPL | IF
        subs = tuple(self.sub(number) for number in range(self.sub_count))
        main: list[Step] = []
        for _ in range(rng.choice((2, 4, 8, 12))):
            main += self.main_step()
        mov_ss = any(isinstance(s, Plain) and s.text.startswith("mov ss") for s in main)
        has_points = has_points and not mov_ss
        selector, data_selector = self.selectors()
        base = self.base()
        # QEMU itself takes a breakpoint's linear address for an offset in CS.
        has_points = has_points and (self.width == 64 or not base)
        registers = [self.value(8 if self.width == 64 else 4) for _ in range(8)]
        registers += [self.value(8) for _ in range(8)]
        registers[RDI] = data_selector
        return Program(
            seed=self.seed,
            width=self.width,
            ring=self.ring,
            selector=selector,
            data_selector=data_selector,
            base=base,
            entry=rng.choice((0, rng.randrange(0x1000), 0xFE0 + rng.randrange(32))),
            sub_offset=rng.randrange(0xC00),
            pages=tuple(rng.sample(range(MAIN_PAGES), MAIN_PAGES)),
            main=tuple(main),
            subs=subs,
            answers=tuple(self.answer() for _ in range(_MAX_ANSWERS)),
            registers=tuple(registers),
            rflags=flags,
            data=rng.randbytes(layout.DATA_SIZE),
            breakpoints=self.points(subs, len(main)) if has_points else (),
            af_of_shifts=self.profile.af_of_shifts,
        )

    def selectors(self) -> tuple[int, int]:
        rng, ring = self.rng, self.ring
        first, last = layout.FIRST_CODE_SELECTOR, layout.LAST_CODE_SELECTOR
        code, data = rng.sample(range(first, last), 2)
        if rng.random() < 0.3:
            return rng.randrange(64) << 3 | 4 | ring, data << 3 | ring
        if rng.random() < 0.4:
            code = rng.choice([at for at in (4, 5, 6, 7) if at != data])
        return code << 3 | ring, data << 3 | ring

    def base(self) -> int:
        rng = self.rng
        if self.width == 16:
            return WINDOW
        odd = self.profile.odd_bases
        if rng.random() < 0.5 or (self.width == 64 and not odd):
            return 0
        bases = [CODE, 0x7C0 << 4, rng.randrange(CODE)]
        if odd:
            bases += [WINDOW - 0x1000, rng.getrandbits(32), rng.getrandbits(32)]
        return rng.choice(bases)

    def answer(self) -> AnswerPlan:
        rng = self.rng
        size = 8 if self.width == 64 else 4
        values = tuple(None if rng.random() < 0.2 else self.value(size) for _ in range(4))
        patches = ()
        if self.profile.handler_patches and rng.random() < 0.12 and (patch := self.patch()):
            patches = (patch,)
        return AnswerPlan(values, patches)

    def points(
        self, subs: tuple[tuple[Step, ...], ...], count: int
    ) -> tuple[tuple[int, int, int], ...]:
        rng, found = self.rng, []
        for _ in range(rng.choice((1, 2))):
            if rng.random() < 0.5:
                found.append((-1, 0, rng.randrange(count)))
            else:
                sub = rng.randrange(len(subs))
                found.append((sub, rng.randrange(ALIASES), rng.randrange(len(subs[sub]) + 1)))
        return tuple(found)
