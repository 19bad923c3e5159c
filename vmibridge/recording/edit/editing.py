"""One edit: recordings in, recordings out.

The messages are read once, or, where traps are cut or files split by time, twice: first to know
which traps are kept (`keeping`), then to write them. All that names a trap shares its fate: a
memory access, a reply, a note, and so a retry and what its request does later.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError, RecordingReadError
from vmibridge.recording.edit.changes import Changes
from vmibridge.recording.edit.fates import Fate, Fates
from vmibridge.recording.edit.keeping import CUT, MAX_PIECES, Keeping
from vmibridge.recording.edit.merging import merged
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import SESSION, Note, RecordedMessage, Reply, Session
from vmibridge.recording.new_recording import NewRecording
from vmibridge.recording.other_vms import other_vms_in, other_vms_text
from vmibridge.recording.redaction import RedactionRule
from vmibridge.recording.selection import Selection
from vmibridge.recording.unmatched import Unmatched
from vmibridge.recording.vm_names import VmNames
from vmibridge.text import counted
from vmibridge.vm.trap import TrapEvent

__all__ = ["Edit", "EditOptions", "Edited", "Split", "edit"]

Split: TypeAlias = Literal["vm"] | int
"""A file for each VM, or one for so many nanoseconds."""
Watch: TypeAlias = Callable[[Iterator[TimedMessage], RecordingReader], Iterable[TimedMessage]]

_MAX_TEXT = 65_536
"""Characters of a note about problems."""
_MISSING = "from here on, traps of this VM between those that are here are missing, too"
_IN_ANOTHER = "from here on, traps of this VM between those that are here are in another part"
_MAX_HELD = 64 << 20
_CHUNK_OF_PIECE = 64 << 10
"""Bytes of a chunk where there may be many files, each of which holds one."""


class EditOptions(msgspec.Struct, frozen=True):
    """What is asked for; by default nothing: the recordings are copied."""

    selection: Selection = Selection()
    rename: Mapping[str, str] = {}
    """From the name of a VM to another one."""
    redact: tuple[RedactionRule | str, ...] = ()
    shift: int = 0
    """Nanoseconds that are added to each time."""
    split: Split | None = None


class Edited(msgspec.Struct, frozen=True):
    """What came of an edit."""

    files: dict[str, dict[str, int]]
    """Of each file that was made, its messages by channel."""
    vms: dict[str, list[str]]
    """Of each file, its VMs."""
    cut: int
    """Traps that were read and are in no file."""
    problem_count: int
    """Places of the sources that could not be read."""
    problems: tuple[str, ...]
    """The first 100 of each source."""


class _Place(msgspec.Struct):
    """One VM in one file."""

    traps: int = 0
    behind: int = 0
    """How many traps of the VM had been read with the last one that is here."""
    has_gaps: bool = False
    """Whether a note says so."""


class _Vm(msgspec.Struct):
    """One VM, as far as it was read."""

    session: TimedMessage | None = None
    read: int = 0
    """Traps."""
    cut: int = 0
    """Those of them that are in no file."""
    files: dict[int, _Place] = {}
    outcomes: Counter[OutcomeKind] = msgspec.field(default_factory=Counter)
    """Of replies that are kept."""


def edit(
    sources: Sequence[Path], target: Path, options: EditOptions, watch: Watch | None = None
) -> Edited:
    """Make new recordings of these. `target` is the file to make; where it is split, files are
    numbered after it: `run-1.mcap`, `run-2.mcap`. `watch` sees the messages go by.

    Raises `RecordingReadError` for a source that is not a recording, `ConfigError` for options that
    do not fit the recordings or a file that is there already, `RecordingError` for one that cannot
    be written. Then no file is made.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(RecordingReader(source)) for source in sources]
        return Edit(readers, target, options, watch).run()


class Edit:
    """One pass over the messages of its readers."""

    def __init__(
        self,
        readers: Sequence[RecordingReader],
        target: Path,
        options: EditOptions,
        watch: Watch | None = None,
    ) -> None:
        self._readers = readers
        self._target = target
        self._options = options
        self._watch = watch
        self._changes = Changes(options.rename, options.redact, options.shift)
        self._keeping: Keeping | None = None
        self._fates = Fates()
        self._known = VmNames()
        self._vms: dict[str, _Vm] = {}
        self._piece_of_vm: dict[str, int] = {}
        self._files: dict[int, NewRecording] = {}
        self._names: dict[int, list[str]] = {}
        self._stack = ExitStack()
        self._held = 0
        """Bytes of sessions, for the files that are to begin yet."""
        self._cut = 0
        self._time = 0
        self._source_vms: frozenset[str | None] = frozenset()
        """Of all sources, where a file may have others."""
        self._joined: frozenset[str | None] = frozenset()
        """Those of which several parts are among the sources."""

    def run(self) -> Edited:
        """Raises as `edit`."""
        options = self._options
        selects = options.selection != Selection()
        if selects or isinstance(options.split, int):
            every = options.split if isinstance(options.split, int) else None
            self._keeping = Keeping(merged(self._readers), options.selection, every)
            if not self._keeping.kept:
                raise ConfigError(f"{self._nothing_kept()}; nothing was written")
        if options.selection.vms or options.split == "vm" or len(self._readers) > 1:
            # Before anything else is read: a reader reads one thing at a time.
            found = [{each.message.vm for each in one.messages(SESSION)} for one in self._readers]
            self._source_vms = frozenset().union(*found)
            times = Counter(vm for vms in found for vm in vms)
            self._joined = frozenset(vm for vm, count in times.items() if count > 1)
        with self._stack:
            for place, timed in enumerate(self._messages()):
                self._time = timed.time
                self._take(place, timed)
            self._finish()
            for vm in options.rename:
                if vm not in self._vms:
                    known = ", ".join(f"{name!a}" for name in list(self._vms)[:10])
                    raise ConfigError(f"--rename: there is no VM {vm!a}; there are {known}")
        return Edited(
            {str(each.path): each.counts for each in self._files.values()},
            {str(self._files[piece].path): names for piece, names in self._names.items()},
            self._cut,
            sum(reader.problem_count for reader in self._readers),
            tuple(self._problems()),
        )

    def _nothing_kept(self) -> str:
        names = ", ".join(str(reader.path) for reader in self._readers)
        if self._options.selection == Selection():
            return f"{names}: there is no trap"
        unmatched = Unmatched(self._options.selection)
        unmatched.look_at(merged(self._readers))
        return f"{names}: {unmatched}"

    def _messages(self) -> Iterable[TimedMessage]:
        messages = merged(self._readers)
        return messages if self._watch is None else self._watch(messages, self._readers[0])

    # --- which file -------------------------------------------------------------------

    def _take(self, place: int, timed: TimedMessage) -> None:
        message = timed.message
        if message.vm is None:
            self._write_everywhere(timed)
            return
        if not self._is_selected(message.vm):
            self._vm(message.vm)
            self._cut += isinstance(message, TrapEvent)
            return
        if isinstance(message, Session):
            self._begin(timed, message)
        elif isinstance(message, TrapEvent):
            self._take_trap(place, timed, message)
        elif message.seq is None:
            self._take_note(timed, message.vm, message)
        else:
            self._take_part(timed, message.vm, message.seq)

    def _is_selected(self, vm: str) -> bool:
        vms = self._options.selection.vms
        return not vms or vm in vms

    def _vm(self, name: str) -> _Vm:
        found = self._vms.get(name)
        if found is None:
            found = self._vms[self._known.once(name)] = _Vm()
        return found

    def _begin(self, timed: TimedMessage, session: Session) -> None:
        self._vm(session.vm)
        vm = self._vms[self._known.once(session.vm)] = _Vm(timed)
        if not self._is_lazy:
            self._enter(session.vm, self._piece_at(session.vm, timed.time))
        if self._options.split is None:
            vm.session = None
            return
        self._held += len(msgspec.msgpack.encode(session))
        if self._held > _MAX_HELD:
            raise RecordingReadError(f"sessions of more than {_MAX_HELD} bytes cannot be split")

    @property
    def _is_lazy(self) -> bool:
        """Whether a VM gets a file only with its first trap: there may be none that is kept."""
        return self._options.split == "vm" and self._keeping is not None

    def _take_trap(self, place: int, timed: TimedMessage, event: TrapEvent) -> None:
        vm = self._vm(event.vm)
        piece = 1 if self._keeping is None else self._keeping.piece_of(place)
        if piece != CUT and self._options.split == "vm":
            piece = self._piece_at(event.vm, timed.time)
        left_out = self._changes.left_out_of(event) if self._changes.redacts else frozenset()
        self._fates.begin(self._known.once(event.vm), event.seq, Fate(piece, left_out))
        vm.read += 1
        if piece == CUT:
            self._cut += 1
            vm.cut += 1
            return
        here = self._enter(event.vm, piece)
        self._note_what_is_missing(timed.time, event, vm.read - 1, here, piece)
        here.traps += 1
        here.behind = vm.read
        self._write(piece, timed, left_out)

    def _enter(self, name: str, piece: int) -> _Place:
        """A VM is in this file from here on: its session is, first."""
        vm = self._vm(name)
        if piece in vm.files:
            return vm.files[piece]
        vm.files[piece] = _Place()
        if vm.session is not None:
            time, session = vm.session
            assert isinstance(session, Session)
            if len(vm.files) > 1:
                time = self._time
            if isinstance(self._options.split, int):
                session = msgspec.structs.replace(session, part=session.part + piece - 1)
            self._write(piece, TimedMessage(time, session), None)
            self._note_other_vms(name, piece, time)
        return vm.files[piece]

    def _note_other_vms(self, name: str, piece: int, time: int) -> None:
        """A handler that serves several VMs had the requests of those, too, that are not here."""
        chosen = self._options.selection.vms
        here = {name} if self._options.split == "vm" else chosen
        others = sorted(filter(None, self._source_vms - here)) if here else []
        if others:
            text = other_vms_text(others)
            self._write(piece, TimedMessage(time, Note("lost", text, name)), None)

    def _is_there_again(self, message: RecordedMessage) -> bool:
        """Whether it is a note of VMs, or of traps, that are in the sources after all: those were
        split."""
        if isinstance(message, Note) and message.text == _IN_ANOTHER:
            return message.vm in self._joined
        names = other_vms_in(message.text) if isinstance(message, Note) else None
        return names is not None and self._source_vms.issuperset(names)

    def _note_what_is_missing(
        self, time: int, event: TrapEvent, before: int, here: _Place, piece: int
    ) -> None:
        """Of this VM, before a trap that is kept; it had `before` traps then."""
        if here.behind == before or here.has_gaps:
            return
        if here.traps:
            here.has_gaps = True
            is_split = isinstance(self._options.split, int)
            text = _IN_ANOTHER if is_split else _MISSING
        else:
            traps = counted(before, "trap")
            text = f"missing before this: {traps} of this VM, and what handlers kept of that"
        self._write(piece, TimedMessage(time, Note("lost", text, event.vm)), None)

    def _take_part(self, timed: TimedMessage, vm: str, seq: int) -> None:
        """Something of a trap."""
        fate = self._fates.of(vm, seq)
        message = timed.message
        if isinstance(message, Reply):
            self._fates.end(self._known.once(vm), message)
        if fate is None:
            if self._options.selection == Selection():
                # Its trap was lost, or is too long ago.
                piece = self._piece_at(vm, timed.time)
                self._enter(vm, piece)
                self._write(piece, timed, None)
            return
        if fate.piece == CUT:
            return
        if isinstance(message, Reply):
            self._vm(vm).outcomes[message.kind] += 1
        self._write(fate.piece, timed, fate.left_out)

    def _take_note(self, timed: TimedMessage, name: str, message: RecordedMessage) -> None:
        vm = self._vm(name)
        if (self._is_lazy and not vm.files) or self._is_there_again(message):
            return
        if isinstance(message, Note) and message.kind == "end" and vm.cut:
            counts = {word: count for word, count in message.counts.items() if word == "native"}
            outcomes = {kind.value: vm.outcomes[kind] for kind in OutcomeKind}
            text = counted(vm.read - vm.cut, "trap")
            message = msgspec.structs.replace(message, text=text, counts={**outcomes, **counts})
        # In the last of its files, as the end is.
        piece = max(vm.files, default=0) or self._piece_at(name, timed.time)
        self._enter(name, piece)
        self._write(piece, TimedMessage(timed.time, message), None)

    def _piece_at(self, vm: str, time: int) -> int:
        """The file of what is about a VM, and of no trap."""
        if isinstance(self._options.split, int):
            assert self._keeping is not None
            return self._keeping.piece_at(time)
        if self._options.split is None:
            return 1
        piece = self._piece_of_vm.setdefault(vm, len(self._piece_of_vm) + 1)
        if piece > MAX_PIECES:
            raise ConfigError(f"--split: there would be more than {MAX_PIECES} files")
        return piece

    # --- into the files ---------------------------------------------------------------

    def _write(self, piece: int, timed: TimedMessage, left_out: frozenset[str] | None) -> None:
        file = self._files.get(piece) or self._open(piece)
        written = self._changes.of(timed, left_out)
        vm = written.message.vm
        if isinstance(written.message, Session) and vm is not None:
            names = self._names.setdefault(piece, [])
            if vm not in names:
                names.append(vm)
        file.copy(*written)

    def _open(self, piece: int) -> NewRecording:
        target, split = self._target, self._options.split
        if split is not None:
            target = target.with_name(f"{target.stem}-{piece}{target.suffix}")
        file = NewRecording(
            target,
            made_by="vmibridge edit",
            **({} if split is None else {"chunk_size": _CHUNK_OF_PIECE}),
        )
        self._files[piece] = self._stack.enter_context(file)
        return file

    def _write_everywhere(self, timed: TimedMessage) -> None:
        for piece in self._files or (1,):
            self._write(piece, timed, None)

    def _finish(self) -> None:
        for name, vm in self._vms.items():
            if vm.session is not None and not vm.files and not self._is_lazy:
                self._enter(name, self._piece_at(name, vm.session.time))
        problems = self._problems()
        if problems:
            text = "; ".join(problems)[:_MAX_TEXT]
            self._write_everywhere(TimedMessage(self._time, Note("lost", text)))
        if not self._files:
            raise ConfigError("there is no message to write")

    def _problems(self) -> list[str]:
        return [
            f"{reader.path}: {problem}" for reader in self._readers for problem in reader.problems
        ]
