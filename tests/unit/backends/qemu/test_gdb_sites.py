"""Sites of the gdbstub backend: addresses, and symbols of ELF files; and the options of specs."""

import sys

import msgspec
import pytest
from children import run
from needs import needs

from vmibridge.backends import open_backend
from vmibridge.backends.qemu.gdb.options import parse_spec
from vmibridge.backends.qemu.gdb.sites import sites_of
from vmibridge.errors import BackendSpecError, MissingExtraError
from vmibridge.vm.spec import parse_options, read_options

SOURCE = """
.globl _start, call_host, other, prefixed, nowhere
.set nowhere, 0x10
_start: nop
call_host: vmcall
prefixed: .byte 0x66; cpuid
other: ret
.section .data
.globl data
data: .byte 0x0f, 0x01, 0xd9
"""


@pytest.fixture(scope="module")
def elves(tmp_path_factory):
    """The same program, for two processors, and as one that is loaded anywhere."""
    folder = tmp_path_factory.mktemp("elf")
    (folder / "a.s").write_text(SOURCE)
    ways = {
        "wide": ["-m64", "-static"],
        "narrow": ["-m32", "-static"],
        "anywhere": ["-m64", "-static-pie"],
    }
    for name, options in ways.items():
        command = [needs("gcc"), "-nostdlib", "-Wl,--build-id=none", *options, "a.s", "-o", name]
        run(command, cwd=folder, check=True)
    return folder


def address_of(path, name):
    told = run([needs("nm"), path], check=True).stdout
    return next(int(line.split()[0], 16) for line in told.splitlines() if line.endswith(f" {name}"))


def test_addresses_stand_for_themselves_each_once():
    assert sites_of("spec", [0x401136, 5, 0x401136], None, []) == [0x401136, 5]


@pytest.mark.parametrize("kind", ["wide", "narrow"])
def test_symbols_of_an_elf_file_are_found(elves, kind):
    path = elves / kind
    names = ["call_host", "prefixed", "data"]
    found = [address_of(path, name) for name in names]
    assert sites_of("spec", [], path, names) == found
    # An address that the file does not have may be of something else.
    assert sites_of("spec", [found[0], 0x10], path, names[1:]) == [found[0], 0x10, *found[1:]]


@pytest.mark.parametrize(
    ("kind", "symbols", "why"),
    [
        ("wide", ["other"], "c3 at other .* is not CPUID, VMCALL or VMMCALL"),
        ("wide", ["missing"], "symbol=missing: the ELF file has no such symbol"),
        ("wide", ["nowhere"], "symbol=nowhere: .* has no code there"),
        ("anywhere", ["call_host"], "loaded at another address each time"),
        ("a.s", ["call_host"], "is not an ELF file"),
        ("none", ["call_host"], "No such file"),
    ],
)
def test_a_symbol_that_is_no_site_is_told(elves, kind, symbols, why):
    with pytest.raises(BackendSpecError, match=why):
        sites_of("spec", [], elves / kind, symbols)


def test_an_address_that_the_file_has_is_checked(elves):
    start = address_of(elves / "wide", "_start")
    with pytest.raises(BackendSpecError, match=r"90 0f 01 at 0x[0-9a-f]+ of .* is not CPUID"):
        sites_of("spec", [start], elves / "wide", [])


def test_a_file_for_another_processor(elves, tmp_path):
    other = bytearray((elves / "wide").read_bytes())
    other[18] = 183  # EM_AARCH64
    (tmp_path / "arm").write_bytes(other)
    with pytest.raises(BackendSpecError, match="is not for x86"):
        sites_of("spec", [], tmp_path / "arm", ["call_host"])


@pytest.mark.parametrize("size", [0, 4, 40, 100, 300])
def test_a_file_that_was_cut_short(elves, tmp_path, size):
    (tmp_path / "short").write_bytes((elves / "wide").read_bytes()[:size])
    with pytest.raises(BackendSpecError):
        sites_of("spec", [], tmp_path / "short", ["call_host"])


def test_without_pyelftools_the_extra_is_named(elves, monkeypatch):
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(MissingExtraError, match="gdb"):
        sites_of("spec", [], elves / "wide", ["call_host"])
    assert sites_of("spec", [1], None, []) == [1]


def test_the_options_of_a_spec(elves):
    path = elves / "wide"
    given, sites = parse_spec(
        "unix:/run/s",
        f"site=0x10&elf={path}&symbol=data&site=32&symbol=prefixed&ud-handler=0x20"
        "&breakpoints=hardware",
    )
    assert sites == [0x10, 32, address_of(path, "data"), address_of(path, "prefixed")]
    assert (given.ud_handler, given.breakpoints) == (0x20, "hardware")
    assert parse_spec("tcp:localhost:1234", "ud-handler=1")[1] == []


def test_a_file_of_sites_has_an_address_a_line(tmp_path):
    path = tmp_path / "sites"
    path.write_text("# of two programs\n0x40104a vmmcall calls\n\n  32  # decimal\n0x10\n")
    assert parse_spec("unix:/run/s", f"site=0x10&sites={path}")[1] == [0x10, 0x40104A, 32]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0x10\n\nmain\n", "sites:3: 'main' is not an address"),
        ("-1\n", "sites:1: '-1' is not an address"),
        ("0x10000000000000000\n", "sites:1: '0x10000000000000000' is not an address"),
        ("# none\n", "sites: has no address"),
        ("0x10\n" * 300_000, "sites: is larger than 1 MiB"),
        (None, "sites: No such file or directory"),
    ],
)
def test_a_file_of_sites_that_is_wrong(tmp_path, text, why):
    if text is not None:
        (tmp_path / "sites").write_text(text)
    with pytest.raises(BackendSpecError, match=why):
        open_backend(f"qemu-gdb:unix:/s?sites={tmp_path}/sites")


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ("", "needs a socket"),
        ("unix:?site=1", "needs a socket"),
        ("tcp:1234?site=1", "needs a socket"),
        ("tcp:localhost:x?site=1", "needs a socket"),
        ("unix:/s", "needs a site"),
        ("unix:/s?site=x", "site=x is not an address"),
        ("unix:/s?site=-1", "is not an address"),
        ("unix:/s?ud-handler=-1", "is not an address"),
        ("unix:/s?ud-handler=1&ud-handler=2", "ud-handler is given twice"),
        ("unix:/s?symbol=a", "symbol=a needs elf=PATH"),
        ("unix:/s?site=1&breakpoints=soft", "breakpoints"),
        ("unix:/s?site=1&within=-1", "within=-1 is not a duration of 0 to 3600 s"),
        ("unix:/s?what=1", "no option 'what'; there are site, symbol, elf, ud-handler"),
    ],
)
def test_a_wrong_spec(rest, why):
    with pytest.raises(BackendSpecError, match=why):
        open_backend(f"qemu-gdb:{rest}")


class Options(msgspec.Struct, forbid_unknown_fields=True):
    name: tuple[str, ...] = ()
    size: tuple[int, ...] = ()
    one: str = ""


def test_an_option_that_is_a_list_may_be_given_again():
    numbers, lists = {"size": "a size"}, ("name", "size")
    given = parse_options("s", "name=a&size=1KiB&one=x&name=b&size=2", Options, numbers, lists)
    assert given == Options(("a", "b"), (1024, 2), "x")
    with pytest.raises(BackendSpecError, match="size=x is not a size"):
        parse_options("s", "size=1&size=x", Options, numbers, lists)
    with pytest.raises(BackendSpecError, match="one is given twice"):
        parse_options("s", "one=1&one=2", Options, numbers, lists)


def test_options_as_text_are_checked_in_their_order_and_secrets_are_not_shown():
    known = ("user", "token")
    assert list(read_options("s", "token=a%3D&user=", known)) == [("token", "a="), ("user", "")]
    assert list(read_options("s", "", known)) == []
    with pytest.raises(BackendSpecError, match="s: 'token' is not OPTION=VALUE&OPTION=VALUE"):
        list(read_options("s", "token", known))
    with pytest.raises(BackendSpecError, match=r"^s: options are OPTION=VALUE&OPTION=VALUE$"):
        list(read_options("s", "s3cret", known, secret=True))
    with pytest.raises(BackendSpecError, match="s: no option 'usr'; there are user, token"):
        list(read_options("s", "usr=web", known))
