"""A trap and a summary as the command line shows them: JSON objects and plain lines."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from vmibridge.bridge.guest_exit import GuestExit
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.output import output_json
from vmibridge.bridge.packet import BridgePacket
from vmibridge.cli.guest_exits import NO_EXITS, exit_lines, exits_text
from vmibridge.engine.summary import Summary
from vmibridge.text import counted, printable, repr_of
from vmibridge.vm.trap import TrapEvent

if TYPE_CHECKING:  # it needs an extra
    from vmibridge.recording.messages import Reply


class TrapLine(msgspec.Struct):
    """One trap, for `--json`."""

    seq: int
    vm: str
    vcpu: int
    trap: str
    width: int
    magic: int
    request: int
    method: int
    values: list[int]
    outcome: str
    response: list[int | None]
    """The four values as written; null where the register was left alone."""
    output: msgspec.Raw
    duration_us: float
    handler: str | None
    error: str | None


class VcpuLine(msgspec.Struct):
    """How one vCPU ended, for `--json`."""

    vm: str
    vcpu: int
    reason: str
    detail: str
    registers: dict[str, int]


def trap_line(outcome: Outcome[Any]) -> TrapLine:
    """What `--json` tells of one outcome of a server."""
    event, packet, writes = outcome.event, outcome.packet, outcome.writes
    assert event is not None, "outcomes of a server have their trap"
    return TrapLine(
        seq=event.seq,
        vm=event.vm,
        vcpu=event.vcpu,
        trap=event.reason.value,
        width=event.width,
        magic=packet.magic,
        request=packet.request,
        method=packet.method,
        values=list(packet.values),
        outcome=outcome.kind.value,
        response=[None] * 4 if writes is None else list(writes.values),
        output=msgspec.Raw(output_json(outcome.output)),
        duration_us=round(outcome.duration * 1e6, 1),
        handler=outcome.handler,
        error=outcome.error,
    )


def trap_json(outcome: Outcome[Any]) -> bytes:
    """One line of JSON. An output that JSON cannot hold is given by its `repr`."""
    return msgspec.json.encode(trap_line(outcome))


def summary_json(
    summaries: Mapping[str, Summary], exits: Mapping[str, GuestExit] = NO_EXITS, dropped: int = 0
) -> bytes:
    """The last line of `--json`: counts by outcome, exits of guests, how each vCPU ended.

    `dropped`: lines before it that could not be written; shown where there are any.
    """
    whole = Summary.of_all(summaries.values())
    line: dict[str, Any] = {
        **{kind.value: count for kind, count in whole.outcomes.items()},
        "total": whole.total,
        "native": whole.native,
        "retries": whole.retries,
        "uncollected": whole.uncollected,
        "abandoned": whole.abandoned,
        "blocked": whole.blocked,
        "unrecorded": whole.unrecorded,
        "exits": exit_lines(exits),
        "guest": [
            VcpuLine(vm, end.vcpu, end.reason, end.detail, end.registers)
            for vm, summary in summaries.items()
            if summary.guest is not None
            for end in summary.guest.vcpus
        ],
    }
    if dropped:
        line["dropped_lines"] = dropped
    return msgspec.json.encode({"summary": line})


def trap_cells(
    event: TrapEvent, packet: BridgePacket | None, answer: "Outcome[Any] | Reply | None", text: str
) -> dict[str, str]:
    """What people see of one trap that runs or was recorded, by the name of its column.

    `text` is the error, or else the output, as text.
    """
    call = "-"
    if packet is not None:
        call = f"{packet.magic:08x}/{packet.request:04x}/{packet.method:04x}"
    cells = {
        "seq": str(event.seq),
        "vcpu": str(event.vcpu) if event.vm == "vm" else f"{event.vm}/{event.vcpu}",
        "trap": f"{event.reason.value}{event.width}",
        "handler": "-",
        "magic/request/method": call,
        "outcome": "none",
        "answer": "",
        "us": "",
        "output": text,
    }
    if answer is None:
        return cells
    values = (None,) * 4 if answer.writes is None else answer.writes.values
    return cells | {
        "handler": answer.handler or "-",
        "outcome": answer.kind.value,
        "answer": " ".join("." if value is None else f"{value:x}" for value in values),
        "us": f"{answer.duration * 1e6:.0f}",
    }


COLUMNS = [
    "seq",
    "vcpu",
    "trap",
    "handler",
    "magic/request/method",
    "outcome",
    "answer",
    "us",
    "output",
]


def trap_columns(outcome: Outcome[Any]) -> list[str]:
    """The cells of one outcome of a server, in the order of `COLUMNS`."""
    assert outcome.event is not None, "outcomes of a server have their trap"
    text = outcome.error
    if text is None:
        text = "" if outcome.output is None else repr_of(outcome.output)
    text = printable(text if len(text) <= 200 else text[:200] + "...")
    cells = trap_cells(outcome.event, outcome.packet, outcome, text)
    return [cells[name] for name in COLUMNS]


def summary_text(summary: Summary, exits: Mapping[str, GuestExit] = NO_EXITS) -> str:
    """One line for people: counts by outcome, and what guests exited with."""
    counts = [f"{count} {kind.value}" for kind, count in summary.outcomes.items() if count]
    others = [
        text
        for count, text in (
            (summary.native, f"{summary.native} not ours"),
            (summary.uncollected, f"{counted(summary.uncollected, 'result')} not collected"),
            (summary.abandoned, f"{counted(summary.abandoned, 'handler')} abandoned"),
            (summary.blocked, f"the loop was held up {counted(summary.blocked, 'time')}"),
            (summary.unrecorded, f"{summary.unrecorded} not recorded"),
        )
        if count
    ]
    told = ", ".join([", ".join(counts) or "none", *others])
    return f"{counted(summary.total, 'trap')}: {told}{exits_text(exits)}"
