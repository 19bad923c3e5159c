"""A lock, read: what each line pins, and what of the packages' own requirements it leaves open."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import NamedTuple

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = (ROOT / "requirements.lock", ROOT / "requirements-demo.lock")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
"""Those that `pyproject.toml` says are supported."""
_ENTRY = re.compile(r"^(?P<requirement>[^ #][^\\\n]*?) *\\?$")
_HASH = re.compile(r"^ {4}--hash=sha256:[0-9a-f]{64}(?: \\)?$")


class Pin(NamedTuple):
    """One entry of a lock."""

    name: str
    version: str
    extras: frozenset[str]
    marker: Marker | None
    hashes: int

    def is_for(self, environment: dict[str, str]) -> bool:
        return self.marker is None or self.marker.evaluate(environment)


def read_lock(file: Path) -> list[Pin]:
    """All entries, in order. A line that is neither an entry nor a hash is an error."""
    found: list[Pin] = []
    for line in file.read_text().splitlines():
        if _HASH.match(line):
            found[-1] = found[-1]._replace(hashes=found[-1].hashes + 1)
            continue
        entry = _ENTRY.match(line)
        assert entry, f"{file.name}: {line!r} is neither a package nor a hash"
        required = Requirement(entry["requirement"])
        (specifier,) = required.specifier
        assert specifier.operator == "==", f"{file.name}: {line!r} pins no version"
        found.append(
            Pin(
                canonicalize_name(required.name),
                specifier.version,
                frozenset(map(canonicalize_name, required.extras)),
                required.marker,
                0,
            )
        )
    return found


def environment_of(python: str) -> dict[str, str]:
    """What markers are evaluated in: this machine, with another Python."""
    return {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
    }


@cache
def _requirements_of(package: str) -> tuple[Requirement, ...]:
    """All that a package says, as it is installed here."""
    return tuple(map(Requirement, Distribution.from_name(package).requires or ()))


def _holds(required: Requirement, extras: Iterable[str], environment: dict[str, str]) -> bool:
    """Whether a package with these extras has this requirement there."""
    return required.marker is None or any(
        required.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
    )


def open_requirements(
    pins: Iterable[Pin], roots: Iterable[Requirement], python: str
) -> Iterator[str]:
    """What an installer would still have to choose, with each requirement of each package.

    Packages are read as they are installed here. One that the lock has for another Python or
    another system only is not installed, and has nothing to read: its own line is all.
    """
    environment = environment_of(python)
    here = {pin.name: pin for pin in pins if pin.is_for(environment)}
    for required in roots:
        yield from _open(f"vmibridge: {required}", required, here)
    for pin in here.values():
        if not pin.is_for(default_environment()):
            continue
        for required in _requirements_of(pin.name):
            if _holds(required, pin.extras, environment):
                yield from _open(f"{pin.name} {pin.version}: {required}", required, here)


def _open(asker: str, required: Requirement, here: dict[str, Pin]) -> Iterator[str]:
    pin = here.get(canonicalize_name(required.name))
    if pin is None:
        yield f"{asker}: is not in the lock"
    elif not required.specifier.contains(pin.version, prereleases=True):
        yield f"{asker}: the lock has {pin.version}"
    elif missing := set(map(canonicalize_name, required.extras)) - pin.extras:
        yield f"{asker}: the lock has it without {', '.join(sorted(missing))}"
