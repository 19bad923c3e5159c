"""Playbooks: what goes into a state machine and what comes out, one step a line.

    -> trap 1 value=5          a frame comes in, from the other end
    <- answer 1 rax=7          a frame goes out
    !! lost                    something else happens to the machine
    ** abandons 1              the machine does something else than to send
    == late=1 repeated=0       how it is now
    # text                     a comment, also behind a step

Where there are several ends, the one that is meant stands before the arrow: `web -> taken 1`.

- Values: numbers (`7`, `0x10`, `~5` in 64 bits), `yes`, `no`, `none`, `"text or bytes"`, and any
  other word is a text. Those without a name are the first fields of the frame.
- A step `<-` or `**` is held against the next thing that came out: the order counts, and what came
  and has no step fails before the next step goes in. A field that a step does not name has to
  have its default, or what is `usual` on this stage; `...` at the end of a step lets them be
  anything. A quoted text matches any that contains it.

A `Stage` puts a machine into this: it makes the frames, and calls its `when_NAME` for `!! NAME`.
"""

import re
from collections import deque
from typing import ClassVar, NamedTuple

import anyio.lowlevel
import msgspec

MARKS = ("->", "<-", "!!", "**", "==")
_WORD = re.compile(r'(?:([a-z_]\w*)=)?("[^"]*"|[^\s"]+)(?:\s+|$)')
_HOPS = 20


class Quoted(str):
    """A text that a step has in quotes."""

    __slots__ = ()


class Step(NamedTuple):
    text: str
    who: str
    mark: str
    name: str
    values: tuple
    fields: dict
    rest: bool
    """Fields that are not named may be anything."""


class Came(NamedTuple):
    """What came out: a frame, or what else the machine does."""

    who: str
    mark: str
    name: str
    fields: dict
    defaults: dict
    loose: bool = False
    """When it comes is for the loop to say: before or behind what else comes of one step."""

    def __str__(self):
        words = [self.who, self.mark, self.name]
        for number, (name, value) in enumerate(self.fields.items()):
            if number == 0 or name.isdigit():
                words.append(_shown(value))
            elif name not in self.defaults or value != self.defaults[name]:
                words.append(f"{name}={_shown(value)}")
        return " ".join(filter(None, words))


class PlaybookError(AssertionError):
    """A step is not what came, or is none."""


def parse(script):
    """The steps of a script. Raises `PlaybookError` for a line that is none."""
    lines = [line.strip() for line in script.splitlines()]
    return [_step(line) for line in lines if line and not line.startswith("#")]


def _step(line):
    text = re.sub(r'\s+#[^"]*$', "", line)
    before, mark, words = _parted(text)
    values, fields, rest = [], {}, False
    name = None
    while words:
        found = _WORD.match(words)
        if found is None or rest:
            raise PlaybookError(f"a step that cannot be read at {words!r}: {line}")
        key, word = found.groups()
        words = words[found.end() :]
        if key is not None:
            fields[key] = _value(word)
        elif word == "...":
            rest = True
        elif name is None and mark != "==":
            name = word
        elif fields:
            raise PlaybookError(f"a value without a name behind one that has one: {line}")
        else:
            values.append(_value(word))
    if name is None and mark != "==":
        raise PlaybookError(f"a step without a name: {line}")
    return Step(text, before, mark, name or "", tuple(values), fields, rest)


def _parted(text):
    words = text.split(None, 2)
    for place in (0, 1):
        if len(words) > place and words[place] in MARKS:
            who, mark, rest = text.partition(words[place])
            return who.strip(), mark, rest.strip()
    raise PlaybookError(f"a step begins with one of {' '.join(MARKS)}: {text}")


def _value(word):
    if word.startswith('"'):
        return Quoted(word[1:-1])
    known = {"yes": True, "no": False, "none": None}
    if word in known:
        return known[word]
    if re.fullmatch(r"~?(0x[0-9a-f]+|\d+)", word):
        number = int(word.removeprefix("~"), 0)
        return number if word[0] != "~" else ~number & (1 << 64) - 1
    return word


def _shown(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return hex(value) if value > 0xFFF else str(value)
    if isinstance(value, bytes):
        return f'"{value.decode("latin-1")}"'
    if isinstance(value, str) and re.fullmatch(r"[^\s\"]+", value):
        return value
    return f'"{value}"'


def _same(wanted, value):
    if isinstance(value, bytes):
        return isinstance(wanted, str) and wanted.encode("latin-1") == value
    if isinstance(wanted, Quoted):
        return isinstance(value, str) and wanted in value
    return type(wanted) is type(value) and wanted == value


def matches(step, came):
    """Whether `came` is what the step says."""
    if (step.who, step.mark, step.name) != (came.who, came.mark, came.name):
        return False
    names = list(came.fields)
    if len(step.values) > len(names):
        return False
    wanted = {**dict(zip(names, step.values, strict=False)), **step.fields}
    if not all(name in names and _same(value, came.fields[name]) for name, value in wanted.items()):
        return False
    others = [name for name in names if name not in wanted]
    return step.rest or all(
        name in came.defaults and came.fields[name] == came.defaults[name] for name in others
    )


class Stage:
    """A machine that a playbook is played on. Enter it with `async with`.

    A subclass puts in frames by `send`, has a `when_NAME` for each `!! NAME`, calls `frame_out` and
    `does` for what comes out, and may have `state` for what `==` looks at.
    """

    frames: ClassVar = {}
    """What makes a frame of this name: a struct, or a function."""
    usual: ClassVar = {}
    """Fields of frames that are as here, unless a step says otherwise."""

    def __init__(self):
        self._came = deque()
        self._played = []

    async def __aenter__(self):
        self.tasks = anyio.create_task_group()
        await self.tasks.__aenter__()
        return self

    async def __aexit__(self, *_):
        # Not the error of the block: that is to come out of it as it is, and in no group.
        self.tasks.cancel_scope.cancel()
        await self.tasks.__aexit__(None, None, None)

    # --- what a subclass has ----------------------------------------------------------

    async def send(self, frame, step):
        """A frame comes in."""
        raise AssertionError(f"a stage without frames of its own got {step.text!r}")

    def state(self):
        """What `==` looks at, by name."""
        return {}

    async def settle(self):
        """Let everything happen that follows from the last step."""
        for _ in range(_HOPS):
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()

    async def something_comes(self):
        """Wait for it, on a stage where what comes may take its time."""

    # --- what it tells ----------------------------------------------------------------

    def frame_out(self, frame, who="", **more):
        """A frame goes out; `more`: what else is to be said of it."""
        name = type(frame).__name__.lower()
        known = msgspec.structs.fields(frame)
        defaults = {
            each.name: each.default for each in known if each.default is not msgspec.NODEFAULT
        }
        fields = {each.name: getattr(frame, each.name) for each in known}
        self._came.append(
            Came(who, "<-", name, {**fields, **more}, {**defaults, **self.usual.get(name, {})})
        )

    def does(self, name, *values, who="", loose=False):
        """The machine does something else."""
        fields = {str(number): value for number, value in enumerate(values)}
        self._came.append(Came(who, "**", name, fields, {}, loose))

    # --- the play ---------------------------------------------------------------------

    async def run(self, script):
        """Enter the stage, and play a whole script."""
        async with self:
            await self.play(script)

    async def play(self, script):
        """Raises `PlaybookError` at the first step that is not what came."""
        for step in parse(script):
            self._played.append(step.text)
            if step.mark in ("<-", "**"):
                await self._take(step)
            else:
                self._nothing_else_came(f"nothing, before {step.text}")
                await self._do(step)
                await self.settle()
        self._nothing_else_came("nothing more")

    async def _take(self, step):
        if not self._came:
            await self.something_comes()
        for came in self._came:
            if matches(step, came):
                self._came.remove(came)
                return
            # Others may be before it only where one of the two is loose.
            if not came.loose and not any(
                each.loose and matches(step, each) for each in self._came
            ):
                break
        self._fail(step.text, self._came.popleft() if self._came else None)

    def _nothing_else_came(self, expected):
        if self._came:
            self._fail(expected, self._came.popleft())

    def _fail(self, expected, came):
        lines = [f"    {text}" for text in self._played[:-1]]
        lines += [
            f">>> {self._played[-1]}",
            f"expected: {expected}",
            f"came:     {came or 'nothing'}",
        ]
        lines += [f"and then: {each}" for each in self._came]
        raise PlaybookError("\n".join(["a step is not what came", *lines]))

    async def _do(self, step):
        if step.mark == "->":
            await self.send(self._made(step), step)
        elif step.mark == "!!":
            name = f"when_{step.name.replace('-', '_')}"
            if not hasattr(self, name):
                known = sorted(
                    each.removeprefix("when_").replace("_", "-")
                    for each in dir(self)
                    if each.startswith("when_")
                )
                raise PlaybookError(f"nothing that happens here: {step.text}; {' '.join(known)} do")
            await getattr(self, name)(*step.values, **step.fields)
        else:
            state = self.state()
            now = {name: state.get(name, "not there") for name in step.fields}
            if now != step.fields:
                shown = " ".join(f"{name}={_shown(value)}" for name, value in now.items())
                self._fail(step.text, f"== {shown}")

    def _made(self, step):
        if step.name not in self.frames:
            raise PlaybookError(f"no frame that can be sent here: {step.text}")
        try:
            return self.frames[step.name](
                *map(_plain, step.values),
                **{name: _plain(value) for name, value in step.fields.items() if name != "at"},
            )
        except TypeError as error:
            raise PlaybookError(f"{step.text}: {error}") from error


def _plain(value):
    return str(value) if isinstance(value, Quoted) else value
