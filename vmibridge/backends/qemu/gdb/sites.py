"""Where the trap instructions are: addresses, those of a file of sites, and symbols of an ELF file.

Needs the extra `gdb` for ELF files only.
"""

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vmibridge.errors import BackendSpecError, MissingExtraError
from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap
from vmibridge.vm.spec import parse_size

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

_MAX_SYMBOLS = 4_000_000
_MAX_LISTED = 1 << 20
"""Bytes of a file of sites."""


def sites_of(spec: str, addresses: list[int], elf: Path | None, symbols: list[str]) -> list[int]:
    """The addresses of all sites, in order, each once.

    `symbols` are names in `elf`. Where `elf` has an address, it has to
    have a CPUID, VMCALL or VMMCALL there. Raises `BackendSpecError` for what is wrong,
    `MissingExtraError` for an ELF file without pyelftools.
    """
    for address in addresses:
        if not 0 <= address < 1 << 64:
            raise BackendSpecError(f"{spec}: site={address:#x} is not an address")
    if elf is None:
        if symbols:
            raise BackendSpecError(f"{spec}: symbol={symbols[0]} needs elf=PATH")
        return list(dict.fromkeys(addresses))
    try:
        with elf.open("rb") as file:
            found = _sites_in(spec, file, elf, addresses, symbols)
    except OSError as error:
        raise BackendSpecError(f"{spec}: elf={elf}: {error.strerror}") from error
    return list(dict.fromkeys(found))


def listed_sites(spec: str, path: Path) -> list[int]:
    """The addresses in a file of sites: the first word of each line; `#` begins a comment.

    Raises `BackendSpecError` for a line without an address, and for a file that has none.
    """
    where = f"{spec}: sites={path}"
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LISTED + 1)
    except OSError as error:
        raise BackendSpecError(f"{where}: {error.strerror}") from error
    if len(data) > _MAX_LISTED:
        raise BackendSpecError(f"{where}: is larger than {_MAX_LISTED >> 20} MiB")
    found: list[int] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        word = line.partition("#")[0].split()[:1]
        if not word:
            continue
        try:
            address = parse_size(word[0])
        except ValueError:
            address = -1
        if not 0 <= address < 1 << 64:
            raise BackendSpecError(f"{where}:{number}: {word[0][:40]!r} is not an address")
        found.append(address)
    if not found:
        raise BackendSpecError(f"{where}: has no address")
    return found


def _sites_in(
    spec: str, file: BinaryIO, path: Path, addresses: list[int], symbols: list[str]
) -> list[int]:
    try:
        from elftools.common.exceptions import ELFError
        from elftools.construct import ConstructError
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise MissingExtraError("elf= of the qemu-gdb backend", "gdb") from error
    try:
        elf = ELFFile(file)
        if elf["e_machine"] not in ("EM_X86_64", "EM_386"):
            raise BackendSpecError(f"{spec}: elf={path} is not for x86")
        if symbols and elf["e_type"] == "ET_DYN":
            raise BackendSpecError(
                f"{spec}: elf={path} is loaded at another address each time: name the site by"
                " its address"
            )
        named = [(symbol, _address_of(spec, elf, symbol)) for symbol in symbols]
        for name, address in [*((f"{at:#x}", at) for at in addresses), *named]:
            code = _code_at(elf, address)
            # An address that the file does not have may be of something else.
            if code is None and name in symbols:
                raise BackendSpecError(f"{spec}: symbol={name}: elf={path} has no code there")
            if code is not None and decode_trap(code, elf.elfclass) is None:
                raise BackendSpecError(
                    f"{spec}: {code[:3].hex(' ')} at {name} of {path} is not CPUID, VMCALL or"
                    " VMMCALL"
                )
    except (ELFError, ConstructError, ValueError, KeyError, AttributeError) as error:
        # Its parser raises whatever a broken file makes it stumble over.
        if isinstance(error, BackendSpecError):
            raise
        raise BackendSpecError(f"{spec}: elf={path} is not an ELF file: {error}") from error
    return [*addresses, *(address for _, address in named)]


def _address_of(spec: str, elf: "ELFFile", symbol: str) -> int:
    from elftools.elf.sections import SymbolTableSection

    found = set()
    for section in elf.iter_sections():
        # pyelftools makes a map of all names for the first one that is looked up.
        if isinstance(section, SymbolTableSection) and section.num_symbols() < _MAX_SYMBOLS:
            for entry in section.get_symbol_by_name(symbol) or ():
                if entry["st_shndx"] != "SHN_UNDEF":
                    found.add(int(entry["st_value"]))
    if len(found) != 1:
        number = "no" if not found else "more than one"
        raise BackendSpecError(f"{spec}: symbol={symbol}: the ELF file has {number} such symbol")
    return found.pop()


def _code_at(elf: "ELFFile", address: int) -> bytes | None:
    """What the file puts there; `None` where it puts nothing."""
    for segment in elf.iter_segments("PT_LOAD"):
        start, size = segment["p_vaddr"], segment["p_filesz"]
        if start <= address < start + size:
            elf.stream.seek(segment["p_offset"] + address - start)
            return bytes(elf.stream.read(min(MAX_INSTRUCTION, start + size - address)))
    return None
