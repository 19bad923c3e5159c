"""Environment variables that begin as ours and are none of ours: they are misspelt.

- `OPTIONS` and `OTHERS` serve this warning alone: the rule of `environment.py` makes the variable
  of an option. To ask each command for its options would import all of them.
- Tests hold `OPTIONS` to the options of all commands, and `OTHERS` to what the sources name.
- What one command knows is known to each: an image, a unit or a shell sets variables once, for all
  commands that run there.
"""

import re
from collections.abc import Iterable

__all__ = ["OPTIONS", "OTHERS", "PREFIX", "warnings_for"]

PREFIX = "VMIBRIDGE_"
MAX_LINES = 5
"""Lines of warning: the environment may have any number of variables."""

_NAMES = """
    ABSENT ACCEL ACCEPT ANSWERS ASYNC_BACKEND BACKEND BACKEND_OPTIONS BREAK BUS CC CHECK
    COMPAT CONFIG CONNECT DEADLINE EXIT_ZERO FAIL_FAST FOLDER FOLLOW FORCE FROM FULL HANDLERS
    HEALTH_SOCKET IGNORE INTO IVSHMEM JSON JUNIT KEEP KEEP_VM LANG LIBVIRT LIMIT LISTEN LIVE
    LOG_LEVEL MEMORY MEMORY_FILE METHOD MISSING NAME NO_OUTSIDE ORDER OUTCOME OUTCOMES
    OUTCOMES_MAX_SIZE OUTPUT PATIENCE PDB PLUGIN PLUGIN_OPTIONS POWERDOWN QEMU QMP READY
    RECORD REDACT REFUSE_MIGRATION RELOAD RENAME REPEATED REQUEST REQUIRE ROTATE SHARE_MEMORY
    SHIFT SINCE SLOTS SNAPSHOT SOCKET SOFT_TIMEOUT SPEED SPLIT STARTED STRICT TARGET TIMEOUT
    TITLE TO UNRECORDED UNTIL UVLOOP VCPU VIA VM WITHIN
"""
OPTIONS = frozenset(_NAMES.split())
"""The options of all commands."""

_OTHER_NAMES = """
    ABSENT ACCEL APPEND COMPOSE DISK DISKS ENV_FILE GUEST HANDLERS HOST_AT IMAGE INITRD KERNEL
    KVM_GROUP MEMORY MODULE NETWORK OUTCOMES PATIENCE QEMU_LIMIT QEMU_OPTIONS RECORDINGS SITES
    SLOTS SMP VM
    HEALTH QEMU
    FUZZ_SEED LAWS LIBRARY_REQUESTS PYTHONS
"""
OTHERS = frozenset(_OTHER_NAMES.split())
"""Variables of `docker/`, of `vmibridge health` and the search for QEMU, and of the tests."""

CUTOFF = 0.7
"""How alike two names are that may be meant for one another, of 1: difflib.get_close_matches."""
_LINK = re.compile(
    r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$"
)
"""What Kubernetes sets in a pod for a service that is called vmibridge-NAME, unless
`enableServiceLinks` is false."""


def warnings_for(variables: Iterable[str]) -> list[str]:
    """A line for each variable that begins as ours and is not known, with the closest known one."""
    known = OPTIONS | OTHERS
    unknown = sorted(
        name
        for name in variables
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known
        if not _LINK.search(name)
    )
    lines = [
        f"{name}: no option has this variable, it is ignored; {_hint(name)}" for name in unknown
    ]
    if len(lines) > MAX_LINES:
        more = len(lines) - (MAX_LINES - 1)
        lines[MAX_LINES - 1 :] = [f"{more} more variables that begin with {PREFIX} are ignored"]
    return lines


def _hint(name: str) -> str:
    from difflib import get_close_matches  # seldom needed

    # Without the prefix, which would make all of them alike.
    word = name.removeprefix(PREFIX).upper()
    found = (get_close_matches(word, sorted(names), 1, CUTOFF) for names in (OPTIONS, OTHERS))
    close = next((names for names in found if names), [])
    return f"did you mean {PREFIX}{close[0]}?" if close else "--help of a command shows them all"
