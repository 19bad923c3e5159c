"""What a walk over a recording plays, one VM after the other, and what it waits for."""

from enum import Enum
from typing import Protocol

from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import PlainTrap, Reply
from vmibridge.vm.trap import TrapEvent

__all__ = ["Awaited", "Player", "Unfolding"]


class Player(Protocol):
    """One VM, as the walk plays it."""

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is played any more."""

    @property
    def is_owed(self) -> bool:
        """Whether a trap of it waits for its answer."""

    @property
    def needs_behind(self) -> bool:
        """Whether a handler of it cannot go on before more of the recording is read."""

    def play(self, message: TimedMessage, after: object) -> bool:
        """Play a message; `after`: the one behind it. `False`: it is not its time yet."""

    def play_plain(self, time: int, event: TrapEvent, then: Reply | PlainTrap) -> bool:
        """Play a trap with its reply. `False`: they are to be played one after the other."""

    def at_end(self) -> None:
        """Nothing more was recorded: what is open is answered as it comes."""


class Unfolding(Protocol):
    """Who plays a plain trap."""

    def unfold(self) -> object:
        """Have it played as any other: there is a request that the walk waits for."""


class Awaited(Enum):
    """What the walk waits for a request to be."""

    TAKEN = "taken"
    BEGUN = "begun"
    RESUMED = "resumed"
    ENDED = "ended"
    READ = "given what it waits for of guest memory"
    FETCHED = "given what came from outside"
    TOLD = "told to wait"
    REFUSED = "rid of a retry that is answered WAIT at once"
    ANSWERED = "answered"
