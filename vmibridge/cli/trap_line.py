"""A trap and a summary as the command line shows them: JSON objects and plain lines."""

from collections.abc import Mapping
from typing import Any

import msgspec

from vmibridge.bridge.outcome import Outcome
from vmibridge.engine.summary import Summary
from vmibridge.text import printable


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
    output: Any
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
        output=outcome.output,
        duration_us=round(outcome.duration * 1e6, 1),
        handler=outcome.handler,
        error=outcome.error,
    )


def trap_json(outcome: Outcome[Any]) -> bytes:
    """One line of JSON. An output that JSON cannot hold is given by its `repr`."""
    return msgspec.json.encode(trap_line(outcome), enc_hook=repr) + b"\n"


def summary_json(summaries: Mapping[str, Summary]) -> bytes:
    """The last line of `--json`: counts by outcome, and how each vCPU ended."""
    whole = Summary.of_all(summaries.values())
    line = {
        **{kind.value: count for kind, count in whole.outcomes.items()},
        "total": whole.total,
        "native": whole.native,
        "retries": whole.retries,
        "uncollected": whole.uncollected,
        "abandoned": whole.abandoned,
        "guest": [
            VcpuLine(vm, end.vcpu, end.reason, end.detail, end.registers)
            for vm, summary in summaries.items()
            if summary.guest is not None
            for end in summary.guest.vcpus
        ],
    }
    return msgspec.json.encode({"summary": line}) + b"\n"


def trap_columns(outcome: Outcome[Any]) -> list[str]:
    """What people see of one outcome: the columns of the table and of the plain lines."""
    line = trap_line(outcome)
    call = f"{line.magic:08x}/{line.request:04x}/{line.method:04x}"
    answer = " ".join("." if value is None else f"{value:x}" for value in line.response)
    told = (
        line.error if line.error is not None else "" if line.output is None else repr(line.output)
    )
    return [
        str(line.seq),
        str(line.vcpu) if line.vm == "vm" else f"{line.vm}/{line.vcpu}",
        f"{line.trap}{line.width}",
        line.handler or "-",
        call,
        line.outcome,
        answer,
        f"{line.duration_us:.0f}",
        printable(told if len(told) <= 200 else told[:200] + "..."),
    ]


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


def summary_text(summary: Summary) -> str:
    """One line for people: counts by outcome."""
    counts = [f"{count} {kind.value}" for kind, count in summary.outcomes.items() if count]
    others = [
        f"{count} {what}"
        for count, what in (
            (summary.native, "not ours"),
            (summary.uncollected, "results not collected"),
            (summary.abandoned, "handlers abandoned"),
        )
        if count
    ]
    return f"{summary.total} traps: {', '.join([', '.join(counts) or 'none', *others])}"
