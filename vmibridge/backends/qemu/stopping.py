"""Stop a QEMU by its monitor, before its pod, container or service is stopped.

| `Way` | QEMU is sent | the guest |
|---|---|---|
| `QUIT` | `quit` | is cut off, as by pulling the plug |
| `POWERDOWN` | `system_powerdown`; `quit` when its time is over | shuts down by its power button |
| a name | `stop`, `snapshot-save`, `quit` | goes on from there with `-loadvm NAME` |

- A QEMU that has ended already is no error: whoever stops it may come too late.
- A guest is cut off when it was asked to go and has not gone. When it cannot be saved, it goes on.
"""

import enum
import os
import socket
from pathlib import Path

import anyio
import msgspec

from vmibridge.aio import sockets
from vmibridge.backends.qemu.qmp import Json, Qmp, QmpEvent
from vmibridge.errors import BackendError, QmpError

_PATIENCE = 5.0
"""Seconds that QEMU gets for what needs no guest."""


class Way(enum.Enum):
    """How a guest is stopped that is not saved."""

    QUIT = enum.auto()
    POWERDOWN = enum.auto()


class Ending(enum.Enum):
    """How QEMU has ended."""

    GONE = "QEMU has ended already"
    QUIT = "QEMU has quit"
    POWERED_OFF = "the guest has powered off"
    SAVED = "the guest is saved"
    CUT_OFF = "the guest has not powered off in time, and was cut off"


class _Inserted(msgspec.Struct):
    node: str = msgspec.field(name="node-name")
    format: str = msgspec.field(name="drv")
    is_read_only: bool = msgspec.field(name="ro")


class _Drive(msgspec.Struct):
    inserted: _Inserted | None = None


class _Job(msgspec.Struct):
    id: str
    status: str
    error: str | None = None


async def stop_qemu(path: Path, way: Way | str, within: float) -> Ending:
    """Stop the QEMU whose monitor listens at a unix socket; a string is the name of a snapshot.

    The guest gets `within` seconds, QEMU itself a few more. Raises `BackendError` if the socket
    cannot be connected to, and `QmpError` if QEMU refuses or does not answer. If cancelled, QEMU
    may have been told to stop, or not.
    """
    try:
        connected = await _connect(path)
        if connected is None:
            return Ending.GONE
        async with Qmp(connected) as qmp:
            if isinstance(way, str):
                await _save(qmp, way, within)
                ending = Ending.SAVED
            elif way is Way.POWERDOWN:
                ending = await _power_down(qmp, within)
            else:
                ending = Ending.QUIT
            await _quit(qmp)
    except QmpError:
        # It may have ended of its own accord in the meantime.
        if (again := await _connect(path)) is not None:
            sockets.close(again)
            raise
        return Ending.GONE
    return ending


async def _connect(path: Path) -> socket.socket | None:
    """`None`: nothing listens there any more."""
    try:
        return await sockets.connect(socket.AF_UNIX, str(path))
    except ConnectionRefusedError:
        if not await anyio.Path(path).is_socket():
            raise BackendError(f"{path}: is not a socket") from None
    except FileNotFoundError:
        # QEMU removes its socket at its end, and no folder.
        if not await anyio.Path(path.parent).is_dir():
            raise BackendError(f"{path}: there is no folder {path.parent}") from None
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror or error}") from error
    return None


async def _power_down(qmp: Qmp, within: float) -> Ending:
    async with qmp.events("SHUTDOWN") as shutdowns:
        await qmp.execute("system_powerdown")
        with anyio.move_on_after(within):
            # With -no-shutdown QEMU stays behind its guest; else its monitor closes.
            async for _ in shutdowns:
                break
            return Ending.POWERED_OFF
    return Ending.CUT_OFF


async def _quit(qmp: Qmp) -> None:
    """Raises `QmpError` when QEMU has not closed its monitor a few seconds later."""
    why = QmpError(f"quit: QEMU has not ended within {_PATIENCE:g} seconds")
    try:
        await qmp.execute("quit", timeout=_PATIENCE)
    except QmpError as error:
        # Behind a guest that has powered off, QEMU may be closing its monitor just now.
        why = error
    with anyio.move_on_after(_PATIENCE):
        await qmp.gone.wait()
        return
    raise why


async def _save(qmp: Qmp, name: str, within: float) -> None:
    """Save the guest where it is, in the place of a snapshot of that name."""
    deadline = anyio.current_time() + within
    nodes = await _writable_nodes(qmp)
    saved = False
    try:
        # From here on the guest does nothing that is not in the snapshot. vCPUs stop behind traps.
        await qmp.execute("stop", timeout=within)
        await _run_job(qmp, "snapshot-delete", deadline, tag=name, devices=[*nodes])
        # The first of them has the state of the machine, too.
        await _run_job(qmp, "snapshot-save", deadline, tag=name, vmstate=nodes[0], devices=[*nodes])
        saved = True
    finally:
        if not saved and not qmp.gone.is_set():
            with anyio.CancelScope(shield=True):
                await qmp.execute("cont", timeout=_PATIENCE)


async def _writable_nodes(qmp: Qmp) -> list[str]:
    """Those that can hold the state of a machine come first. Raises `QmpError` if there is none."""
    drives = await qmp.execute("query-block", list[_Drive])
    found = [each.inserted for each in drives if each.inserted and not each.inserted.is_read_only]
    found.sort(key=lambda each: each.format != "qcow2")
    if not found or found[0].format != "qcow2":
        raise QmpError("snapshot-save: no disk holds snapshots: give QEMU a disk in qcow2")
    return [each.node for each in found]


async def _run_job(qmp: Qmp, command: str, deadline: float, **arguments: Json) -> None:
    job = f"vmibridge-{os.getpid()}"
    async with qmp.events("JOB_STATUS_CHANGE") as changes:
        await qmp.execute(command, job_id=job, **arguments, timeout=_left(deadline))
        with anyio.move_on_at(deadline) as timed_out:
            async for change in changes:
                if _is_concluded(change, job):
                    break
    if timed_out.cancelled_caught:
        raise QmpError(f"{command}: not done in time")
    # While it saves, QEMU answers nothing.
    jobs = await qmp.execute("query-jobs", list[_Job], timeout=_left(deadline))
    errors = [each.error for each in jobs if each.id == job and each.error]
    await qmp.execute("job-dismiss", id=job)
    if errors:
        raise QmpError(f"{command}: {errors[0]}")


def _is_concluded(change: QmpEvent, job: str) -> bool:
    try:
        told = msgspec.json.decode(change.data, type=_Job)
    except msgspec.MsgspecError as error:
        raise QmpError(f"QEMU sent an invalid {change.event}: {error}") from None
    return told == _Job(job, "concluded")


def _left(deadline: float) -> float:
    return max(deadline - anyio.current_time(), _PATIENCE)
