"""Let the host decide whether the guest may go on with what it is about to run.

    [handlers.exec_gate]
    folder = "questions"     # or webhook = "https://policy.example/ask"
    default = "abort"        # where nobody answers

| 0x0001 ASK | in | out |
|---|---|---|
| value1 | address of the command: UTF-8, at most 4096 bytes, then a NUL | a code of the gate |
| value2 | | why: 0 decided, 1 nobody answered, 2 too many questions, 3 no command |

A code is `Gate.CONTINUE` (0) or `Gate.ABORT` (0xffffffff). While the host is asked, the guest gets
`Gate.WAIT` (1), and sends its request again. What is wrong with a request is an ABORT. A guest
looks at the stamps before anything else: without them there was no host.

Invariants:

- Nobody answers in time, or in a form that is known: the default.
- The questions under way are bounded: a guest floods neither a service nor a person.
- Who is asked is asked by `vmi.outside`: a replay gives the recorded answer.
"""

from contextlib import AsyncExitStack
from enum import IntEnum
from functools import partial
from types import TracebackType
from typing import Literal, Self

import anyio
import msgspec

from vmibridge import (
    STANDARD_WAIT,
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    Gate,
    GuestMemoryError,
    StandardHandler,
    method,
)
from vmibridge.handlers._fetch_urls import parse_url
from vmibridge.handlers._gate_askers import Asker, Folder, Question, Webhook

MAX_COMMAND = 4096
"""Bytes of a command, without its NUL."""


class Why(IntEnum):
    """value2 of an answer."""

    DECIDED = 0
    NO_ANSWER = 1
    TOO_MANY = 2
    NO_COMMAND = 3


class GateDecision(msgspec.Struct, frozen=True):
    """The output: what became of a question."""

    command: str
    gate: Gate
    why: Why


class ExecGate(StandardHandler[GateDecision]):
    """Asks a service or a person. Raises `MissingExtraError` for a webhook without httpcore."""

    REQUEST = 0x0113
    # A person takes longer than any deadline of a server: its guests are told to wait.
    soft_timeout = 0.5
    wait = STANDARD_WAIT

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Who is asked. Raises `ValueError` if a value is out of range."""

        webhook: str = ""
        """A URL: the question is posted to it as JSON."""
        token: str = ""
        """What the webhook gets as bearer token."""
        folder: str = ""
        """A folder: the question is a file, which a person answers by another one."""
        default: Literal["continue", "abort"] = "abort"
        """The answer where there is none."""
        patience: float = 60.0
        """Seconds to wait for an answer."""
        max_questions: int = 16
        """Questions of a VM under way, at most; one more gets the default."""

        def __post_init__(self) -> None:
            if self.webhook and self.folder:
                raise ValueError("webhook or folder, not both")
            if self.webhook:
                try:
                    parse_url(self.webhook)
                except ValueError as error:
                    raise ValueError(f"webhook: {error}") from error
            if not self.token.isascii() or not self.token.isprintable():
                raise ValueError("token is printable ASCII")
            if self.default not in ("continue", "abort"):
                raise ValueError(f"default is continue or abort, got {self.default!r}")
            if not 0 < self.patience <= 86400:
                raise ValueError(f"patience is above 0, up to 86400 seconds, got {self.patience!r}")
            if not 1 <= self.max_questions <= 1024:
                raise ValueError(f"max_questions is 1 to 1024, got {self.max_questions!r}")

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings = settings or self.Settings()
        self._asker: Asker | None = None
        if settings.webhook:
            self._asker = Webhook(settings.webhook, settings.token)
        elif settings.folder:
            self._asker = Folder(settings.folder)
        self._life = AsyncExitStack()
        self._asked = 0
        # The default is the handler's own, so the deadline of the server must not come first.
        self.timeout = settings.patience + 10  # type: ignore[misc]  # this instance's own

    async def __aenter__(self) -> Self:
        """Make the connections, where a service is asked."""
        if self._asker is not None:
            await self._life.enter_async_context(self._asker)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close them, also while being cancelled."""
        await self._life.aclose()

    @method(0x0001)
    async def ask(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[GateDecision]:
        """Ask whether a command may run."""
        try:
            command = (await vmi.memory.read_c_string(packet.value1, MAX_COMMAND)).decode()
        except (GuestMemoryError, UnicodeDecodeError):
            return BridgeResponse(Gate.ABORT, Why.NO_COMMAND)
        question = Question(vmi.vm, vmi.vcpu, vmi.event.address_space, vmi.time, command)
        allowed, why = await vmi.outside(
            "exec_gate", partial(self._decide, question), type=tuple[bool, Why]
        )
        gate = Gate.CONTINUE if allowed else Gate.ABORT
        return BridgeResponse(gate, why, output=GateDecision(command, gate, why))

    async def _decide(self, question: Question) -> tuple[bool, Why]:
        default = self._settings.default == "continue"
        if self._asked >= self._settings.max_questions:
            return default, Why.TOO_MANY
        answer: bool | None = None
        self._asked += 1
        try:
            if self._asker is not None:
                with anyio.move_on_after(self._settings.patience):
                    answer = await self._asker.ask(question)
        finally:
            self._asked -= 1
        return (default, Why.NO_ANSWER) if answer is None else (answer, Why.DECIDED)
