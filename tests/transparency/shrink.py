"""Smaller programs with a difference: steps, subroutines and parts of the state are taken away."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

from transparency.profiles import Profile
from transparency.program import AnswerPlan, Linked, Program
from transparency.records import UnmodelledError
from transparency.steps import Branch, Patchable

Run = Callable[[Linked], Awaitable[list[str]]]
_MAX_RUNS = 400


async def shrink(
    linked: Linked, differences: list[str], run: Run, profile: Profile
) -> tuple[Linked, list[str]]:
    """The smallest program that was found, and what is different with it."""
    runs, improved = 0, True
    while improved and runs < _MAX_RUNS:
        improved = False
        for program in _smaller(linked.program):
            try:
                candidate = Linked(program, ends_at_fault=profile.ends_at_fault)
            except UnmodelledError:
                continue
            runs += 1
            if found := await run(candidate):
                linked, differences, improved = candidate, found, True
                break
            if runs >= _MAX_RUNS:
                break
    return linked, differences


def _without(items: tuple, size: int) -> Iterator[tuple]:
    for at in range(0, len(items), size):
        yield items[:at] + items[at + size :]


def _smaller(program: Program) -> Iterator[Program]:
    for size in (8, 4, 2, 1):
        if size <= len(program.main):
            for main in _without(program.main, size):
                yield replace(program, main=main)
    for number, sub in enumerate(program.subs):
        for size in (4, 2, 1):
            if size <= len(sub):
                for steps in _without(sub, size):
                    yield _with_sub(program, number, steps)
        for at, step in enumerate(sub):
            if isinstance(step, Patchable):
                for form in step.forms:
                    yield _with_sub(program, number, (*sub[:at], form, *sub[at + 1 :]))
    for at, step in enumerate(program.main):
        if isinstance(step, Branch):
            yield replace(program, main=(*program.main[:at], *step.body, *program.main[at + 1 :]))
    if len(program.subs) > 1:
        yield replace(program, subs=program.subs[:-1])
    plain = AnswerPlan((None, None, None, None))
    for at, answer in enumerate(program.answers):
        if answer.patches:
            answers = (
                *program.answers[:at],
                replace(answer, patches=()),
                *program.answers[at + 1 :],
            )
            yield replace(program, answers=answers)
    if any(answer != plain for answer in program.answers):
        yield replace(program, answers=(plain,) * len(program.answers))
    for change in (
        {"rflags": 2}, {"breakpoints": ()}, {"base": 0}, {"entry": 0}, {"sub_offset": 0},
        {"pages": (0, 1, 2)}, {"data": bytes(len(program.data))},
    ):  # fmt: skip
        is_new = any(getattr(program, name) != value for name, value in change.items())
        if is_new and not (program.width == 16 and "base" in change):
            yield replace(program, **change)
    zeros = (0,) * 7 + program.registers[7:8] + (0,) * 8
    if program.registers != zeros:
        yield replace(program, registers=zeros)


def _with_sub(program: Program, number: int, steps: tuple) -> Program:
    subs = (*program.subs[:number], steps, *program.subs[number + 1 :])
    return replace(program, subs=subs)
