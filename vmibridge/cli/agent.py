"""`vmibridge agent`: a VM here, its handlers elsewhere."""

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import anyio
import msgspec
from cyclopts import Parameter

from vmibridge.bridge.bounds import Seconds, problem
from vmibridge.cli.event_loop import check_loop, logging_to, run_telling
from vmibridge.cli.logs import log_handler
from vmibridge.cli.options import (
    ExitZero,
    HealthSocket,
    Json,
    LogLevel,
    LoopOptions,
    named_backend,
)
from vmibridge.cli.signals import exit_status, stop_at_hangup, stop_on_signals
from vmibridge.cli.stop_bound import STOP_MARGIN, StopBound
from vmibridge.cli.streams import json_line
from vmibridge.cli.trap_line import VcpuLine
from vmibridge.errors import BackendError, BackendSpecError, ConfigError, VmiBridgeError
from vmibridge.health.state import Health
from vmibridge.text import counted
from vmibridge.transport import Agent
from vmibridge.vm.backend import Backend, GuestEnd

if TYPE_CHECKING:  # it needs an extra
    from vmibridge.recording.replay.load import LoadSummary

log: logging.Logger = logging.getLogger(__name__)

_STOPPING = 8.0
"""Seconds of a stop: a second of grace for the server's answers, five to tell it the end."""


def agent(
    *,
    backend: Annotated[
        str, Parameter(help="The VM, as for run. NAME=SPEC names it; by default as this machine.")
    ],
    connect: Annotated[
        str,
        Parameter(
            help="The server: unix:PATH, tcp:HOST:PORT, tls:HOST:PORT?cert=&key=&ca=, or any of"
            " those at nats://HOST:PORT; see docs/remote.md."
        ),
    ],
    deadline: Annotated[
        float | None,
        Parameter(
            help="Seconds that a vCPU waits for an answer at the most; by default a little"
            " longer than the server's own deadline."
        ),
    ] = None,
    loop: LoopOptions | None = None,
    json: Annotated[Json, Parameter(help="The summary as one JSON object.")] = False,
    log_level: LogLevel = "info",
    exit_zero: ExitZero = False,
    health_socket: HealthSocket = None,
) -> int:
    """Run a guest whose handlers are in a `vmibridge serve`, here or on another machine.

    The guest starts when the server has said which traps it wants. When the server is away,
    the agent tries to reach it again, and a vCPU that waits goes on at its deadline.

    Exit status: 0 when the guest ended by itself, 1 when it or its backend failed or the
    server refused the agent, 2 for wrong usage.

    Example: vmibridge agent --backend web=unicorn:guest.bin --connect unix:/run/vmibridge.sock
    """
    chosen = (loop or LoopOptions()).loop
    check_loop(chosen)
    if (why := problem(deadline, Seconds)) is not None:
        raise ConfigError(f"--deadline: {why}")
    named = named_backend(backend, os.uname().nodename[:64] or "vm")
    try:
        carried = [(vm, Agent(vm, connect, deadline=deadline)) for vm in named.copies()]
    except BackendSpecError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with logging_to(log_handler(log_level, None), log_level):
        health = Health(stop_within=_STOPPING + STOP_MARGIN)
        for _, each in carried:
            health.add(each.health)
        main = partial(_serve, carried, health, as_json=json, exit_zero=exit_zero)
        return run_telling(chosen, main, health, health_socket)


async def _serve(
    carried: Sequence[tuple[Backend, Agent]], health: Health, *, as_json: bool, exit_zero: bool
) -> int:
    received: list[int] = []
    bound = StopBound(_STOPPING, exit_zero=exit_zero)
    failures: list[VmiBridgeError] = []
    ends: dict[str, GuestEnd] = {}
    opening: set[anyio.CancelScope] = set()

    def stop(number: signal.Signals, now: bool) -> None:
        log.info("%s: stopping the guest", number.name)
        health.stop_begins()
        for _, agent in carried:
            agent.stop(now=now)
        for scope in opening:
            # A backend may wait for its VM for as long as it is told to.
            scope.cancel()

    async def carry(backend: Backend, agent: Agent) -> None:
        scope = anyio.CancelScope()
        opening.add(scope)
        try:
            with scope:
                async with backend:
                    opening.discard(scope)
                    ends[agent.vm] = await agent.run()
        except VmiBridgeError as error:  # one of a recording is no `BackendError`
            failures.append(error)
        finally:
            opening.discard(scope)

    async with anyio.create_task_group() as tasks:
        stopping = partial(stop_on_signals, bound=bound)
        await tasks.start(stopping, stop, received, stop_at_hangup(stop, received))
        with bound.held():
            async with anyio.create_task_group() as guests:
                for backend, agent in carried:
                    guests.start_soon(carry, backend, agent)
        tasks.cancel_scope.cancel()
    if failures:
        raise failures[0]
    _print_summary(carried, ends, as_json=as_json)
    if (stopped := exit_status(received, zero=exit_zero)) is not None:
        return stopped
    ended = [each for end in ends.values() for each in end.vcpus]
    failed = [each for each in ended if each.reason in ("crashed", "lost")]
    if failed:
        raise BackendError(
            "; ".join(f"vcpu {each.vcpu} {each.reason}: {each.detail}" for each in failed)
        )
    return 0


def _print_summary(
    carried: Sequence[tuple[Backend, Agent]], ends: Mapping[str, GuestEnd], *, as_json: bool
) -> None:
    counts: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    for _, agent in carried:
        counts.update(agent.counts.as_dict())
        shares.update(agent.shares)
    load = _load_of([backend for backend, _ in carried])
    if as_json:
        guest = [
            VcpuLine(vm, each.vcpu, each.reason, each.detail, each.registers)
            for vm, end in ends.items()
            for each in end.vcpus
        ]
        summary: dict[str, object] = {**counts, "guest": guest}
        if shares:
            summary["servers"] = shares
        if load is not None:
            summary["load"] = load
        lines = [json_line(msgspec.json.encode({"summary": summary})).decode().rstrip("\n")]
    else:
        line = (
            f"{counted(counts['traps'], 'trap')}: {counts['answered']} answered by the server,"
            f" {counts['own']} here; {counted(counts['connections'], 'connection')}"
        )
        if shares:
            told = ", ".join(f"{name} {count}" for name, count in shares.items())
            line += f"; by server: {told}"
        lines = [line]
        if load is not None:
            lines.append(
                f"{load.rate:.0f} traps/s for {load.seconds:.3f} s; milliseconds: half of them"
                f" {load.p50_ms:g}, 90 % {load.p90_ms:g}, 99 % {load.p99_ms:g}, all {load.max_ms:g}"
            )
            lines.append(
                f"{counted(load.compared, 'request')} compared with the recording,"
                f" {load.different} different"
            )
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _load_of(backends: Sequence[Backend]) -> "LoadSummary | None":
    """The figures of recordings that are played; `None` for a VM."""
    if "vmibridge.recording.replay.load" not in sys.modules:
        return None
    from vmibridge.recording.replay.load import LoadBackend, LoadFigures

    played = [backend for backend in backends if isinstance(backend, LoadBackend)]
    return LoadFigures.sum_up(played) if played else None
