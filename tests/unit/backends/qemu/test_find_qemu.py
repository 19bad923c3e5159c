"""Which QEMU is taken, and what is said of one that does not do."""

from pathlib import Path

import pytest

from vmibridge.backends.qemu.find import (
    GDB_NEEDS,
    PLUGIN_NEEDS,
    accelerators,
    cache_folder,
    find_qemu,
    memory_size,
)
from vmibridge.errors import BackendError

NAME = "qemu-system-x86_64"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """`place(FOLDER, VERSION)` puts a program there that says that version."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VMIBRIDGE_QEMU", raising=False)

    def put(folder, version):
        path = tmp_path / folder / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{version}'\n")
        path.chmod(0o700)
        return str(path)

    return put


def test_the_first_that_is_new_enough_is_taken(place, monkeypatch):
    system = place("bin", "QEMU emulator version 11.2.50 (v11.2.0)")
    assert find_qemu(None, PLUGIN_NEEDS).path == system
    fetched = place("cache/vmibridge/qemu", "QEMU emulator version 11.1.3 (Debian 1:11.1.3)")
    assert find_qemu(None, PLUGIN_NEEDS).path == fetched
    named = place("other", "QEMU emulator version 11.1.3 (Debian 1:11.1.3)")
    found = find_qemu(named, PLUGIN_NEEDS)
    assert (found.path, found.version) == (named, (11, 1))
    monkeypatch.setenv("VMIBRIDGE_QEMU", system)
    assert find_qemu(None, PLUGIN_NEEDS).path == system


def test_the_current_folder_is_not_searched(place, tmp_path, monkeypatch):
    """It may be anybody's: a program there would run as the user."""
    place(".qemu", "QEMU emulator version 99.9.9")
    monkeypatch.chdir(tmp_path)
    system = place("bin", "QEMU emulator version 11.2.50 (v11.2.0)")
    assert find_qemu(None, PLUGIN_NEEDS).path == system


def test_an_old_one_does_for_gdb_alone(place):
    old = place("bin", "QEMU emulator version 7.2.22 (Debian 1:7.2)")
    assert find_qemu(None, GDB_NEEDS).path == old
    told = f"no QEMU of 11.1 or later ({NAME} is 7.2): `vmibridge qemu fetch` brings one"
    with pytest.raises(BackendError) as raised:
        find_qemu(None, PLUGIN_NEEDS, "this works with older ones")
    assert str(raised.value).startswith(told)
    hints = "; --qemu PATH names another; this works with older ones"
    assert str(raised.value).endswith(hints)
    with pytest.raises(BackendError, match=r"brings one to a Debian$"):
        find_qemu(old, PLUGIN_NEEDS)


def test_what_is_none_is_told(place):
    with pytest.raises(BackendError, match=rf"no QEMU of 7.2 or later \(no {NAME} at all\)"):
        find_qemu(None, GDB_NEEDS)
    with pytest.raises(BackendError, match=r"^/none: there is no such program$"):
        find_qemu("/none", GDB_NEEDS)
    other = place("bin", "hello")
    with pytest.raises(BackendError, match="says no version"):
        find_qemu(other, GDB_NEEDS)


def test_the_cache_is_in_the_home_folder_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for not_absolute in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", not_absolute)
        assert cache_folder() == tmp_path / ".cache/vmibridge"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/user")
    assert cache_folder() == Path("/var/cache/user/vmibridge")


def test_without_a_home_folder_there_is_no_cache(place, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() is None
    system = place("bin", "QEMU emulator version 11.2.50 (v11.2.0)")
    assert find_qemu(None, PLUGIN_NEEDS).path == system


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("-m 512 -kernel kvm", []),
        ("-accel tcg,thread=multi", ["tcg"]),
        ("-enable-kvm", ["kvm"]),
        ("--enable-kvm", ["kvm"]),
        ("-accel kvm", ["kvm"]),
        ("-accel accel=kvm,dirty-ring-size=1", ["kvm"]),
        ("-M q35,accel=kvm:tcg", ["kvm", "tcg"]),
        ("-machine accel=tcg,type=pc", ["tcg"]),
        ("-accel tcg -accel kvm", ["tcg", "kvm"]),
    ],
)
def test_the_accelerators_that_arguments_ask_for(arguments, found):
    assert accelerators(arguments.split()) == found


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ("", 128 << 20),
        ("-m 32", 32 << 20),
        ("-m 2G", 2 << 30),
        ("-m 1024k", 1 << 20),
        ("-m size=1g,slots=2,maxmem=4G", 1 << 30),
        ("--m 64M -m 32M", 32 << 20),
        ("-m 1.5G", 3 << 29),
        ("-m 0.5k", 8 << 10),
        ("-m 1.5", 3 << 19),
    ],
)
def test_the_memory_that_arguments_ask_for(arguments, size):
    assert memory_size(arguments.split()) == size


@pytest.mark.parametrize(
    "given", ["much", "0", "-1", "1.5b", "0.0G", "1.", "9" * 5000, "\u0663", ""]
)
def test_a_size_that_is_none(given):
    with pytest.raises(BackendError, match="is not a memory size"):
        memory_size(["-m", given])
