"""`vmibridge demo`: a real guest calls the ready-made handlers, and checks every answer.

Its source is assembled where nasm is installed; else it runs from the image that ships with it. A
server on loopback has what the guest downloads.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmibridge.cli.options import Json, LoopOptions
from vmibridge.cli.run import run
from vmibridge.cli.server_options import ServerOptions
from vmibridge.errors import BackendError, VmiBridgeError
from vmibridge.guest_files import guest_file
from vmibridge.text import printable

_HANDLERS = ("hello", "log", "environment", "clock", "random", "exec_gate", "fetch")
_BODY = bytes((7 * n + 3) & 0xFF for n in range(20_000))
"""What the guest downloads, and knows."""
_SECONDS = 60.0
"""For nasm."""


def demo(
    *,
    loop: LoopOptions | None = None,
    json: Annotated[Json, Parameter(help="One JSON object a trap, then a summary.")] = False,
) -> int:
    """Run a guest that calls the ready-made handlers and checks every answer.

    It calls hello, log, environment, clock, random, exec_gate and fetch by VMCALL, CPUID and
    VMMCALL, on the Unicorn backend. With nasm its source is assembled; without, an image of it is
    there.

    Exit status: 0 when every answer was right, 1 when one was not or the guest could not run.

    Example: vmibridge demo
    """
    chosen = loop or LoopOptions()
    _ = chosen.loop  # raises for a wrong one before the guest is assembled
    try:
        with tempfile.TemporaryDirectory(prefix="vmibridge-") as name, _web_server() as origin:
            folder = Path(name)
            config = folder / "demo.toml"
            config.write_text(
                f'[handlers.environment]\nvalues = {{ DEMO_URL = "{origin}/demo/start" }}\n'
                f'[handlers.fetch]\nallow = ["{origin}/demo/"]\n'
            )
            options = ServerOptions(**asdict(chosen), config=config, json=json)
            # By name, so that one whose extra is missing is an error.
            sources = [f"vmibridge.handlers.{each}" for each in _HANDLERS]
            status = run(backend=[f"unicorn:{_image(folder)}"], handlers=sources, options=options)
    except VmiBridgeError:
        _say("FAILED")
        raise
    _say("passed" if status == 0 else f"FAILED ({status})")
    return status


def _image(folder: Path) -> Path:
    """The guest. Raises `BackendError` when nasm is there and fails."""
    source, nasm = guest_file("demo/demo.asm"), shutil.which("nasm")
    if nasm is None:
        image = guest_file("demo/demo.bin")
        _say(f"nasm is not installed: the guest is {image}, which is {source.name} assembled")
        return image
    made = folder / "demo.bin"
    include = f"-I{guest_file('include')}/"
    try:
        subprocess.run(  # noqa: S603 - the assembler in the user's path
            [nasm, "-Werror", "-f", "bin", include, str(source), "-o", str(made)],
            check=True, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{nasm}: did not end within {_SECONDS:g} s") from error
    except subprocess.CalledProcessError as error:
        raise BackendError(f"{nasm}: {error.stderr.strip()}") from error
    _say(f"the guest is assembled from {source} by nasm")
    return made


@contextmanager
def _web_server() -> Iterator[str]:
    """A server on loopback; gives its origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _RequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _RequestHandler(BaseHTTPRequestHandler):
    """Serves the body, after a redirect."""

    def do_GET(self) -> None:
        if self.path == "/demo/start":
            self.send_response(302)
            self.send_header("Location", "/demo/body")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(_BODY)))
        self.end_headers()
        self.wfile.write(_BODY)

    def log_message(self, *_: object) -> None:
        """Quiet: the table shows what happens."""


def _say(line: str) -> None:
    sys.stderr.write(f"demo: {printable(line)}\n")
    sys.stderr.flush()
