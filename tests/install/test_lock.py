"""The locks are closed: what an installer takes from them leaves it nothing to choose.

So a lock installs the same on the day when a dependency of a dependency has a newer release.
"""

import tomllib
from importlib.metadata import version

import pytest
from lock import LOCKS, PYTHONS, ROOT, Pin, open_requirements, read_lock
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = {"requirements.lock": None, "requirements-demo.lock": {"demo"}}
"""The extras that a lock is for; None: all."""

locks = pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)


def declared() -> dict[str, list[Requirement]]:
    """The requirements of each extra, and under "" those of the core."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in own] for extra, own in lines.items()}


def roots(lock) -> list[Requirement]:
    """All that the project itself wants of the packages of a lock."""
    known = declared()
    wanted = EXTRAS[lock.name]
    todo, seen = ["", *(known if wanted is None else wanted)], set()
    found = []
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for required in known[extra]:
            if required.name == "vmibridge":
                todo.extend(required.extras)
            else:
                found.append(required)
    return found


@locks
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_of_every_locked_package_is_in_the_lock(lock, python):
    assert list(open_requirements(read_lock(lock), roots(lock), python)) == []


@locks
def test_every_entry_has_hashes_and_comes_once(lock):
    pins = read_lock(lock)
    assert pins
    assert [pin.name for pin in pins if not pin.hashes] == []
    assert len({pin.name for pin in pins}) == len(pins)


def test_what_is_installed_here_is_what_the_lock_names():
    pins = [pin for pin in read_lock(LOCKS[0]) if pin.is_for(default_environment())]
    assert {pin.name: version(pin.name) for pin in pins} == {pin.name: pin.version for pin in pins}


def test_the_demo_takes_the_versions_of_the_whole():
    whole = {pin.name: pin for pin in read_lock(LOCKS[0])}
    for pin in read_lock(LOCKS[1]):
        assert pin.version == whole[pin.name].version


def test_a_lock_without_one_of_its_packages_is_found_out():
    """The check itself: what another package needs is missed when its line goes."""
    pins = read_lock(LOCKS[1])
    wanted = roots(LOCKS[1])
    for gone in [pin for pin in pins if pin.is_for(default_environment())]:
        told = open_requirements([pin for pin in pins if pin is not gone], wanted, "3.11")
        assert any("is not in the lock" in line for line in told), gone.name


def test_an_extra_of_a_package_that_is_not_locked_is_found_out():
    """`coverage[toml]` was one: a resolver looks for it beside the `coverage` of a lock."""
    pins = [pin._replace(extras=frozenset()) for pin in read_lock(LOCKS[0])]
    told = list(open_requirements(pins, roots(LOCKS[0]), "3.11"))
    assert any("pytest-cov" in line and "without toml" in line for line in told)


def test_an_older_version_is_found_out():
    pins = [_older(pin) for pin in read_lock(LOCKS[0])]
    told = list(open_requirements(pins, roots(LOCKS[0]), "3.11"))
    assert any(line == "vmibridge: msgspec>=0.20: the lock has 0.1" for line in told)


def _older(pin: Pin) -> Pin:
    return pin._replace(version="0.1") if pin.name == canonicalize_name("msgspec") else pin
