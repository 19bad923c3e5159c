"""`vmibridge qemu device-args` and `vmibridge qemu attach`: the PCI device, for QEMUs of others."""

import logging
import os
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
from cyclopts import Parameter

from vmibridge.aio import sockets
from vmibridge.backends.device.arguments import (
    DEVICE_NAME,
    device_arguments,
    device_properties,
    ivshmem_arguments,
    libvirt_domain,
)
from vmibridge.backends.device.backend import DeviceBackend
from vmibridge.backends.device.ivshmem_backend import IvshmemOptions
from vmibridge.backends.device.migration import (
    BLOCKER_NAME,
    blocker_arguments,
    blocker_properties,
    write_blocker,
)
from vmibridge.backends.device.slots import MAX_SLOTS
from vmibridge.backends.qemu.qmp import Qmp
from vmibridge.cli.event_loop import logging_to, prints_beside, run_telling
from vmibridge.cli.logs import log_handler
from vmibridge.cli.options import (
    HANDLERS,
    BackendOptions,
    MonitorSocket,
    Outcomes,
    bytes_of,
    check_seconds,
)
from vmibridge.cli.quiet_output import stdout_writer
from vmibridge.cli.server_options import ServerOptions
from vmibridge.cli.server_run import Life, Prepared, run_server
from vmibridge.errors import BackendError, ConfigError, QmpError
from vmibridge.text import printable

log: logging.Logger = logging.getLogger(__name__)

_NOT_HOT = "does not support hotplugging"
"""QEMU's words of a bus (system/qdev-monitor.c), as of `pcie.0` of a q35."""
_PORT = "start QEMU with -device pcie-root-port,id=rp0,chassis=1, and give --bus rp0"
_SPEC = re.compile("(vfio-user|ivshmem|unix):")
_UNPLUG = 10.0
"""Seconds that a guest has to let go of the device."""
_TIMEOUT = 5.0
"""Seconds after which QEMU gives an access up, as the backend has it by default."""
_LEAST_MEMORY = 1 << 20
_LONGEST_PATH = 107
"""Bytes of a socket's path (unix(7), sun_path, less its NUL)."""


class _Deleted(msgspec.Struct):
    device: str = ""


def device_args(
    path: Annotated[str, Parameter(help="The socket where the host listens.")],
    /,
    *,
    memory: Annotated[
        str | None,
        Parameter(help="Size of guest memory, as in 512MiB: with what makes it shared."),
    ] = None,
    timeout: Annotated[
        float | None,
        Parameter(
            help="Seconds after which QEMU gives an access up; the host has to know the same; 5 by"
            " default."
        ),
    ] = None,
    refuse_migration: Annotated[
        Path | None,
        Parameter(
            help="Write an image of 1 KiB to this file, and print an option for it: QEMU then"
            " refuses to migrate or to save the guest, which the device does not go with."
        ),
    ] = None,
    libvirt: Annotated[
        bool, Parameter(negative=(), help="The lines of a domain of libvirt instead.")
    ] = False,
    ivshmem: Annotated[
        bool,
        Parameter(negative=(), help="The device ivshmem-doorbell instead, for QEMU 7.2 and later."),
    ] = False,
    slots: Annotated[
        int | None,
        Parameter(help="With --ivshmem: slots, as the backend's option slots; 64 by default."),
    ] = None,
    memory_file: Annotated[
        Path | None,
        Parameter(
            help="With --ivshmem and --memory: the file of guest memory, as the backend's option"
            " memory."
        ),
    ] = None,
) -> int:
    """Print what QEMU 11.1 needs to have the device: arguments for a shell, or XML.

    The host listens there before QEMU starts, by the backend vfio-user:unix:PATH, or, with
    --ivshmem, ivshmem:unix:PATH.

    Exit status: 0; 2 for wrong usage.

    Example: vmibridge qemu device-args /run/vmibridge.sock --memory 512MiB
    """
    where = _socket_path(path)
    size = bytes_of("--memory", memory, least=_LEAST_MEMORY, such_as="512MiB")
    if ivshmem:
        others = {"timeout": timeout, "refuse-migration": refuse_migration, "libvirt": libvirt}
        _refuse(others, "goes without --ivshmem")
        arguments = _ivshmem_arguments(where, slots, size, memory_file)
        sys.stdout.write(f"{shlex.join(arguments)}\n")
        return 0
    _refuse({"slots": slots, "memory-file": memory_file}, "goes with --ivshmem only")
    timeout = _TIMEOUT if timeout is None else timeout
    check_seconds("--timeout", timeout, (0.05, 3600))
    if libvirt:
        _refuse({"memory": memory}, "goes without --libvirt: a domain has its own <memory>")
        _refuse({"refuse-migration": refuse_migration}, "goes without --libvirt")
        for line in libvirt_domain(where, timeout).splitlines():
            sys.stdout.write(f"{printable(line)}\n")
        return 0
    arguments = device_arguments(where, timeout, size)
    if refuse_migration is not None:
        try:
            write_blocker(refuse_migration)
        except OSError as error:
            raise ConfigError(f"--refuse-migration {refuse_migration}: {error.strerror}") from error
        arguments += blocker_arguments(refuse_migration)
    sys.stdout.write(f"{shlex.join(arguments)}\n")
    return 0


def attach(
    *,
    qmp: MonitorSocket,
    handlers: Annotated[list[str], HANDLERS],
    bus: Annotated[
        str | None, Parameter(help="The bus, where QEMU has several: on q35 a pcie-root-port.")
    ] = None,
    backend_options: BackendOptions = "",
    outcomes: Outcomes = True,
    options: ServerOptions | None = None,
) -> int:
    """Plug the device into a QEMU that runs, answer its guest, and unplug it at the end.

    QEMU is 11.1 or later; its guest takes the device as any that is hot-plugged. Ctrl-C unplugs it
    and waits until QEMU has no more of it, for which the guest has to let go.

    Exit status: 0 when QEMU has ended, 130 after Ctrl-C, 1 when the device cannot be plugged in or
    a handler module failed, 2 for wrong usage.

    Example: vmibridge qemu attach --qmp qmp.sock --handlers vmibridge.handlers.hello
    """
    given = options or ServerOptions()
    prepared = Prepared.of(handlers, given)
    with (
        tempfile.TemporaryDirectory(prefix="vmibridge-") as folder,
        prints_beside(json=given.json),
        logging_to(log_handler(given.log_level, None), given.log_level),
    ):
        backend = DeviceBackend.from_spec(f"unix:{folder}/device.sock", backend_options, "vm")
        writer = stdout_writer(as_json=given.json, outcomes=outcomes)
        server = prepared.server([backend])
        health = prepared.health(server)
        plug = Plug(qmp, backend, bus, Path(folder, "image.vdi"))
        life = Life(
            [*prepared.taps, plug.connected(), backend, writer],
            server,
            writer,
            plug.plug,
            reloader=prepared.reloader(server, health),
            bound=prepared.stop_bound(_UNPLUG),
            exit_zero=given.exit_zero,
            recorders=prepared.taps,
            health=health,
        )
        main = partial(run_server, life)
        return run_telling(given.loop, main, health, given.health_socket)


class Plug:
    """The device of a QEMU that runs: plugged in while the server runs, unplugged when it stops.

    Meanwhile QEMU has the image `blocker` open, for which it refuses to migrate or save the guest.
    """

    def __init__(self, path: Path, backend: DeviceBackend, bus: str | None, blocker: Path) -> None:
        self._path, self._backend, self._bus = path, backend, bus
        self._blocker = blocker
        self._qmp: Qmp
        backend.before_hanging_up = self.unplug

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Connect to the monitor. Raises `BackendError`."""
        async with AsyncExitStack() as stack:
            try:
                monitor = await sockets.connect(socket.AF_UNIX, str(self._path))
            except OSError as error:
                raise BackendError(f"{self._path}: {error.strerror}") from error
            self._qmp = await stack.enter_async_context(Qmp(monitor))
            yield

    async def plug(self) -> None:
        """Plug it in. Raises `QmpError` with what QEMU says."""
        await self._refuse_migration()
        backend = self._backend
        properties = device_properties(backend.path, backend.options.timeout)
        if self._bus is not None:
            properties = {**properties, "bus": self._bus}
        try:
            await self._execute("device_add", properties)
        except QmpError as error:
            hint = f": {_PORT}" if _NOT_HOT in str(error) else ""
            raise QmpError(f"{error}{hint}") from error
        log.info("the device is plugged in: its id is %s", DEVICE_NAME)

    async def unplug(self) -> None:
        """Unplug it, and wait for QEMU to say that it is gone; not for ever. Raises nothing."""
        try:
            async with self._qmp.events("DEVICE_DELETED") as deleted:
                await self._qmp.execute("device_del", id=DEVICE_NAME)
                with anyio.fail_after(_UNPLUG):
                    async for event in deleted:
                        if msgspec.json.decode(event.data, type=_Deleted).device == DEVICE_NAME:
                            await self._allow_migration()
                            return
        except TimeoutError:
            log.warning(
                "the guest has not let go of the device within %.0f s: it stays in QEMU, dead;"
                " device_del %s takes it out later",
                _UNPLUG,
                DEVICE_NAME,
            )
        except (QmpError, msgspec.MsgspecError) as error:
            log.warning("the device was not unplugged: %s", error)

    async def _refuse_migration(self) -> None:
        write_blocker(self._blocker)
        # A host that was killed has left its own.
        await self._allow_migration()
        try:
            await self._execute("blockdev-add", blocker_properties(self._blocker))
        except QmpError as error:
            log.warning(
                "QEMU will not refuse to migrate or to save the guest, whose device would be dead"
                " afterwards: %s",
                error,
            )

    async def _allow_migration(self) -> None:
        with suppress(QmpError):
            await self._qmp.execute("blockdev-del", node_name=BLOCKER_NAME)

    async def _execute(self, command: str, arguments: Mapping[str, object]) -> None:
        # Any: to the type checker each of these might be the timeout of the command itself.
        given: dict[str, Any] = {name.replace("-", "_"): each for name, each in arguments.items()}
        await self._qmp.execute(command, **given)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raises `ConfigError` for one that is given."""
    for name, given in options.items():
        if given not in (None, False):
            raise ConfigError(f"--{name} {why}")


def _socket_path(text: str) -> Path:
    """Raises `ConfigError` for what no host could listen at, and for a backend's spec."""
    if not text:
        raise ConfigError("the path of the socket is empty: give one as in /run/vmibridge.sock")
    if _SPEC.match(text):
        raise ConfigError(
            f"{text[:80]}: is a spec of a backend: give the path of its socket alone, and for"
            " ivshmem: --ivshmem"
        )
    path = Path(text)
    if (size := len(os.fsencode(path.absolute()))) > _LONGEST_PATH:
        raise ConfigError(
            f"{text[:80]}: has {size} bytes from the root on: the path of a socket has at most"
            f" {_LONGEST_PATH}"
        )
    return path


def _ivshmem_arguments(
    path: Path, slots: int | None, size: int | None, file: Path | None
) -> list[str]:
    """Raises `ConfigError` for a number of slots that there cannot be, and for half of a memory."""
    slots = IvshmemOptions().slots if slots is None else slots
    if not 1 <= slots <= MAX_SLOTS:
        raise ConfigError(f"--slots {slots}: give a number from 1 to {MAX_SLOTS}")
    if (size is None) != (file is None):
        raise ConfigError("--memory and --memory-file: with --ivshmem, give both or neither")
    memory = None if size is None or file is None else (size, file)
    return ivshmem_arguments(path, slots, memory)
