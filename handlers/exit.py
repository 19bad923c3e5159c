"""Let the guest end its run, and say how: `vmibridge run` ends with its status.

| 0xffff EXIT | in | out |
|---|---|---|
| value1 | the status, 32 bits; 0 where all is well | status of the answer |
| value2 | address of a reason: UTF-8, at most 1024 bytes, then a NUL; 0: none | 0 |

The method code is that of the standard contract for the end of a guest, so `--until exit` knows it,
too.

| status of the answer | when |
|---|---|
| success | the host has taken it |
| invalid parameters, code 1 | a status of more than 32 bits |
| invalid parameters, code 2 | a reason that is too long, no UTF-8 or not readable |
| touch | the page of the reason is not present |

The handler ends nothing. It says by its output, a `vmibridge.GuestExit`, what the guest wants, and
whoever consumes the outcomes acts: a command, or a program. So in a recording and in a replay it is
an output like all others.
"""

from typing import Annotated

from vmibridge import U32, GuestExit, GuestText, HostOutput, StandardHandler, method

MAX_REASON = 1024
"""Bytes of a reason, without its NUL."""


class Exit(StandardHandler[GuestExit]):
    """Gives what the guest exits with to the consumer of the outcomes."""

    REQUEST = 0x0111

    @method(0xFFFF)
    async def exit(
        self, status: U32, reason: Annotated[str, GuestText(MAX_REASON)] | None
    ) -> Annotated[GuestExit, HostOutput()]:
        """End the run with a status, and a reason in words."""
        return GuestExit(status, reason)
