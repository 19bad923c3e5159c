"""Every error that vmibridge raises for its callers.

All derive from `VmiBridgeError`, so one `except` takes them; each keeps its root
cause in `__cause__`. What a guest does never surfaces as an error of the server:
it ends in an `Outcome`.
"""

import sys
from operator import index
from types import MappingProxyType

__all__ = [
    "BackendError",
    "BackendSpecError",
    "ConfigError",
    "ConnectionLostError",
    "Failed",
    "GuestMemoryError",
    "GuestPageFaultError",
    "HandlerLifeError",
    "HandlerLoadError",
    "HandlerSourceError",
    "MissingExtraError",
    "NatsRefusedError",
    "NotReplayedError",
    "OutsideError",
    "OutsideRefusedError",
    "QmpError",
    "RecordingError",
    "RecordingReadError",
    "RefusedByServerError",
    "RefusedError",
    "ServerStateError",
    "TrapQueueClosedError",
    "UnknownArchitectureError",
    "UnsupportedTrapError",
    "VmiBridgeError",
    "WireError",
]


class VmiBridgeError(Exception):
    """Base of the errors that vmibridge raises."""


class GuestMemoryError(VmiBridgeError):
    """Guest memory could not be read or written.

    `address` is the first address in question, in the space that the caller used
    (virtual or physical); `reason` says why, in words.
    """

    def __init__(self, address: int, reason: str) -> None:
        super().__init__(f"guest memory at {address:#x}: {reason}")
        self.address = address
        self.reason = reason


class OutsideError(VmiBridgeError):
    """`vmi.outside` did not get what a handler wants.

    `key` is that of the call. `types` are the names of what the function raised and of the classes
    that it derives from, such as `httpx.ConnectError`; `text` is what it said. A replay raises the
    same, without a cause. The function of a handler that cares should return its failures.
    """

    def __init__(self, key: str, types: tuple[str, ...], text: str) -> None:
        kind = types[0] if types else "Exception"
        super().__init__(f"outside {key!a}: {kind}: {text}")
        self.key = key
        self.types = types
        self.text = text

    def is_a(self, *names: str) -> bool:
        """Whether the function raised one of these, by the name with the module; built-in
        exceptions are named without one."""
        return any(name in self.types for name in names)


class OutsideRefusedError(OutsideError):
    """A replay that must not call a function has nothing recorded for it."""

    def __init__(self, key: str) -> None:
        what = "it is not in the recording, and is not called"
        super().__init__(key, ("vmibridge.errors.OutsideRefusedError",), what)
        self.args = (f"outside {key!a}: {what}",)


class GuestPageFaultError(GuestMemoryError):
    """The guest itself would get a page fault there, which its kernel may mend.

    The page is not present, or it is read-only until it is written for the first time. The guest
    mends it by touching the address.
    """


class Failed(VmiBridgeError):  # noqa: N818 - what a method says: raise Failed(...)
    """Raised by a typed method: the guest gets the status *failed*, and nothing else happens.

    `code` has 8 bits and is the method's own. `native` has 32 bits, as an errno, an HRESULT or an
    NTSTATUS; an x86 guest does not see it. Raises `ValueError` for one out of range, `TypeError`
    for one that is not a whole number.
    """

    def __init__(self, code: int = 0, *, native: int = 0) -> None:
        try:
            code, native = index(code), index(native)
        except TypeError:
            told = f"code and native are whole numbers, got {code!r} and {native!r}"
            raise TypeError(told) from None
        if code >> 8 or native >> 32:
            raise ValueError(f"code has 8 bits and native 32, got {code!r} and {native!r}")
        super().__init__(f"code {code:#x}, native {native:#x}")
        self.code: int = code
        self.native: int = native


class UnsupportedTrapError(VmiBridgeError):
    """A trap that has no register form, such as one of a 16-bit guest."""


class UnknownArchitectureError(VmiBridgeError):
    """An architecture, or a version of one, that this vmibridge does not know.

    A peer that names one is refused, and a file is not read, with this message.
    """


class BackendError(VmiBridgeError):
    """A backend could not start, or lost its VM."""


class BackendSpecError(BackendError, ValueError):
    """A backend spec that names no backend, or an option that it does not take."""


class QmpError(BackendError):
    """QEMU's monitor refused a command, answered nonsense, or is gone."""


EXTRAS = MappingProxyType(
    {
        "cli": ("cyclopts", "rich"),
        "exec_gate": ("httpcore",),
        "fetch": ("httpcore",),
        "gdb": ("pyelftools",),
        "kv": ("apsw",),
        "nats": ("nats-py", "nkeys"),
        "parquet": ("pyarrow",),
        "perfetto": ("perfetto",),
        "recording": ("lz4", "mcap", "zstandard"),
        "trio": ("trio",),
        "unicorn": ("unicorn",),
        "uvloop": ("uvloop",),
    }
)
"""From an extra of vmibridge to the packages that it brings, as an index names them."""


class MissingExtraError(VmiBridgeError, ImportError):
    """An optional dependency that the caller asked for is not installed.

    `what` needs it; `extra` is the extra of vmibridge that brings it; `packages` are those that
    are missing, as an index names them. The message names no installer: pip, pipx, uv, a system's
    own packages and images each have their way.
    """

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        self.packages: tuple[str, ...] = _missing(EXTRAS[extra])
        *first, last = self.packages
        names = f"{', '.join(first)} and {last}" if first else last
        one = not first
        super().__init__(
            f"{what} needs the package{'' if one else 's'} {names}, which"
            f" the extra {extra!r} of vmibridge brings: add {'it' if one else 'them'} to the"
            f" environment of {sys.executable or 'this Python'}"
        )


def _missing(packages: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are not installed; all of them where each seems to be, and one is broken."""
    found = [name for name in packages if not _is_installed(name)]
    return tuple(found) or packages


def _is_installed(package: str) -> bool:
    # Not at the top: it takes a quarter of the time of `import vmibridge`.
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


class TrapQueueClosedError(VmiBridgeError):
    """The server takes no more traps: the vCPU is to run on by itself."""


class ServerStateError(VmiBridgeError):
    """A server or backend was used before it was entered, or twice."""


class HandlerLoadError(VmiBridgeError):
    """A handler source could not be loaded; the message names file and line."""


class HandlerLifeError(VmiBridgeError):
    """A handler could not be entered before the guest ran, or left after it."""


class HandlerSourceError(HandlerLoadError):
    """There is no such handler source, or it offers no handler."""


class RecordingError(VmiBridgeError):
    """A recording could not be written."""


class RecordingReadError(RecordingError):
    """A file is not a recording, or cannot be read at all."""


class NotReplayedError(VmiBridgeError):
    """A replay could not be made, so that nothing was compared."""


class ConfigError(VmiBridgeError):
    """A configuration file is wrong; the message names the key and the place."""


class ConnectionLostError(VmiBridgeError):
    """The connection to a peer has ended: it closed it, was silent, or TLS failed.

    Raised by what receives on the connection. An agent catches it and connects again, so
    callers of `Agent.run` do not see it.
    """


class WireError(VmiBridgeError):
    """A peer sent what the protocol does not allow: bytes that are no frame, a frame in the wrong
    place, or one that exceeds a limit.

    The connection it came over is of no further use and is closed.
    """


class RefusedError(VmiBridgeError):
    """A server does not serve an agent; raised in the server, and sent to the agent as REFUSED.

    The message is the reason that the agent gets. `final` says that a later attempt would be
    refused as well.
    """

    def __init__(self, why: str, *, final: bool = True) -> None:
        super().__init__(why)
        self.final = final


class RefusedByServerError(VmiBridgeError):
    """A server has refused this agent; raised in the agent when REFUSED comes instead of WELCOME.

    When `final`, and no server has served the agent before, `Agent.run` ends with a
    `BackendError` that has this as its cause; otherwise the agent tries again.
    """

    def __init__(self, why: str, *, final: bool) -> None:
        super().__init__(why)
        self.final = final


class NatsRefusedError(VmiBridgeError):
    """NATS does not accept this end: its credentials, its certificate, or a subject it needs.

    Raised when connecting. To connect again with the same credentials is of no use.
    """
