"""`vmibridge run`: what it prints, how it exits, how it is stopped."""

import json
import os
import pty
import re
import select
import signal
import time

import pytest
from probe_guest import PAUSE, calls, command

LOOPS = [["--async-backend", "asyncio"], ["--async-backend", "trio"], ["--uvloop"]]


def lines(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestJson:
    @pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "trio", "uvloop"])
    def test_is_one_object_a_trap_and_a_summary(self, vmibridge, image, handlers, loop):
        path = image(calls(1, 2, 3, 9) + calls(1, request="0x7777"))
        done = vmibridge(
            "run", "--backend", f"unicorn:{path}", "--handlers", handlers, "--json", *loop
        )
        assert done.returncode == 0, done.stderr
        *traps, last = lines(done)
        assert [trap["outcome"] for trap in traps] == ["handled", "timeout", "failed", "rejected"]
        first = traps[0]
        assert first.pop("duration_us") > 0
        assert first == {
            "seq": 1,
            "vm": "vm",
            "vcpu": 0,
            "trap": "vmcall",
            "width": 64,
            "magic": 0x42494D56,
            "request": 0x100,
            "method": 1,
            "values": [0x41, 0, 0, 0],
            "outcome": "handled",
            "response": [0x42, None, 0x213353522D494D56, None],
            "output": "\x1b[31mred\n",
            "handler": "probe",
            "error": None,
        }
        assert traps[1]["response"] == [None] * 4
        summary = last["summary"]
        assert summary["total"] == 4
        assert [summary[k] for k in ("handled", "timeout", "failed", "rejected")] == [1] * 4
        assert [summary[k] for k in ("unmatched", "denied", "cancelled", "native")] == [0] * 4
        assert summary["guest"][0]["reason"] == "halted"

    @pytest.mark.parametrize(
        ("until", "methods"),
        [("output", [3, 1]), ("2", [3, 1]), ("exit", [3, 1, 0xFFFF]), ("9", [3, 1, 0xFFFF, 9])],
    )
    def test_ends_where_until_says(self, vmibridge, image, handlers, until, methods):
        path = image(calls(3, 1, "0xffff", 9))
        given = ["--backend", f"unicorn:{path}", "--handlers", handlers, "--json"]
        done = vmibridge("run", *given, "--until", until)
        assert done.returncode == 0, done.stderr
        *traps, _ = lines(done)
        assert [trap["method"] for trap in traps] == methods

    def test_tells_what_nobody_takes(self, vmibridge, image, handlers):
        path = image(calls(1, request="0x7777"))
        done = vmibridge("run", "--backend", f"unicorn:{path}", "--handlers", handlers, "--json")
        trap, last = lines(done)
        assert trap["outcome"] == "unmatched"
        assert trap["handler"] is None
        assert last["summary"]["unmatched"] == 1

    def test_gives_an_output_that_json_cannot_hold_by_its_repr(self, vmibridge, image, handlers):
        path = image(calls(5))
        done = vmibridge("run", "--backend", f"unicorn:{path}", "--handlers", handlers, "--json")
        assert lines(done)[0]["output"] == "<class 'object'>"

    @pytest.mark.parametrize("width", [64, 32, 16])
    def test_tells_the_width_and_the_trap(self, vmibridge, image, handlers, width):
        code = "mov eax, 0x42494d56\n mov ecx, 0x10100\n cpuid\n hlt"
        path = image(code, width, 0x100000 if width > 16 else 0x10)
        spec = f"unicorn:{path}?width={width}"
        done = vmibridge("run", "--backend", spec, "--handlers", handlers, "--json")
        assert done.returncode == 0, done.stderr
        trap = lines(done)[0]
        assert (trap["width"], trap["trap"]) == (width, "cpuid")
        assert trap["outcome"] == ("failed" if width == 16 else "handled")


class TestForPeople:
    def test_plain_lines_where_standard_output_is_no_terminal(self, vmibridge, image, handlers):
        done = vmibridge(
            "run", "--backend", f"unicorn:{image(calls(1, 3))}", "--handlers", handlers
        )
        header, first, second, summary = done.stdout.splitlines()
        assert header.split()[:4] == ["seq", "vcpu", "trap", "handler"]
        assert first.split()[:6] == ["1", "0", "vmcall64", "probe", "42494d56/0100/0001", "handled"]
        assert first.endswith(r"'\x1b[31mred\n'")
        assert second.endswith(r"RuntimeError: told to,\x1b[2J twice")
        assert summary == "2 traps: 1 handled, 1 failed"

    def test_guest_text_never_reaches_the_terminal_unescaped(
        self, children, image, handlers, tmp_path
    ):
        path = image(calls(1, 3))
        master, slave = pty.openpty()
        run = children.start(
            command("run", "--backend", f"unicorn:{path}", "--handlers", handlers),
            stdout=slave,
            stderr=slave,
            cwd=tmp_path,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"},
        )
        os.close(slave)
        seen = b""
        while True:
            if not select.select([master], [], [], 30)[0]:
                break
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            seen += data
        os.close(master)
        assert run.wait() == 0
        text = seen.decode()
        assert "probe" in text
        assert r"\x1b[31mred" in text
        assert r"\x1b[2J twice" in text
        # The table has colours of its own, but the guest's red and its clear screen are not there.
        assert "\x1b[31mred" not in text
        assert "\x1b[2J" not in text
        assert "2 traps: 1 handled, 1 failed" in text

    def test_a_failing_handler_is_one_line_and_its_traceback_only_on_demand(
        self, vmibridge, image, handlers
    ):
        spec = ["run", "--backend", f"unicorn:{image(calls(3))}", "--handlers", handlers]
        brief = vmibridge(*spec).stderr.splitlines()
        assert len(brief) == 1
        assert brief[0].startswith("ERROR vmibridge.bridge.dispatch: handler probe failed")
        full = vmibridge(*spec, "--log-level", "debug").stderr
        assert "Traceback" in full
        assert "\x1b" not in full


class TestExitStatus:
    @pytest.mark.parametrize(
        ("code", "told"),
        [
            ("ud2", "undefined instruction at 0x100000"),
            ("mov ecx, 5\n vmcall", "vmcall that no handler claims (magic 0x5)"),
        ],
    )
    def test_1_when_the_guest_failed(self, vmibridge, image, handlers, code, told):
        done = vmibridge("run", "--backend", f"unicorn:{image(code)}", "--handlers", handlers)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("vmibridge: vcpu 0 crashed: ")
        assert told in line

    def test_1_when_a_handler_module_failed(self, vmibridge, image, tmp_path):
        (tmp_path / "broken.py").write_text("import this_is_missing\n")
        done = vmibridge("run", "--backend", f"unicorn:{image('hlt')}", "--handlers", "broken.py")
        assert done.returncode == 1
        assert done.stderr.startswith("vmibridge: broken.py:1: ModuleNotFoundError")
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ([], "--backend"),
            (["--backend", "nothing:here", "--handlers", "H"], "no backend for 'nothing:here'"),
            (["--backend", "unicorn:none.bin", "--handlers", "H"], "no such file"),
            (["--backend", "unicorn:G?width=5", "--handlers", "H"], "width"),
            (["--backend", "unicorn:G", "--handlers", "none.py"], "none.py"),
            (["--backend", "unicorn:G", "--handlers", "H", "--timeout", "soon"], "--timeout"),
            (["--backend", "unicorn:G", "--handlers", "H", "--timeout", "-1"], "--timeout"),
            (["--backend", "unicorn:G", "--handlers", "H", "--until", "end"], "--until"),
            (["--backend", "unicorn:G", "--handlers", "H", "--until", "0"], "--until"),
            (["--backend", "unicorn:G", "--handlers", "H", "--async-backend", "x"], "asyncio"),
            (["--backend", "unicorn:G", "--handlers", "H", "--config", "none.toml"], "none.toml"),
            (
                ["--backend", "unicorn:G", "--handlers", "H", "--config", "bad.toml"],
                "bad.toml:1: x",
            ),
            (["--backend", "unicorn:G", "--handlers", "H", "--colour"], "colour"),
            (
                [
                    "--backend",
                    "unicorn:G",
                    "--handlers",
                    "H",
                    "--uvloop",
                    "--async-backend",
                    "trio",
                ],
                "--uvloop",
            ),
        ],
    )
    @pytest.mark.no_cover
    def test_2_for_wrong_usage_in_one_line(
        self, vmibridge, image, handlers, tmp_path, arguments, told
    ):
        (tmp_path / "bad.toml").write_text("x = 1\n")
        path = image("hlt")
        made = [a.replace("unicorn:G", f"unicorn:{path}") for a in arguments]
        done = vmibridge("run", *[handlers if a == "H" else a for a in made])
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("vmibridge: ")
        assert told in line

    def test_2_for_an_unknown_command(self, vmibridge):
        done = vmibridge("fly")
        assert done.returncode == 2
        assert "fly" in done.stderr

    def test_2_when_the_command_line_is_not_installed(self, vmibridge, tmp_path):
        (tmp_path / "cyclopts.py").write_text("raise ModuleNotFoundError(name='cyclopts')\n")
        done = vmibridge("run")
        assert done.returncode == 2
        assert "the command line needs the package" in done.stderr
        assert "the extra 'cli'" in done.stderr
        assert vmibridge("--version").returncode == 0

    @pytest.mark.parametrize(
        ("body", "told"),
        [
            (
                "async def __aenter__(self): raise OSError('no disk')",
                "x did not start: OSError: no",
            ),
            (
                "async def __aexit__(self, *e): raise OSError('no disk')",
                "x did not end: OSError: no",
            ),
            (
                "async def __aenter__(self): raise SystemExit(3)",
                "x did not start: SystemExit: 3",
            ),
        ],
    )
    def test_1_when_a_handler_ends_the_server(self, vmibridge, image, tmp_path, body, told):
        (tmp_path / "x.py").write_text(
            "from vmibridge import BridgeHandler\nclass X(BridgeHandler[None]):\n"
            "    MAGIC = 0x42494D56\n    REQUEST = 0x100\n"
            f"    async def handle(self, vmi, packet): ...\n    {body}\n"
        )
        spec = f"unicorn:{image(calls(1))}"
        done = vmibridge("run", "--backend", spec, "--handlers", "x.py", "--log-level", "error")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert told in done.stderr.splitlines()[-1]


class TestOptions:
    def test_timeout_is_the_servers_default(self, vmibridge, image, tmp_path):
        (tmp_path / "hangs.py").write_text(
            "import anyio\nfrom vmibridge import BridgeHandler\n"
            "class Hangs(BridgeHandler[None]):\n    MAGIC = 0x42494D56\n    REQUEST = 0x100\n"
            "    async def handle(self, vmi, packet):\n        await anyio.sleep_forever()\n"
        )
        run = ["run", "--backend", f"unicorn:{image(calls(1))}", "--handlers", "hangs.py", "--json"]
        (tmp_path / "c.toml").write_text("[server]\ntimeout = 3600\nfallback = { value2 = 7 }\n")
        done = vmibridge(*run, "--config", "c.toml", "--timeout", "0.05")
        trap = lines(done)[0]
        assert trap["outcome"] == "timeout"
        assert trap["error"] == "no answer within 0.05 s"
        assert trap["response"] == [None, 7, None, None]

    def test_several_sources_and_two_vcpus(self, vmibridge, image, handlers, root):
        spec = f"unicorn:{image(calls(1))}?vcpus=2"
        sources = [handlers, str(root / "handlers" / "hello.py")]
        done = vmibridge("run", "--backend", spec, "--handlers", *sources, "--json")
        *traps, last = lines(done)
        assert sorted(trap["vcpu"] for trap in traps) == [0, 1]
        assert len(last["summary"]["guest"]) == 2

    @pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["handlers", "--help"]])
    def test_help_is_there(self, vmibridge, arguments):
        done = vmibridge(*arguments)
        assert done.returncode == 0
        assert "Usage: vmibridge" in done.stdout


class TestSignals:
    @pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "trio", "uvloop"])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_pending_traps_are_answered_and_told(
        self, children, image, handlers, tmp_path, loop, number
    ):
        spec = f"unicorn:{image(calls(1, 4, tail='jmp $'))}?vcpus=2"
        run = children.start(
            command("run", "--backend", spec, "--handlers", handlers, "--json", *loop),
            cwd=tmp_path,
        )  # fmt: skip
        first = [json.loads(run.stdout.readline()) for _ in range(2)]
        assert {trap["outcome"] for trap in first} == {"handled"}
        assert [run.stderr.readline() for _ in range(2)] == ["waiting\n"] * 2
        run.send_signal(number)
        out, err = run.communicate()
        assert run.returncode == 128 + number, err
        *rest, last = [json.loads(line) for line in out.splitlines()]
        assert [trap["outcome"] for trap in rest] == ["cancelled"] * 2
        assert [end["reason"] for end in last["summary"]["guest"]] == ["stopped"] * 2

    def test_a_third_one_ends_even_a_handler_that_shields_itself(self, children, image, tmp_path):
        (tmp_path / "shielded.py").write_text(
            "import anyio\nfrom vmibridge import BridgeHandler\n"
            "class Shielded(BridgeHandler[None]):\n    MAGIC = 0x42494D56\n    REQUEST = 0x100\n"
            "    VERIFY_VALUE3 = VERIFY_VALUE4 = None\n"
            "    async def handle(self, vmi, packet):\n"
            "        print('waiting', flush=True)\n"
            "        with anyio.CancelScope(shield=True):\n"
            "            await anyio.sleep(3600)\n"
        )
        run = children.start(
            command("run", "--backend", f"unicorn:{image(calls(1))}", "--handlers", "shielded.py",
                    "--json"),
            cwd=tmp_path,
        )  # fmt: skip
        assert run.stderr.readline() == "waiting\n"
        while run.poll() is None:
            run.send_signal(signal.SIGINT)
            time.sleep(0.1)  # signals that come at once are one signal
        assert run.returncode == 130
        run.communicate()

    def test_one_that_comes_while_handlers_are_loaded_ends_the_command(
        self, children, image, tmp_path
    ):
        (tmp_path / "slow.py").write_text(f"{PAUSE}print('loading', flush=True)\npause()\n")
        run = children.start(
            command("run", "--backend", f"unicorn:{image('hlt')}", "--handlers", "slow.py"),
            cwd=tmp_path,
        )  # fmt: skip
        assert run.stdout.readline() == "loading\n"
        run.send_signal(signal.SIGINT)
        _, err = run.communicate()
        assert (run.returncode, err) == (130, "")

    def test_an_endless_guest_is_stopped(self, children, image, handlers, tmp_path):
        run = children.start(
            command("run", "--backend", f"unicorn:{image(calls(1, tail='jmp $'))}", "--handlers",
                    handlers, "--json"),
            cwd=tmp_path,
        )  # fmt: skip
        run.stdout.readline()
        run.send_signal(signal.SIGINT)
        out, err = run.communicate()
        assert run.returncode == 130, err
        assert json.loads(out)["summary"]["guest"][0]["reason"] == "stopped"

    def test_a_reader_that_leaves_ends_the_run(self, children, image, handlers, tmp_path):
        code = calls(1, tail="jmp start").replace("mov r8", "start: mov r8", 1)
        run = children.start(
            command("run", "--backend", f"unicorn:{image(code)}", "--handlers", handlers, "--json"),
            cwd=tmp_path,
        )  # fmt: skip
        run.stdout.readline()
        run.stdout.close()
        assert run.wait() == 1
        assert "standard output was closed" in run.stderr.read()
        run.stderr.close()

    def test_a_reader_that_is_slow_loses_nothing(self, children, image, handlers, tmp_path):
        tail = "dec r12d\n jnz again\n hlt"
        code = "mov r12d, 3000\nagain:" + calls(1, value="r12", tail=tail)
        run = children.start(
            command("run", "--backend", f"unicorn:{image(code)}", "--handlers", handlers, "--json"),
            cwd=tmp_path,
        )  # fmt: skip
        time.sleep(1.0)  # the pipe holds a part of it: the guest has to wait
        out, err = run.communicate()
        assert run.returncode == 0, err
        *traps, last = [json.loads(line) for line in out.splitlines()]
        assert [trap["values"][0] for trap in traps] == list(range(3000, 0, -1))
        assert last["summary"]["handled"] == 3000


class TestHandlersList:
    def test_shows_contract_methods_and_settings(self, vmibridge, handlers, root):
        done = vmibridge("handlers", "list", handlers, str(root / "handlers"))
        assert done.returncode == 0, done.stderr
        for text in ("probe", "0x42494d56", "0x0100", "add: Adds one.", "hang (0.05 s)", "fetch"):
            assert text in done.stdout

    def test_gives_json(self, vmibridge, handlers):
        done = vmibridge("handlers", "list", handlers, "--json")
        (line,) = [json.loads(line) for line in done.stdout.splitlines()]
        assert (line["name"], line["magic"], line["request"]) == ("probe", 0x42494D56, 0x100)
        method = line["methods"][0]
        assert (method["code"], method["name"], method["doc"]) == (1, "add", "Adds one.")

    def test_tells_what_is_wrong(self, vmibridge, tmp_path):
        assert vmibridge("handlers", "list", "none.py").returncode == 2
        (tmp_path / "broken.py").write_text("1 / 0\n")
        done = vmibridge("handlers", "list", "broken.py")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        (tmp_path / "wide.py").write_text(
            "from vmibridge import BridgeHandler\nclass Wide(BridgeHandler[None]):\n"
            "    REQUEST = 0x10000\n    async def handle(self, vmi, packet): ...\n"
        )
        done = vmibridge("handlers", "list", "wide.py")
        assert done.returncode == 1
        assert re.search(r"wide\.py: REQUEST has 16 bits", done.stderr)
