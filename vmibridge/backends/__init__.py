"""The backends, by the name that starts their spec.

| spec | the VM |
|---|---|
| `ivshmem:unix:PATH?slots=64&memory=FILE&mode=0o600&stay=false` | a QEMU with ivshmem-doorbell |
| `qemu-gdb:unix:PATH?site=0x...&...` or `qemu-gdb:tcp:HOST:PORT?...` | a QEMU's gdbstub |
| `qemu-plugin:unix:PATH?mode=0o600&stay=false` | the QEMUs that connect with the plugin |
| `remote:URL` | the VM of the agent that connects there |
| `replay:PATH?speed=0&order=recorded&vm=NAME&strict=false&copies=1&loop=1` | a recording |
| `unicorn:PATH?width=64&base=0x100000&memory=16MiB&vcpus=1` | a raw x86 image, emulated here |
| `vfio-user:unix:PATH?slots=64&kernel=0&hold=2ms&timeout=5s&...` | a QEMU that has the device |
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmibridge.errors import BackendSpecError

# Each backend is imported when it is asked for; what is packed into a guest's initramfs, in this
# package too, needs nothing but Python.
if TYPE_CHECKING:
    from vmibridge.vm.backend import Backend


def _unicorn(path: str, options: str, vm: str) -> "Backend":
    from vmibridge.backends.unicorn.backend import UnicornBackend

    return UnicornBackend.from_spec(path, options, vm)


def _replay(path: str, options: str, vm: str) -> "Backend":
    if not path:
        raise BackendSpecError("replay: needs the path of a recording, as in replay:run.mcap")
    from vmibridge.recording.replay.load import LoadBackend, LoadOptions
    from vmibridge.vm.spec import parse_options

    given = parse_options(f"replay:{path}", options, LoadOptions, {})
    return LoadBackend(Path(path), given, vm)


def _qemu_plugin(where: str, options: str, vm: str) -> "Backend":
    from vmibridge.backends.qemu.plugin.backend import QemuPluginBackend, QemuPluginOptions
    from vmibridge.vm.spec import parse_options

    kind, _, path = where.partition(":")
    if kind != "unix" or not path:
        raise BackendSpecError(
            "qemu-plugin: needs the path of a socket, as in qemu-plugin:unix:/run/vmibridge.sock"
        )
    given = parse_options(f"qemu-plugin:{where}", options, QemuPluginOptions, {})
    return QemuPluginBackend(Path(path), given, vm)


def _qemu_gdb(where: str, options: str, vm: str) -> "Backend":
    from vmibridge.backends.qemu.gdb.backend import QemuGdbBackend

    return QemuGdbBackend.from_spec(where, options, vm)


def _ivshmem(where: str, options: str, vm: str) -> "Backend":
    from vmibridge.backends.device.ivshmem_backend import IvshmemBackend

    return IvshmemBackend.from_spec(where, options, vm)


def _remote(where: str, options: str, vm: str) -> "Backend":
    from vmibridge.transport import RemoteBackend

    return RemoteBackend(f"{where}?{options}" if options else where, vm=vm)


def _vfio_user(where: str, options: str, vm: str) -> "Backend":
    from vmibridge.backends.device.backend import DeviceBackend

    return DeviceBackend.from_spec(where, options, vm)


BACKENDS: Mapping[str, Callable[[str, str, str], "Backend"]] = MappingProxyType(
    {
        "ivshmem": _ivshmem,
        "qemu-gdb": _qemu_gdb,
        "qemu-plugin": _qemu_plugin,
        "remote": _remote,
        "replay": _replay,
        "unicorn": _unicorn,
        "vfio-user": _vfio_user,
    }
)
"""From a backend's name to what makes it, given path, options and the name of the VM."""


def _hint(spec: str, name: str) -> str:
    """What was meant, perhaps, by a spec that names no backend."""
    near = get_close_matches(name, BACKENDS, 1)
    try:
        if Path(spec.partition("?")[0]).is_file():
            kind = "replay" if spec.endswith(".mcap") else "unicorn"
            return f"did you mean {kind}:{spec}?"
    except (OSError, ValueError):
        pass  # no name that a file may have
    if near:
        return f"did you mean {near[0]}:...?"
    return f"specs are {', '.join(f'{known}:...' for known in sorted(BACKENDS))}"


def open_backend(spec: str, *, vm: str = "vm") -> "Backend":
    """The backend that `spec` names: `NAME:WHERE?OPTION=VALUE&...`.

    Enter it with `async with`. `vm` is the VM's name in events. Raises
    `BackendSpecError` for a spec that is wrong, `MissingExtraError` when the backend's
    library is not installed; whether the VM can be had shows when it is entered.
    """
    from vmibridge.vm.spec import check_text

    name, colon, rest = spec.partition(":")
    if not colon or name not in BACKENDS:
        raise BackendSpecError(f"no backend for {spec!r}: {_hint(spec, name)}")
    where, _, options = rest.partition("?")
    if not where.startswith(("nats:", "tls:")):  # whose options may be secret, and are not shown
        check_text(spec)
    return BACKENDS[name](where, options, vm)
