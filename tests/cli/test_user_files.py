"""Files that are not what their command expects: what is told of them, and with which status."""

import base64
import gzip
import re

import pytest
from nats_parts import nats_server
from probe_guest import calls

from vmibridge.backends.qemu.find import has_memory_backend
from vmibridge.cli import main
from vmibridge.files import is_own_file

HANDLER = """
from vmibridge import BridgeHandler, BridgeResponse


class Probe(BridgeHandler[int]):
    MAGIC, REQUEST = 0x42494D56, 0x100

    def __init__(self):
        self.count = 0

    async def handle(self, vmi, packet):
        self.count += 1
        data = await vmi.memory.read(0x100000, 4)
        return BridgeResponse(value1=data[0] + self.count).with_output(self.count)
"""
READ_ONCE = HANDLER.replace("data = ", "data = b'1' if self.count > 1 else ")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.py").write_text(HANDLER)
    return tmp_path


@pytest.fixture
def record(folder, image):
    """Records some calls; further words are options."""

    def run(name, *options, count=3, vm="vm", handler="probe.py"):
        guest = f"{vm}=unicorn:{image(calls(*[1] * count))}"
        words = ["--backend", guest, "--handlers", handler, "--record", name, *options]
        assert main(["run", *words]) == 0
        return folder / name

    return run


def replay(path, *options):
    return main(["replay", str(path), "--handlers", "probe.py", *options])


class TestAReplayThatComparedNothing:
    def test_is_no_success_when_most_of_the_file_is_lost(self, record, capsys):
        path = record("run.mcap")
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 8] + bytes(len(data) * 7 // 8))
        assert replay(path) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "run.mcap: there is no trap in it; the file is " in told
        assert f"vmibridge recover {path} -o " in told

    @pytest.mark.parametrize("options", [[], ["--strict"], ["--json"], ["--order", "vcpu"]])
    def test_is_no_success_when_all_was_left_out(self, record, capsys, options):
        path = record("run.mcap", "--redact", "value1")
        capsys.readouterr()
        assert replay(path, *options) == 2
        told = capsys.readouterr()
        assert ('"same":false' if "--json" in options else "0 requests compared") in told.out
        assert told.err.endswith("no request could be compared\n")


class TestRecordingsThatWerePutTogether:
    def test_are_read(self, record, capsys):
        first, second = record("1.mcap"), record("2.mcap", count=2)
        first.write_bytes(first.read_bytes() + second.read_bytes())
        capsys.readouterr()
        assert main(["inspect", str(first)]) == 0
        told = capsys.readouterr().out
        assert "5 traps: 5 handled" in told
        assert "problem" not in told
        assert main(["report", str(first)]) == 0
        assert main(["export", str(first), "--to", "jsonl"]) == 0

    def test_of_one_vm_have_the_first_run_replayed(self, record, capsys):
        first, second = record("1.mcap"), record("2.mcap", count=2)
        first.write_bytes(first.read_bytes() + second.read_bytes())
        assert replay(first) == 0
        told = capsys.readouterr().out
        assert "3 requests compared, 0 different" in told
        assert "not compared: 2 (it is of a later run of its VM" in told
        assert replay(first, "--strict") == 1

    def test_of_two_vms_are_both_replayed(self, record, capsys):
        first, second = record("1.mcap", vm="a"), record("2.mcap", count=2, vm="b")
        first.write_bytes(first.read_bytes() + second.read_bytes())
        assert replay(first) == 0
        assert "5 requests compared, 0 different" in capsys.readouterr().out

    def test_a_vm_that_is_named_twice_is_replayed_once(self, record, capsys):
        assert replay(record("1.mcap"), "--vm", "vm", "--vm", "vm") == 0
        assert "3 requests compared" in capsys.readouterr().out

    def test_other_bytes_behind_the_end_are_told(self, record, capsys):
        path = record("1.mcap")
        path.write_bytes(path.read_bytes() + b"hello")
        assert main(["inspect", str(path)]) == 0
        assert "5 bytes behind the end are not read" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("handler", [HANDLER, READ_ONCE], ids=["each reads", "the first reads"])
def test_a_report_takes_each_recording_with_memory(folder, record, count, handler):
    (folder / "probe.py").write_text(handler)
    path = record("run.mcap", count=count)
    assert main(["report", str(path)]) == 0
    page = path.with_suffix(".html").read_text()
    packed = max(re.findall(r"[A-Za-z0-9+/=]{200,}", page), key=len)
    assert b'"access_flags"' in gzip.decompress(base64.b64decode(packed))


@pytest.mark.parametrize(
    "words",
    [
        ["report", "run.mcap", "-o"],
        ["inspect"],
        ["handlers", "list"],
        ["export", "run.mcap", "--to", "jsonl", "-o"],
    ],
)
def test_a_name_that_is_too_long_is_one_line(record, capsys, words):
    record("run.mcap")
    capsys.readouterr()
    assert main([*words, "9" * 400]) in (1, 2)
    line = capsys.readouterr().err
    assert line.startswith("vmibridge: 9999")
    assert line.count("\n") == 1


def test_an_elf_file_is_not_run_as_an_image(folder, capsys):
    (folder / "guest.elf").write_bytes(b"\x7fELF" + bytes(1000))
    assert main(["run", "--backend", "unicorn:guest.elf", "--handlers", "probe.py"]) == 2
    assert "is an ELF file" in capsys.readouterr().err


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("there", [False, True], ids=["missing", "no PEM"])
def test_a_wrong_certificate_is_one_line_of_an_agent(folder, image, capsys, loop, there):
    if there:
        for name in ("cert", "key", "ca"):
            (folder / name).write_text("no PEM")
    words = ["--backend", f"unicorn:{image('hlt')}", "--async-backend", loop]
    assert main(["agent", *words, "--connect", "tls:localhost:1?cert=cert&key=key&ca=ca"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("vmibridge: tls:localhost:1: cert")
    assert line.count("\n") == 1


def test_a_full_jetstream_is_told_as_full(folder, record, capsys):
    store = f'jetstream {{ store_dir: "{folder / "store"}", max_file_store: 1KB }}'
    with nats_server(folder, store) as server:
        path = record("run.mcap")
        capsys.readouterr()
        assert main(["recordings", "put", str(path), server.url]) == 1
    told = capsys.readouterr().err
    assert "JetStream refuses: " in told
    assert "has no JetStream" not in told


def test_a_cached_plugin_is_taken_from_this_user_alone(tmp_path):
    tmp_path.chmod(0o700)
    plugin = tmp_path / "plugin.so"
    assert not is_own_file(plugin)
    plugin.write_bytes(b"")
    plugin.chmod(0o755)
    assert is_own_file(plugin)
    plugin.chmod(0o775)
    assert not is_own_file(plugin)
    plugin.chmod(0o755)
    tmp_path.chmod(0o777)
    assert not is_own_file(plugin)
    tmp_path.chmod(0o700)
    link = tmp_path / "link.so"
    link.symlink_to(plugin)
    assert not is_own_file(link)


@pytest.mark.parametrize(
    ("arguments", "has"),
    [
        ("-m 512 -machine q35", False),
        ("-object rng-random,id=r", False),
        ("-object memory-backend-ram,id=m,size=1G -machine memory-backend=m", True),
        ("-M q35,memory-backend=m", True),
        ("-numa node,memdev=m", True),
        ("-mem-path /dev/hugepages", True),
    ],
)
def test_a_memory_backend_of_the_users_own_is_seen(arguments, has):
    assert has_memory_backend(arguments.split()) is has


def test_shared_memory_beside_it_is_refused(folder, capsys):
    words = ["--qemu", "/bin/true", "--share-memory", "--handlers", "probe.py", "--"]
    (folder / "qemu").write_text("#!/bin/sh\necho QEMU emulator version 11.1.3\n")
    (folder / "qemu").chmod(0o700)
    words[1] = str(folder / "qemu")
    assert main(["qemu", "run", *words, "-machine", "memory-backend=m"]) == 2
    assert "memory backend of their own" in capsys.readouterr().err
