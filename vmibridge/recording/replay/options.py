"""What a replay is asked for, the settings that it runs with, and what came of it."""

from typing import Any, Literal, TypedDict

import msgspec

from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.access_policy import Policy, Quota, Rate
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording.replay.compare import Difference

__all__ = [
    "BEFORE",
    "LATER",
    "MISSING",
    "NO_REPLY",
    "TWICE",
    "ReplayOptions",
    "ReplayResult",
    "SettingChanges",
    "replay_settings",
]

_MUCH = 1e15
"""Requests or bytes: more than a recording has."""
NO_REPLY = "its reply is missing"
TWICE = "its trap is in the recording twice"
LATER = "it is of a later run of its VM, which had new handlers"
BEFORE = "it began before this file"
MISSING = frozenset({NO_REPLY, TWICE, LATER, BEFORE})
"""Why a request was not compared, where the recording is to blame."""


class ReplayOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a `replay:` spec."""

    speed: float = 0.0
    """1: as fast as it was; N: N times as fast; 0: without waiting."""
    order: Literal["recorded", "vcpu"] = "recorded"
    """What a trap waits for: all replies that the recording has before it, or those of its
    vCPU."""
    vm: str | None = None
    """Which VM of the recording; `None`: the first."""
    strict: bool = False
    """Whether another order of memory accesses, a read that is left out, and a call of
    `vmi.outside` that is not in the recording count."""
    outside: Literal["call", "refuse"] = "call"
    """What `vmi.outside` does where the recording has nothing for it: call the function, or raise
    `OutsideRefusedError`."""


class ReplayResult(msgspec.Struct):
    """What came of a replay, or has so far."""

    compared: int = 0
    """Requests of which both the recorded and the new answer are known."""
    different: int = 0
    first: Difference | None = None
    """The one whose request came first."""
    ignored: int = 0
    """Requests of which nothing differs but what rules ignore."""
    unchecked: dict[str, int] = {}
    """Requests that could not be compared, by the reason."""
    outside: dict[str, int] = {}
    """How often `vmi.outside` called a function, since it was not in the recording: by key, the
    first 100 of them."""


class SettingChanges(TypedDict, total=False):
    """The fields of `ServerSettings`; each may be left out."""

    timeout: float
    soft_timeout: float | None
    wait: BridgeResponse[Any]
    retry_values: tuple[int, ...]
    result_timeout: float
    fallback: BridgeResponse[Any]
    queue: int
    in_flight: int
    in_flight_total: int
    grace: float
    stop_timeout: float
    policy: Policy | None
    handshake: bool
    blocked_after: float


def replay_settings(recorded: ServerSettings) -> ServerSettings:
    """The settings of a server that replays what was recorded under these.

    Quotas are lifted: what they denied is not asked again, and time goes by faster.
    """
    policy = recorded.policy
    if policy is None:
        return recorded
    lifted = {name: _lifted(getattr(policy, name)) for name in ("vm", "address_space")}
    return msgspec.structs.replace(recorded, policy=msgspec.structs.replace(policy, **lifted))


def _lifted(quota: Quota) -> Quota:
    # One that there is stays one: a guest can ask whether there are any.
    rates = (quota.requests, quota.bytes)
    return Quota(*(None if rate is None else Rate(_MUCH, _MUCH) for rate in rates))
