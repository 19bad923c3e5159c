"""The options that say which traps of a recording a command is about; the same for each.

Without the extra `recording` there is their help only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from vmibridge.recording.selection import Selection

_GROUP = Group("Which traps", help="What is given twice is an or; different options are an and.")


@Parameter(name="*", group=_GROUP, show_default=False)
@dataclass(frozen=True)
class RequestOptions:
    """As given: all but those that say of which VM a trap is."""

    request: Annotated[
        list[str],
        Parameter(negative=(), help="Of this request (0x0100 or 256), or taken by this handler."),
    ] = field(default_factory=list)
    method: Annotated[
        list[str], Parameter(negative=(), help="Of this method (0x0001 or 1, or its name).")
    ] = field(default_factory=list)
    outcome: Annotated[
        list[str],
        Parameter(negative=(), help="That ended so: handled, failed, ...; none: without a reply."),
    ] = field(default_factory=list)
    vcpu: Annotated[list[int], Parameter(negative=(), help="Of this vCPU.")] = field(
        default_factory=list
    )
    since: Annotated[
        str | None,
        Parameter(help="Taken then or later: seconds since the first trap, or ISO 8601."),
    ] = None
    until: Annotated[str | None, Parameter(help="Taken then or earlier.")] = None

    def selection_of(
        self, vms: Sequence[str], first: int | None = None, last: int | None = None
    ) -> "Selection":
        """Of these VMs; `first` and `last` trap of each. Raises `ConfigError` if a value is out of
        range, `MissingExtraError`."""
        from vmibridge.recording.selection import Selection

        return Selection.parse(
            requests=self.request,
            methods=self.method,
            outcomes=self.outcome,
            vcpus=self.vcpu,
            vms=vms,
            since=self.since,
            until=self.until,
            first=first,
            last=last,
        )


@Parameter(name="*", group=_GROUP, show_default=False)
@dataclass(frozen=True)
class SelectionOptions(RequestOptions):
    """As given."""

    vm: Annotated[list[str], Parameter(negative=(), help="Of this VM.")] = field(
        default_factory=list
    )

    def selection(self) -> "Selection":
        """Raises `ConfigError` if a value is out of range, `MissingExtraError`."""
        return self.selection_of(self.vm)
