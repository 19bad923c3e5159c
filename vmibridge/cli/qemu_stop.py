"""`vmibridge qemu stop`: what a pod, a container or a service runs before QEMU is stopped."""

import sys
from functools import partial
from typing import Annotated

from cyclopts import Parameter

from vmibridge.backends.qemu.stopping import Ending, Way, stop_qemu
from vmibridge.cli.event_loop import run_on
from vmibridge.cli.options import MonitorSocket, check_seconds
from vmibridge.errors import BackendError, ConfigError, QmpError

_MAX_NAME = 255
"""Bytes of a snapshot's name (QEMU, QEMUSnapshotInfo)."""


def stop(
    *,
    qmp: MonitorSocket,
    powerdown: Annotated[
        bool,
        Parameter(negative=(), help="Press the power button, and wait for the guest to shut down."),
    ] = False,
    snapshot: Annotated[
        str | None,
        Parameter(help="Save the guest under this name in its qcow2 disk, for -loadvm NAME."),
    ] = None,
    within: Annotated[float, Parameter(help="Seconds that the guest gets for it.")] = 60.0,
) -> int:
    """Stop a QEMU by its monitor: its guest powers off, is saved, or is cut off.

    Without --powerdown and --snapshot it is cut off at once. A QEMU that has ended before is none
    that is left to stop.

    Exit status: 0 when QEMU has ended as was asked, or before; 1 when the guest did not power off
    in time and was cut off, or could not be saved and goes on; 2 for wrong usage.

    Example: vmibridge qemu stop --qmp /run/vmibridge/qmp.sock --powerdown --within 30
    """
    if powerdown and snapshot is not None:
        raise ConfigError("--powerdown does not go with --snapshot: a saved guest is not shut down")
    if snapshot is not None and not (
        snapshot.isprintable() and 0 < len(snapshot.encode()) <= _MAX_NAME
    ):
        raise ConfigError(f"--snapshot: a name has 1 to {_MAX_NAME} bytes that can be printed")
    check_seconds("--within", within)
    way = snapshot if snapshot is not None else Way.POWERDOWN if powerdown else Way.QUIT
    try:
        ending = run_on("asyncio", partial(stop_qemu, qmp, way, within))
    except QmpError as error:
        raise BackendError(f"{qmp}: {error}") from error
    if ending is Ending.CUT_OFF:
        raise BackendError(f"{qmp}: {ending.value}")
    sys.stdout.write(f"{qmp}: {ending.value}\n")
    return 0
