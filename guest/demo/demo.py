"""The demo: a guest that calls hello, log, environment and fetch, and checks the answers.

    python guest/demo/demo.py [--json] [--async-backend asyncio|trio]

Assembles `demo.asm`, serves what it fetches on loopback, and runs it with the
`vmibridge` command as anyone would. Ends with the status of that command.
"""

import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BODY = bytes((7 * n + 3) & 0xFF for n in range(20_000))


class DemoRequestHandler(BaseHTTPRequestHandler):
    """Serves BODY, after a redirect."""

    def do_GET(self) -> None:
        if self.path == "/demo/start":
            self.send_response(302)
            self.send_header("Location", "/demo/body")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        """Quiet: the table shows what happens."""


def main() -> int:
    if shutil.which("nasm") is None:
        print("demo: nasm is missing: apt-get install nasm", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        image, config = Path(folder, "demo.bin"), Path(folder, "demo.toml")
        command = ["nasm", "-Werror", "-f", "bin", f"-I{ROOT / 'guest/include'}/"]
        subprocess.run([*command, str(HERE / "demo.asm"), "-o", str(image)], check=True)
        with ThreadingHTTPServer(("127.0.0.1", 0), DemoRequestHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            origin = f"http://127.0.0.1:{server.server_address[1]}"
            config.write_text(
                f'[handlers.environment]\nvalues = {{ DEMO_URL = "{origin}/demo/start" }}\n'
                f'[handlers.fetch]\nallow = ["{origin}/demo/"]\n'
            )
            run = [sys.executable, "-m", "vmibridge", "run", "--backend", f"unicorn:{image}"]
            run += ["--handlers", str(ROOT / "handlers"), "--config", str(config), *sys.argv[1:]]
            status = subprocess.run(run, check=False).returncode
            server.shutdown()
    print("demo: passed" if status == 0 else f"demo: FAILED ({status})", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
