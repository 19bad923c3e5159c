"""How a guest of C ends that begins with `start.h`, when its `main` returns a failure.

`guest/include/start.h` halts the vCPU when `main` has returned 0. Else it executes `ud2`, behind
which "status" stands, with the number in eax.
"""

from vmibridge.vm.backend import VcpuEnd

__all__ = ["status_of_main"]

_ENDED = "0f 0b 73 74 61 74 75 73"
"""As a backend shows the bytes that it stopped at."""


def status_of_main(end: VcpuEnd) -> int | None:
    """What `main` has returned, 32 bits, where the guest has ended by that."""
    if _ENDED not in end.detail or "rax" not in end.registers:
        return None
    return end.registers["rax"] & 0xFFFF_FFFF
