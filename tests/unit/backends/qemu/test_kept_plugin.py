"""The plugin that is kept for a user: built once, and checked before QEMU runs it."""

import os
from pathlib import Path

import pytest
from needs import needs

from vmibridge.backends.qemu.plugin import build
from vmibridge.backends.qemu.plugin.build import kept_plugin
from vmibridge.errors import BackendError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where a plugin is kept. What compiles it is not asked: it takes seconds."""
    needs("cc")

    def compiled(command):
        target = Path(command[command.index("-o") + 1])
        target.write_bytes(b"made of these")
        target.chmod(0o755)

    monkeypatch.setattr(build, "_compile", compiled)
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch):
    """How often it was built."""
    builds = []
    build_plugin = build.build_plugin

    def counted(target, compiler=None):
        builds.append(target)
        return build_plugin(target, compiler)

    monkeypatch.setattr(build, "build_plugin", counted)
    return builds


def files(cache):
    return sorted(cache.iterdir())


def test_it_is_built_once(cache, built):
    told = []
    path = kept_plugin(cache, told.append)
    assert kept_plugin(cache, told.append) == path
    assert (len(built), told, files(cache)) == (1, [], [path])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
    ids=["cut", "empty", "longer"],
)
def test_what_is_not_what_was_built_is_built_again_and_told(cache, built, damage):
    told = []
    path = kept_plugin(cache, told.append)
    content = path.read_bytes()
    damage(path)
    assert kept_plugin(cache, told.append).read_bytes() == content
    assert told == [f"{path}: is not what was built: it is built again"]
    assert len(built) == 2
    kept_plugin(cache, told.append)
    assert (len(built), len(told), len(files(cache))) == (2, 1, 1)


def test_another_file_under_its_name_is_not_loaded(cache, built, tmp_path):
    told = []
    path = kept_plugin(cache, told.append)
    other = tmp_path / "other.so"
    other.write_bytes(b"another one")
    path.unlink()
    path.symlink_to(other)
    assert kept_plugin(cache, told.append).read_bytes() != b"another one"
    assert told == [f"{path}: others than this user may have written it: it is built again"]
    assert other.read_bytes() == b"another one"


def test_one_that_others_may_write_is_built_again(cache, built):
    told = []
    path = kept_plugin(cache, told.append)
    path.chmod(0o777)
    again = kept_plugin(cache, told.append)
    assert again.stat().st_mode & 0o022 == 0
    assert len(built) == len(told) + 1 == 2


@pytest.mark.parametrize("what", ["sources", "options"])
def test_other_sources_or_options_make_another_one(cache, built, monkeypatch, tmp_path, what):
    told = []
    path = kept_plugin(cache, told.append)
    if what == "sources":
        added = tmp_path / "added.h"
        added.write_text("/* more */")
        monkeypatch.setattr(build, "SOURCES", (*build.SOURCES, added))
    else:
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O1"))
    assert kept_plugin(cache, told.append) != path
    assert (len(built), told, len(files(cache))) == (2, [], 2)


def test_one_that_is_right_needs_no_compiler(cache, monkeypatch):
    path = kept_plugin(cache, print)
    monkeypatch.setenv("PATH", os.devnull)
    assert kept_plugin(cache, print) == path
    path.write_bytes(b"")
    with pytest.raises(BackendError, match="there is no C compiler"):
        kept_plugin(cache, print)


def test_a_cache_that_cannot_be_is_told(cache):
    cache.write_text("a file")
    with pytest.raises(BackendError, match="cannot be written: File exists"):
        kept_plugin(cache, print)
