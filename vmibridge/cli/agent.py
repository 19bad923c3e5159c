"""`vmibridge agent`: a VM here, its handlers elsewhere."""

import logging
import os
import signal
import sys
from functools import partial
from typing import Annotated

import anyio
import msgspec
from cyclopts import Parameter

from vmibridge.bridge.bounds import Seconds, problem
from vmibridge.cli.event_loop import check_loop, logging_to, run_on
from vmibridge.cli.logs import log_handler
from vmibridge.cli.options import Json, LogLevel, LoopOptions, named_backend
from vmibridge.cli.signals import exit_status, stop_on_signals
from vmibridge.cli.streams import json_line
from vmibridge.cli.trap_line import VcpuLine
from vmibridge.errors import BackendError, BackendSpecError, ConfigError
from vmibridge.transport import Agent
from vmibridge.vm.backend import Backend, GuestEnd

log: logging.Logger = logging.getLogger(__name__)


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
    vm = named_backend(backend, os.uname().nodename[:64] or "vm")
    try:
        carrier = Agent(vm, connect, deadline=deadline)
    except BackendSpecError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with logging_to(log_handler(log_level, None), log_level):
        return run_on(chosen, partial(_serve, vm, carrier, as_json=json))


async def _serve(backend: Backend, agent: Agent, *, as_json: bool) -> int:
    received: list[int] = []
    failure: BackendError | None = None
    end = GuestEnd()

    def stop(number: signal.Signals, now: bool) -> None:
        log.info("%s: stopping the guest", number.name)
        agent.stop(now=now)

    async with anyio.create_task_group() as tasks:
        await tasks.start(stop_on_signals, stop, received)
        try:
            async with backend:
                end = await agent.run()
        except BackendError as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    _print_summary(agent, end, as_json=as_json)
    if (stopped := exit_status(received)) is not None:
        return stopped
    failed = [each for each in end.vcpus if each.reason in ("crashed", "lost")]
    if failed:
        raise BackendError(
            "; ".join(f"vcpu {each.vcpu} {each.reason}: {each.detail}" for each in failed)
        )
    return 0


def _print_summary(agent: Agent, end: GuestEnd, *, as_json: bool) -> None:
    counts = agent.counts
    if as_json:
        guest = [
            VcpuLine(agent.vm, each.vcpu, each.reason, each.detail, each.registers)
            for each in end.vcpus
        ]
        summary = {**counts.as_dict(), "guest": guest}
        if agent.shares:
            summary["servers"] = agent.shares
        line = json_line(msgspec.json.encode({"summary": summary})).decode().rstrip("\n")
    else:
        line = (
            f"{counts.traps} traps: {counts.answered} answered by the server, {counts.own} here;"
            f" {counts.connections} connections"
        )
        if agent.shares:
            shares = ", ".join(f"{name} {count}" for name, count in agent.shares.items())
            line += f"; by server: {shares}"
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
