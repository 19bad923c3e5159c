"""The request that a replay is played to, and which ones it has played already."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.recording.replay.request_result import RequestResult
from vmibridge.text import type_name

__all__ = ["Played", "Sought", "What"]

What: TypeAlias = int | Callable[[RequestResult], bool]
"""The number of a trap, or a function."""
_GROUP = 10
"""Bits of a number below those that name its group."""


class Sought(msgspec.Struct, frozen=True):
    """What has to be true of a request; `None` is true of each."""

    what: What | None
    vm: str | None
    vcpu: int | None
    handler: str | None
    request: int | None
    method: int | str | None

    @classmethod
    def of(
        cls,
        what: What | None,
        vm: str | None,
        vcpu: int | None,
        handler: str | type[BridgeHandler[Any]] | None,
        request: int | None,
        method: int | str | None,
    ) -> "Sought":
        """Raises `TypeError` and `ValueError` for what is true of no request."""
        if what is not None and not callable(what):
            _check("what", what, int, "the number of a trap or a function")
            if what < 1:
                raise ValueError(f"what: the number of a trap is 1 or more, not {what}")
        _check("vm", vm, str, "a name")
        _check("vcpu", vcpu, int, "a number")
        _check("request", request, int, "a code")
        _check("method", method, int | str, "a code or a name")
        if isinstance(handler, type) and issubclass(handler, BridgeHandler):
            handler = handler.name
        _check("handler", handler, str, "a class of handlers or a name")
        return cls(what, vm, vcpu, handler, request, method)

    def of_one(self, vms: list[str]) -> "Sought":
        """The same of the one VM whose trap is meant. Raises `ValueError` where it may be another:
        each VM has numbers of its own."""
        if self.vm is not None or not vms:
            return self
        if len(vms) > 1:
            raise ValueError(
                f"trap {self.what}: each VM has one; say which by vm=, of {', '.join(vms)}"
            )
        return msgspec.structs.replace(self, vm=vms[0])

    def is_in(self, result: RequestResult) -> bool:
        """Whether this is the one. Raises what the function raises."""
        packet = result.packet
        return (
            self.vm in (None, result.vm)
            and self.vcpu in (None, result.vcpu)
            and self.handler in (None, result.handler)
            and (self.request is None or (packet is not None and packet.request == self.request))
            and (
                self.method in (None, result.method)
                or (packet is not None and packet.method == self.method)
            )
            and self._is_what(result)
        )

    def _is_what(self, result: RequestResult) -> bool:
        if callable(self.what):
            return bool(self.what(result))
        return self.what is None or self.what == result.seq or self.what in result.retries

    def __str__(self) -> str:
        """As in `trap 9, handler 'probe'`."""
        what = "one as the function says" if callable(self.what) else f"trap {self.what}"
        given = {name: getattr(self, name) for name in self.__struct_fields__[1:]}
        parts = [f"{name} {value!r}" for name, value in given.items() if value is not None]
        return ", ".join(parts if self.what is None else [what, *parts]) or "any"


class Played:
    """The numbers of traps of VMs, such as those whose requests are done; a bit each."""

    def __init__(self) -> None:
        self._groups: defaultdict[tuple[str, int], int] = defaultdict(int)

    def add(self, result: RequestResult) -> None:
        """A request is done, and so are its retries."""
        for seq in (result.seq, *result.retries):
            self.add_trap(result.vm, seq)

    def add_trap(self, vm: str, seq: int) -> None:
        """The number of one trap."""
        self._groups[vm, seq >> _GROUP] |= _bit(seq)

    def has(self, seq: int, vm: str | None) -> bool:
        """Whether it is one of this VM."""
        return bool(self._groups.get((vm or "", seq >> _GROUP), 0) & _bit(seq))

    def bits(self) -> dict[str, str]:
        """All of them, to be compared elsewhere: hex digits, by what two have in common where they
        have the same numbers."""
        return {f"{group} {vm}": f"{bits:x}" for (vm, group), bits in self._groups.items()}


def _bit(seq: int) -> int:
    return 1 << (seq & ((1 << _GROUP) - 1))


def _check(name: str, value: object, kinds: Any, meaning: str) -> None:
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        raise TypeError(f"{name} is {meaning}, not {type_name(value)}")
