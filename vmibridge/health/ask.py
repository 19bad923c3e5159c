"""Asks a health socket, with the standard library alone: most of a check is the start of Python.

    vmibridge health --ready

What the process itself cannot say is found out here. No answer in time has two causes, which the
system tells apart by the state of the process that listens: it is stopped, or its event loop is
blocked.

What is imported here is there when Python has started, or part of it: `socket`, with its enums and
selectors, takes as long as all the rest of a check. So it is `_socket`, whose names are the same,
and text that is not printable is escaped here. A test holds the imports to that.
"""

import _socket
import os
import sys
import time

__all__ = ["CHECKS", "WITHIN", "ask_health", "ask_quickly"]

CHECKS = ("live", "started", "ready")
WITHIN = 3.0
"""Seconds for an answer, by default."""
_MAX_ANSWER = 64 << 10
"""As `protocol.MAX_ANSWER`, which would import msgspec."""
_PAUSE = 0.02
"""Seconds until the next try, while the backlog of the socket is full."""
_PATH, _ANY = "--health-socket", "VMIBRIDGE_HEALTH_SOCKET"


class _Fault(Exception):  # noqa: N818 - it is an answer, too
    """Why there is no answer."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def ask_quickly(arguments: list[str]) -> int | None:
    """`vmibridge health` with these arguments, if they ask a health socket and are right: the exit
    status, with its line printed. `None`: the command line has to look at them, nothing is done.
    """
    check, as_json, within, path = "", False, WITHIN, os.environ.get(_ANY, "")
    rest = iter(arguments)
    for word in rest:
        name, given, value = word.partition("=")
        if word[:2] == "--" and word[2:] in CHECKS and not check:
            check = word[2:]
        elif word == "--json":
            as_json = True
        elif name in (_PATH, "--within"):
            value = value if given else next(rest, "-")
            if value.startswith("-"):
                return None
            if name == _PATH:
                path = value
                continue
            try:
                within = float(value)
            except ValueError:
                return None
        else:
            return None
    if not path or not 0 < within < float("inf") or sys.stdout is None or sys.stderr is None:
        return None
    return ask_health(path, check or "ready", within=within, as_json=as_json)


def ask_health(path: str, check: str, *, within: float, as_json: bool) -> int:
    """Ask the process that listens at `path`, and print what it says. Returns the exit status: 0
    when the check passes, 1 when it fails.

    Passes print to standard output, failures to standard error, and JSON to standard output in any
    case.
    """
    try:
        passed, line, report = _answer(path, check, within)
    except _Fault as fault:
        passed, line = False, f"not {check}: {fault.code}: {fault}"
        report = _report(check, fault) if as_json else ""
    told, stream = (report, sys.stdout) if as_json else (line, sys.stdout)
    if not passed and not as_json:
        told, stream = f"vmibridge: {line}", sys.stderr
    # Whoever does not read it reads the status.
    try:
        stream.write(f"{_printable(told)}\n")
        stream.flush()
    except (OSError, UnicodeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 0 if passed else 1


def _answer(path: str, check: str, within: float) -> tuple[bool, str, str]:
    """Verdict, line and report. Raises `_Fault`."""
    connected = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        data = _exchange(connected, path, check, within)
    except (FileNotFoundError, ConnectionRefusedError):
        raise _Fault("not-running", f"{path}: nothing listens here") from None
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise _Fault("not-running", f"{path}: {text}") from None
    finally:
        connected.close()
    if not data:
        raise _Fault("not-running", f"{path}: hung up without an answer")
    verdict, _, rest = data.decode("utf-8", "backslashreplace").partition(" ")
    line, _, report = rest.partition("\n")
    if verdict not in ("pass", "fail") or not line:
        raise _Fault("not-running", f"{path}: what listens here is no vmibridge")
    return verdict == "pass", line, report.rstrip("\n")


def _exchange(connected: _socket.socket, path: str, check: str, within: float) -> bytes:
    """Ask, and receive what comes. Raises `_Fault` when nothing comes in time, and `OSError`."""
    until, process = time.monotonic() + within, 0
    try:
        _connect(connected, path, until)
        process = _listener(connected, path)
        return _converse(connected, check, until)
    except TimeoutError:
        raise _silent(process, within) from None


def _converse(connected: _socket.socket, check: str, until: float) -> bytes:
    """What is said until it hangs up. Raises `TimeoutError`, `OSError`."""
    data = b""
    try:  # noqa: SIM105 - contextlib is not there yet
        # At once: it answers in the turn of its loop in which it accepts.
        connected.sendall(b'{"check":"%s"}\n' % check.encode())
    except BrokenPipeError:
        pass  # it has hung up by now, and may have said why
    try:
        while len(data) < _MAX_ANSWER:
            connected.settimeout(max(until - time.monotonic(), 0.001))
            more = connected.recv(_MAX_ANSWER)
            if not more:
                break
            data += more
    except ConnectionResetError:
        pass  # it has not read the question
    return data


def _connect(connected: _socket.socket, path: str, until: float) -> None:
    while True:
        connected.settimeout(max(until - time.monotonic(), 0.001))
        try:
            connected.connect(path)
            return
        except BlockingIOError:  # its backlog is full
            if time.monotonic() + _PAUSE >= until:
                raise TimeoutError from None
            time.sleep(_PAUSE)


def _listener(connected: _socket.socket, path: str) -> int:
    """The process that listens, as the kernel has it (unix(7), SO_PEERCRED); 0: of another
    namespace. Raises `_Fault` for one of another user, who could say anything."""
    found = connected.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    process, user = (int.from_bytes(found[at : at + 4], sys.byteorder) for at in (0, 4))
    if user not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise _Fault("not-running", f"{path}: user {user} listens here")
    return process


def _silent(process: int, within: float) -> _Fault:
    """Why there was no answer, by the state of that process (proc_pid_stat(5))."""
    state = ""
    try:
        with open(f"/proc/{process}/stat", "rb") as about:  # noqa: PTH123
            state = about.read(4096).rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        pass
    if state in ("T", "t"):
        why = "by a debugger" if state == "t" else "by a signal"
        return _Fault("process-stopped", f"process {process} is stopped {why}")
    if not state:
        text = f"no answer in {within:g} s: the event loop is blocked, or the process is stopped"
        return _Fault("loop-blocked", text)
    text = f"no answer in {within:g} s: the event loop of process {process} is blocked"
    return _Fault("loop-blocked", text)


def _printable(text: str) -> str:
    """As `vmibridge.text.printable`; the process has seen to it, if it is one of vmibridge."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _report(check: str, fault: _Fault) -> str:
    """As the process would have said it."""
    import json

    reason = {"code": fault.code, "text": str(fault), "fails": "live"}
    passed = dict.fromkeys(("ok", *CHECKS), False)
    return json.dumps({"check": check, **passed, "reasons": [reason]})
