"""`vmibridge agent`: a VM here, its handlers elsewhere."""

import logging
import os
import signal
import sys
from functools import partial

import anyio
import msgspec
from anyio.abc import TaskStatus

from vmibridge.backend import open_backend
from vmibridge.cli.event_loop import Loop, check_loop, logging_to, run_on
from vmibridge.cli.logs import log_handler
from vmibridge.cli.trap_line import VcpuLine
from vmibridge.errors import BackendError, BackendSpecError, ConfigError
from vmibridge.transport import Agent
from vmibridge.vmi import Backend, GuestEnd

log: logging.Logger = logging.getLogger(__name__)


class AgentOptions(msgspec.Struct, frozen=True):
    """The options of the command."""

    backend: str
    connect: str
    loop: Loop
    deadline: float | None
    json: bool
    log_level: str


def run_agent(options: AgentOptions) -> int:
    """Carry the traps of one VM until it ends; returns the exit status. Raises `VmiBridgeError`."""
    check_loop(options.loop)
    backend = _open(options.backend)
    try:
        agent = Agent(backend, options.connect, deadline=options.deadline)
    except BackendSpecError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with logging_to(log_handler(options.log_level, None), options.log_level):
        return run_on(options.loop, partial(_serve, backend, agent, as_json=options.json))


def _open(text: str) -> Backend:
    """`NAME=SPEC` names the VM; without, it is named after this machine."""
    name, named, spec = text.partition("=")
    if named and ":" not in name:
        if not name:
            raise BackendSpecError(f"{text}: the name of the VM is missing before '='")
        return open_backend(spec, vm=name)
    return open_backend(text, vm=os.uname().nodename[:64] or "vm")


async def _serve(backend: Backend, agent: Agent, *, as_json: bool) -> int:
    received: list[int] = []
    failure: BackendError | None = None
    end = GuestEnd()
    async with anyio.create_task_group() as tasks:
        await tasks.start(_stop_on_signal, agent, received)
        try:
            async with backend:
                end = await agent.run()
        except BackendError as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    _tell(agent, end, as_json=as_json)
    if received:
        return 128 + received[0]
    failed = [each for each in end.vcpus if each.reason in ("crashed", "lost")]
    if failed:
        raise BackendError(
            "; ".join(f"vcpu {each.vcpu} {each.reason}: {each.detail}" for each in failed)
        )
    return 0


async def _stop_on_signal(
    agent: Agent, received: list[int], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """The first signal stops in good order, a second leaves no grace, a third exits."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            received.append(number)
            if len(received) > 2:
                os._exit(128 + number)
            log.info("%s: stopping the guest", signal.Signals(number).name)
            agent.stop(now=len(received) > 1)


def _tell(agent: Agent, end: GuestEnd, *, as_json: bool) -> None:
    counts = agent.counts
    if as_json:
        guest = [
            VcpuLine(agent.vm, each.vcpu, each.reason, each.detail, each.registers)
            for each in end.vcpus
        ]
        summary = {**counts.as_dict(), "guest": guest}
        if agent.shares:
            summary["servers"] = agent.shares
        line = msgspec.json.encode({"summary": summary}).decode()
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
