"""A generated program: its steps, and how they are laid out in the guest's memory."""

import struct
from dataclasses import dataclass, replace

from transparency import layout
from transparency.layout import CODE, PAGE, WINDOW
from transparency.model import Model
from transparency.records import Answer, End, Start, UnmodelledError
from transparency.steps import (
    ALIASES,
    MAIN_PAGES,
    SUB_PAGES,
    Assembler,
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
    address_of,
    page_of_sub,
    window_page,
)

_DATA_SELECTOR_OF_LOADER = 16


@dataclass(frozen=True)
class AnswerPlan:
    """What a handler does: RAX, RBX, RCX, RDX; and which `Patchable` it writes, as what."""

    values: tuple[int | None, ...]
    patches: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Program:
    """What the generator makes, and the shrinker makes smaller."""

    seed: int
    width: int
    ring: int
    selector: int
    """Of CS: with its table and its ring."""
    data_selector: int
    base: int
    """Of CS, in its descriptor; 64-bit code does without."""
    entry: int
    """Where in its first page the main code begins."""
    sub_offset: int
    pages: tuple[int, ...]
    """The order of the main code's physical pages."""
    main: tuple[Step, ...]
    subs: tuple[tuple[Step, ...], ...]
    answers: tuple[AnswerPlan, ...]
    registers: tuple[int, ...]
    rflags: int
    data: bytes
    breakpoints: tuple[tuple[int, int, int], ...] = ()
    """Of the debug registers: a subroutine, its address, the number of a step; -1: of the main."""
    af_of_shifts: int = 0
    """As in `Start`."""


@dataclass(frozen=True)
class Line:
    """A step's place, for people."""

    address: int
    code: bytes
    text: str


class Linked:
    """A program in memory, and what it has to do by the reference."""

    def __init__(
        self,
        program: Program,
        *,
        ends_at_fault: bool = False,
        expected: End | None = None,
        end: bytes = bytes([0xCD, layout.END_VECTOR]),
    ) -> None:
        """Raises `UnmodelledError` for a program that the reference cannot run.

        With `expected`, it is not run.
        """
        self.program = program
        self.asm = Assembler(program.width)
        self.lines: list[Line] = []
        self.ram = bytearray(layout.MEMORY_END - layout.TABLE_A)
        self._put(CODE, b"\xcc" * (layout.MEMORY_END - CODE))
        self._slots = [self._slots_of(sub) for sub in program.subs]
        self._places: dict[tuple[int, int], int] = {}
        """Of a step of the main code (-1) or a subroutine: its linear address or its offset."""
        table = layout.LDT if program.selector & 4 else layout.GDT
        self.start_descriptor = table + (program.selector & ~7)
        self._put_segments()
        self._put_tables()
        self._put_subs()
        self._put_main(Plain("end", end))
        self._put_state()
        self.answers = tuple(
            Answer(
                plan.values,
                tuple(
                    (self._slot_address(sub, number, ALIASES), self._form(sub, number, form))
                    for sub, number, form in plan.patches
                ),
            )
            for plan in program.answers
        )
        self.expected = expected or self._run(ends_at_fault=ends_at_fault)
        fixups = self.expected.fixups
        self._put(layout.FIXUPS, struct.pack(f"<{len(fixups)}Q", *fixups))
        self._put(layout.CONTEXT + 0xB8, struct.pack("<Q", len(fixups)))
        self.has_patches = any(isinstance(step, Patch) for step in self._all_steps()) or any(
            plan.patches for plan in program.answers
        )

    def _all_steps(self) -> list[Step]:
        program = self.program
        return [*program.main, *(step for sub in program.subs for step in sub)]

    def _run(self, *, ends_at_fault: bool) -> End:
        model = Model(self.start, bytearray(self.ram), self.answers, ends_at_fault=ends_at_fault)
        return model.run()

    def _put(self, address: int, data: bytes) -> None:
        at = address - layout.TABLE_A
        self.ram[at : at + len(data)] = data

    def part(self, start: int, end: int) -> bytes:
        """The initial memory between two physical addresses."""
        return bytes(self.ram[start - layout.TABLE_A : end - layout.TABLE_A])

    # --- tables --------------------------------------------------------------------

    def _put_tables(self) -> None:
        program = self.program
        count = len(program.subs)
        for table, shift in ((layout.TABLE_A, 0), (layout.TABLE_B, 1)):
            for page, physical in enumerate(program.pages):
                self._put(table + 8 * page, struct.pack("<Q", CODE + physical * PAGE | 7))
            for alias in range(ALIASES):
                for sub in range(count):
                    entry = page_of_sub((sub + shift) % count) | 7
                    self._put(table + 8 * window_page(sub, alias), struct.pack("<Q", entry))

    def _put_segments(self) -> None:
        program = self.program
        gdt, ldt = layout.fixed_gdt(), [0] * 64
        code = layout.descriptor(base=program.base, width=program.width, ring=program.ring)
        if program.selector & 4:
            ldt[program.selector >> 3] = code
        elif program.selector >> 3 > 2:
            gdt[program.selector >> 3] = code
        if program.data_selector >> 3 > 2:
            gdt[program.data_selector >> 3] = layout.descriptor(
                base=0, width=32, ring=program.ring, code=False
            )
        self._put(layout.GDT, struct.pack("<64Q", *gdt))
        self._put(layout.LDT, struct.pack("<64Q", *ldt))

    def _put_state(self) -> None:
        program = self.program
        registers = list(program.registers)
        registers[4] = layout.STACK + layout.STACK_SIZE - 64
        linear = WINDOW + program.entry
        found = (
            self._places[-1, step]
            if sub < 0
            else address_of(sub, alias) + self._places.get((sub, step), 0)
            for sub, alias, step in program.breakpoints
            if (sub, step) in self._places
        )
        points = tuple(dict.fromkeys(found))
        self.start = Start(
            program.width,
            program.ring,
            program.selector,
            program.data_selector,
            program.base,
            self._offset(linear),
            program.rflags,
            registers,
            breakpoints=points,
            af_of_shifts=program.af_of_shifts,
        )
        self._put(layout.CONTEXT, struct.pack("<16Q", *registers))
        fields = (
            self.start.rip, 0, program.selector, program.rflags, program.data_selector,
            layout.ROOT_A, program.data_selector, 0, *(*points, 0, 0)[:2],
            0x400 | (1 if points else 0) | (4 if points[1:] else 0) if points else 0,
        )  # fmt: skip
        self._put(layout.CONTEXT + 0x80, struct.pack("<11Q", *fields))
        self._put(layout.DATA, program.data)

    def _offset(self, linear: int) -> int:
        program = self.program
        return linear if program.width == 64 else linear - program.base & 0xFFFF_FFFF

    # --- code ----------------------------------------------------------------------

    def _slots_of(self, sub: tuple[Step, ...]) -> list[tuple[int, Patchable]]:
        found, at = [], self.program.sub_offset
        for step in sub:
            if isinstance(step, Patchable):
                at = at + 3 & ~3
                found.append((at, step))
            at += sum(len(plain.code) for plain in self._plain(step, at))
        return found

    def _form(self, sub: int, number: int, form: int) -> bytes:
        slots = self._slots[sub] if sub < len(self._slots) else []
        if number >= len(slots):
            raise UnmodelledError("a patch of nothing")
        return slots[number][1].code(form)

    def _slot_address(self, sub: int, number: int, alias: int) -> int:
        self._form(sub, number, 0)
        return address_of(sub, alias) + self._slots[sub][number][0]

    def _plain(self, step: Step, at: int) -> list[Plain]:
        """The instructions of a step at a linear address; none for `PageEnd`."""
        asm = self.asm
        if isinstance(step, Plain):
            return [step]
        if isinstance(step, Patchable):
            texts = " | ".join(form.text for form in step.forms)
            return [Plain(f"patchable: {texts}", step.code(0))]
        if isinstance(step, Branch):
            size = sum(len(plain.code) for plain in step.body)
            jump = Plain(f"j{step.condition:x} +{size}", bytes([0x70 | step.condition, size]))
            return [jump, *step.body]
        if isinstance(step, Call):
            if step.sub >= len(self.program.subs):
                raise UnmodelledError("a call of nothing")
            target = address_of(step.sub, step.alias) + self.program.sub_offset
            distance = target - at - 1 - asm.near
            code = b"\xe8" + (distance & (1 << 8 * asm.near) - 1).to_bytes(asm.near, "little")
            return [Plain(f"call sub{step.sub} at {target:#x}", code)]
        if isinstance(step, Patch):
            address = self._slot_address(step.sub, step.number, step.alias)
            return asm.write_code(address, self._form(step.sub, step.number, step.form))
        if isinstance(step, Remap):
            if max(step.sub, step.target) >= len(self.program.subs):
                raise UnmodelledError("a map of nothing")
            return asm.remap(step, layout.ROOT_B if step.in_b else layout.ROOT_A)
        if isinstance(step, Redescribe):
            place = self.start_descriptor + 4
            value = int.from_bytes(self.part(place, place + 4), "little") ^ step.flip
            return [asm.store(place, value)]
        if isinstance(step, Switch):
            return asm.switch(layout.ROOT_B if step.to_b else layout.ROOT_A)
        raise AssertionError(step)

    def _put_subs(self) -> None:
        for number, sub in enumerate(self.program.subs):
            page, at = page_of_sub(number), self.program.sub_offset
            for index, step in enumerate((*sub, Plain("ret", b"\xc3"))):
                if isinstance(step, Patchable):
                    while at & 3:
                        self._put(page + at, b"\x90")
                        at += 1
                self._places[number, index] = at
                for plain in self._plain(step, 0):
                    self.lines.append(Line(address_of(number, 0) + at, plain.code, plain.text))
                    self._put(page + at, plain.code)
                    at += len(plain.code)
            if at > PAGE:
                raise UnmodelledError("a subroutine is too long")

    def _put_main(self, end: Plain) -> None:
        at = WINDOW + self.program.entry
        for index, step in enumerate((*self.program.main, end)):
            self._places[-1, index] = at
            if isinstance(step, PageEnd):
                at = self._put_page_end(step, at)
                continue
            for plain in self._plain(step, at):
                self._put_line(at, plain)
                at += len(plain.code)

    def _put_page_end(self, step: PageEnd, at: int) -> int:
        target = (at + PAGE & ~(PAGE - 1)) - step.distance
        distance = target - at - 1 - self.asm.near
        if distance < 0:
            return at
        code = b"\xe9" + distance.to_bytes(self.asm.near, "little")
        self._put_line(at, Plain(f"jmp {target:#x}", code))
        return target

    def _put_line(self, at: int, plain: Plain) -> None:
        self.lines.append(Line(at, plain.code, plain.text))
        for number, byte in enumerate(plain.code):
            page, offset = divmod(at + number - WINDOW, PAGE)
            if page >= MAIN_PAGES:
                raise UnmodelledError("the main code is too long")
            self._put(CODE + self.program.pages[page] * PAGE + offset, bytes([byte]))

    # --- text ----------------------------------------------------------------------

    def listing(self) -> str:
        """The program, as assembly."""
        program = self.program
        table = "LDT" if program.selector & 4 else "GDT"
        begins = (
            f"; seed {program.seed}: {program.width}-bit code, ring {program.ring},"
            f" CS {program.selector:#x} ({table}, base {program.base:#x}),"
            f" begins at {self.start.rip:#x} with flags {program.rflags:#x}"
        )
        head = [begins]
        if self.start.breakpoints:
            head.append("; breakpoints: " + ", ".join(f"{at:#x}" for at in self.start.breakpoints))
        for number, plan in enumerate(program.answers[: len(self.expected.shown)]):
            values = ", ".join("-" if v is None else f"{v:#x}" for v in plan.values)
            writes = "".join(
                f"; writes {data.hex(' ')} at {address:#x}"
                for address, data in self.answers[number].writes
            )
            head.append(f"; answer {number}: {values}{writes}")
        return "\n".join(
            [*head, *(f"{x.address:08x}  {x.code.hex(' '):<32} {x.text}" for x in self.lines)]
        )


def without_unused_answers(program: Program, used: int) -> Program:
    return replace(program, answers=program.answers[: max(used, 1)])


__all__ = ["SUB_PAGES", "AnswerPlan", "Linked", "Program", "without_unused_answers"]
