"""Unicorn: a raw x86 image, emulated in this process, one thread per vCPU.

    unicorn:PATH?width=64&base=0x100000&memory=16MiB&vcpus=1

- The image is loaded at `base` and entered there; it ends at HLT. Physical memory is
  `memory` bytes from address 0, shared by all vCPUs; each is an instance of its own.
- Each vCPU starts with its number in EDI and its stack at the top of memory, 64 KiB
  below the one before. A 16-bit image starts with a CS:IP that leads to `base`, and a
  stack at the top of the first MiB (or of memory, when it is smaller).
- CPUID, VMCALL and VMMCALL that are ours are trapped. Another CPUID runs natively; an
  instruction that is undefined, as a VMCALL of others is, ends the vCPU.
- Code that a handler writes is seen by the vCPU that asked for it when it goes on, and
  by the others from their next trap: Unicorn caches translated code, and has to drop it.
- A locked instruction is not atomic against other vCPUs: they are separate emulators.
"""

import ctypes
import itertools
import mmap
from pathlib import Path
from typing import Literal, Self

import anyio
import anyio.to_thread
import msgspec

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.backends.threads import Handover, VcpuSlot
from vmibridge.errors import BackendError, BackendSpecError, GuestMemoryError, MissingExtraError
from vmibridge.text import counted
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd
from vmibridge.vm.spec import parse_options
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

try:
    from unicorn import UcError, x86_const

    from vmibridge.backends.unicorn.vcpu import UnicornVcpu
except ImportError as _error:
    raise MissingExtraError("the unicorn backend", "unicorn") from _error

_PAGE = 4096
_STACK = 64 << 10
_ELF = b"\x7fELF"
_REAL_MODE_END = 1 << 20


class UnicornOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a `unicorn:` spec."""

    width: Literal[64, 32, 16] = 64
    """Address width of the mode that the image starts in, in bits."""
    base: int = 0x10_0000
    """Physical address, in bytes, that the image is loaded at and entered."""
    memory: int = 16 << 20
    """Bytes of physical memory, in whole pages of 4 KiB."""
    vcpus: int = 1
    """1 to 64."""


_NUMBERS = {
    "width": "a number of bits",
    "base": "an address",
    "memory": "a size, such as 16MiB",
    "vcpus": "a number",
}


class UnicornBackend(Backend):
    """A raw image in Unicorn. Raises `BackendSpecError` if an option is out of range."""

    def __init__(self, path: Path, options: UnicornOptions, vm: str = "vm") -> None:
        super().__init__(vm)
        self.path = path
        self.options = options
        spec = f"unicorn:{path}"
        if options.memory <= 0 or options.memory % _PAGE:
            raise BackendSpecError(f"{spec}: memory={options.memory} is not whole pages of 4 KiB")
        if not 0 <= options.base < options.memory:
            raise BackendSpecError(f"{spec}: base={options.base:#x} is outside the guest's memory")
        if options.width == 16 and options.base - _real_mode_segment(options.base) * 16 > 0xFFFF:
            raise BackendSpecError(
                f"{spec}: base={options.base:#x} is out of a 16-bit guest's reach"
            )
        if not 1 <= options.vcpus <= 64:
            raise BackendSpecError(f"{spec}: vcpus={options.vcpus} is not 1 to 64")
        if options.vcpus * _STACK > options.memory:
            raise BackendSpecError(f"{spec}: memory={options.memory} has no room for the stacks")
        self._ram: mmap.mmap
        self._ram_start: ctypes.c_char
        self._vcpus: list[UnicornVcpu] = []
        self._slots: dict[int, VcpuSlot] = {}
        self._stop = anyio.Event()

    @classmethod
    def from_spec(cls, path: str, options: str, vm: str) -> Self:
        """From the parts of `unicorn:PATH?OPTIONS`. Raises `BackendSpecError`."""
        if not path:
            raise BackendSpecError("unicorn: needs the path of an image, as in unicorn:guest.bin")
        return cls(
            Path(path), parse_options(f"unicorn:{path}", options, UnicornOptions, _NUMBERS), vm
        )

    async def open(self) -> None:
        """Load the image and make the vCPUs.

        Raises `BackendSpecError` without such a file, for an empty one and for an ELF file, whose
        header would be run as code, `BackendError` when it does not fit.
        """
        options = self.options
        try:
            if await in_own_thread(self.path.is_dir):
                raise BackendSpecError(f"unicorn:{self.path}: is a folder, and no image")
            if not await in_own_thread(self.path.is_file):
                is_there = await in_own_thread(self.path.exists)
                what = "is no regular file" if is_there else "there is no such file"
                raise BackendSpecError(f"unicorn:{self.path}: {what}")
            image = await in_own_thread(self.path.read_bytes)
            self._ram = mmap.mmap(-1, options.memory)
        except BackendSpecError:
            raise
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            where = "" if getattr(error, "filename", None) else f"memory={options.memory}: "
            raise BackendError(f"unicorn:{self.path}: {where}{why}") from error
        if image.startswith(_ELF):
            self._ram.close()
            raise BackendSpecError(
                f"unicorn:{self.path}: is an ELF file, and this loads raw images:"
                " `objcopy -O binary` makes one, which has to be linked for base"
            )
        if not image:
            self._ram.close()
            raise BackendSpecError(f"unicorn:{self.path}: is empty, and no image")
        if options.base + len(image) > options.memory:
            self._ram.close()
            raise BackendError(
                f"unicorn:{self.path}: {counted(len(image), 'byte does', 'bytes do')} not fit at"
                f" base={options.base:#x} into {options.memory} bytes of memory"
            )
        self._ram[options.base : options.base + len(image)] = image
        self._ram_start = ctypes.c_char.from_buffer(self._ram)
        address = ctypes.addressof(self._ram_start)
        seq = itertools.count(1)
        try:
            for number in range(options.vcpus):
                vcpu = UnicornVcpu(number, options.width, self._ram, address, self.vm, seq)
                self._vcpus.append(vcpu)
                self._set_up(vcpu)
        except UcError as error:
            await self.close()
            raise BackendError(f"unicorn:{self.path}: {error}") from error

    def _set_up(self, vcpu: UnicornVcpu) -> None:
        options, engine = self.options, vcpu.engine
        top = options.memory - vcpu.number * _STACK
        if options.width == 16:
            top = min(options.memory, _REAL_MODE_END) - vcpu.number * _STACK
            engine.reg_write(x86_const.UC_X86_REG_CS, _real_mode_segment(options.base))
            engine.reg_write(x86_const.UC_X86_REG_SS, top - _STACK >> 4)
            top = 0  # the first push wraps to the top of the segment
        wide = options.width == 64
        engine.reg_write(x86_const.UC_X86_REG_RSP if wide else x86_const.UC_X86_REG_ESP, top)
        engine.reg_write(x86_const.UC_X86_REG_EDI, vcpu.number)

    async def close(self) -> None:
        """Free the emulators and the memory."""
        for vcpu in self._vcpus:
            vcpu.close()
        self._vcpus.clear()
        del self._ram_start
        self._ram.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Run every vCPU in a thread of its own until all have ended."""
        ends: list[VcpuEnd] = []
        over: list[int] = []
        handover = Handover(sink)
        self._slots = {vcpu.number: VcpuSlot(handover) for vcpu in self._vcpus}
        threads = anyio.CapacityLimiter(len(self._vcpus))

        def in_thread(vcpu: UnicornVcpu) -> VcpuEnd:
            try:
                return vcpu.run(self.options.base, traps, self._slots[vcpu.number])
            finally:
                # Noted here: when an exception leaves asyncio's loop, such as that of a signal
                # handler, every task is cancelled, and none waits for a thread any more.
                over.append(vcpu.number)

        async with anyio.create_task_group() as tasks:

            async def emulate(vcpu: UnicornVcpu) -> None:
                ends.append(await anyio.to_thread.run_sync(in_thread, vcpu, limiter=threads))
                if len(ends) == len(self._vcpus):
                    tasks.cancel_scope.cancel()

            for vcpu in self._vcpus:
                tasks.start_soon(emulate, vcpu)
            tasks.start_soon(handover.feed)
            tasks.start_soon(self._stop_when_asked, over)
        return GuestEnd(tuple(sorted(ends, key=lambda end: end.vcpu)))

    def stop(self) -> None:
        """Stop every vCPU, wherever it is."""
        self._stop.set()

    async def _stop_when_asked(self, over: list[int]) -> None:
        # A thread in emulation sees no cancellation: it has to be interrupted, until it notices.
        try:
            await self._stop.wait()
        finally:
            with anyio.CancelScope(shield=True):
                while len(over) < len(self._vcpus):
                    for vcpu in self._vcpus:
                        self._slots[vcpu.number].release()
                        vcpu.stop()
                    await anyio.sleep(0.005)

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Hand the answer to the vCPU's thread. Never waits."""
        self._slots[event.vcpu].answer(writes)

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """Never waits."""
        if address + size > len(self._ram):
            raise GuestMemoryError(address, "the VM has no memory there")
        return self._ram[address : address + size]

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """Never waits."""
        if address + len(data) > len(self._ram):
            raise GuestMemoryError(address, "the VM has no memory there")
        self._ram[address : address + len(data)] = data
        for vcpu in self._vcpus:
            vcpu.code.write(address, len(data))


def _real_mode_segment(base: int) -> int:
    """The segment that an image at `base` starts with: the highest that leads there."""
    return min(base >> 4, 0xFFFF)
