"""The reference: what a processor does with a generated program.

A small interpreter of machine code, by the manual (Intel SDM volumes 1 to 3): its own decoder, its
own flags, no translation and no caches. It shares no code with vmibridge. It knows the
instructions that the generator makes, and raises `UnmodelledError` for everything else.

A trap that is ours is an instruction that writes the answer's registers and RIP. Of the rest:

| state | by |
|---|---|
| #DB of TF follows each instruction that began with TF set, but for MOV SS | volume 3, 18.3.1.4 |
| an instruction breakpoint comes before its instruction, unless RF is set | volume 3, 18.3.1.1 |
| no interrupt is taken right behind an STI that set IF, or a MOV SS | volume 3, 7.8.3 |
| LOCK before what cannot be locked is #UD | volume 2, LOCK |
| a REX prefix counts only right before the opcode | volume 2, 2.2.1 |
| an instruction of more than 15 bytes is #GP | volume 2, 2.3.11 |
"""

from transparency.alu import IF, RF, TF
from transparency.instructions import Instructions
from transparency.layout import INTERRUPT, MAX_FIXUPS, MAX_LOG
from transparency.records import End, FaultError, Logged, UnmodelledError

_MAX_STEPS = 2000


class Model(Instructions):
    """One program on the reference."""

    def run(self) -> End:
        """To the end of the program."""
        end, points = self.end, self._start.breakpoints
        if points and self.flags & TF:
            raise UnmodelledError("TF and breakpoints at once")
        while True:
            end.steps += 1
            if end.steps > _MAX_STEPS:
                raise UnmodelledError("it does not end")
            if self._pending and self.flags & IF and not self._holds_interrupt:
                self._pending = False
                self._log(INTERRUPT, 0)
            linear = self._linear(self.rip)
            if points and linear in points and not self.flags & RF:
                if self._holds_debug:
                    raise UnmodelledError("a breakpoint behind MOV SS")
                self._log(1, 1 << points.index(linear))
                if self._ends_at_fault:
                    return self._done(1)
                self.flags |= RF
            stepping = self.flags & TF
            held = self._holds_interrupt
            self._holds_debug = self._holds_interrupt = False
            try:
                vector = self._step()
            except FaultError as fault:
                self._log(fault.vector, 0)
                if self._ends_at_fault or fault.vector == 3:
                    return self._done(fault.vector)
                end.fixups.append(self.rip + fault.length & self._mask)
                if len(end.fixups) > MAX_FIXUPS:
                    raise UnmodelledError("too many faults") from fault
                self.rip = end.fixups[-1]
                self.flags |= RF  # as a fault pushes it (volume 3, 18.3.1.1)
                continue
            if vector:
                return self._done(vector)
            if held and self._holds_interrupt and self._pending:
                raise UnmodelledError("only the first of a row is sure to hold interrupts off")
            self.flags &= ~RF
            if stepping and not self._holds_debug:
                self._log(1, 0x4000)
                if self._ends_at_fault:
                    return self._done(1)

    def _done(self, vector: int) -> End:
        if self._pending:
            raise UnmodelledError("an interrupt that is left for the next program")
        end = self.end
        end.vector, end.rip, end.rflags, end.registers = vector, self.rip, self.flags, self.regs
        return end

    def _log(self, vector: int, dr6: int) -> None:
        if len(self.end.log) >= MAX_LOG - 1:
            raise UnmodelledError("too many exceptions")
        if self._is_described_otherwise and not self._ends_at_fault:
            raise UnmodelledError("a return to a segment that is another one now")
        entry = Logged(vector, self._start.cs, self.rip, self.flags & ~RF, dr6)
        self.end.log.append(entry)
