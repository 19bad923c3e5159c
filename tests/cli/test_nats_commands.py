"""`vmibridge agent`, `serve` and `recordings` on a real NATS, as processes of their own."""

import json
import signal
from types import SimpleNamespace

import pytest
from nats_parts import nats_server, serve_processes

from vmibridge.cli import main
from vmibridge.errors import RecordingError
from vmibridge.transport.nats import store as nats_store

PASSED = 0x600D

# Asks for 1 + r12, COUNT times.
GUEST = """
    mov r12d, 20
next:
    mov r8, r12
    mov ecx, 0x42494d56
    mov edx, 0x10100
    vmcall
    lea rbx, [r12 + 1]
    mov rsi, 1
    cmp rax, rbx
    jne done
    dec r12d
    jnz next
    mov rsi, 0x600d
done:
    mov rax, rsi
    hlt
"""


@pytest.fixture
def jetstream(tmp_path):
    with nats_server(tmp_path, f'jetstream {{ store_dir: "{tmp_path / "jetstream"}" }}') as server:
        yield server


@pytest.fixture
def recording(tmp_path):
    file = tmp_path / "web-1.mcap"
    file.write_bytes(b"\x89MCAP0\r\n" + bytes(range(256)) * 2000 + b"\x89MCAP0\r\n")
    return file


def agent(vmibridge, nats, guest, *options):
    return vmibridge(
        "agent", "--backend", f"web=unicorn:{guest}", "--connect", nats.url, *options
    )  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """A command in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main([str(each) for each in arguments])
        told = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=told.out, stderr=told.err)

    return run


# Coverage in a process whose loop waits makes that fail (Python 3.11).
@pytest.mark.no_cover
class TestAgentAndServe:
    def test_the_summary_says_which_server_answered_how_many(
        self, nats, vmibridge, image, tmp_path
    ):
        with serve_processes(tmp_path, nats.url, 2) as servers:
            done = agent(vmibridge, nats, image(GUEST), "--json")
            assert done.returncode == 0, done.stderr
            summary = json.loads(done.stdout)["summary"]
            assert summary["guest"][0]["registers"]["rax"] == PASSED
            assert summary["answered"] == sum(summary["servers"].values()) == 20
            ran = [len(each.ran()) for each in servers]
            assert sorted(share for share in ran if share) == sorted(summary["servers"].values())
            for each in servers:
                each.process.send_signal(signal.SIGTERM)
            assert [each.process.wait() for each in servers] == [143, 143]

    def test_so_it_does_in_words(self, nats, vmibridge, image, tmp_path):
        with serve_processes(tmp_path, nats.url, 1):
            done = agent(vmibridge, nats, image(GUEST))
        assert "20 traps: 20 answered by the server" in done.stdout
        assert "; by server: " in done.stdout

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ("user=web&password=s3cret-x", "NATS refuses us: wrong credentials, or none"),
            ("credentials=FILE", "credentials: FILE: holds no JWT of a user"),
            ("nkey=FILE", "nkey: FILE: holds no seed of an nkey"),
            ("ca=FILE", "ca: FILE: no certificate or crl found"),
            ("user=web&password=s3cret-w", "NATS does not permit "),
        ],
    )
    def test_what_nats_does_not_take_is_said_in_one_line(
        self, vmibridge, image, handlers, tmp_path, options, says
    ):
        file = tmp_path / "secret"
        file.write_text("s3cret")
        users = """authorization { users = [
            { user: web, password: "s3cret-w", permissions: { publish: "else", subscribe: "else" } }
        ] }"""
        with nats_server(tmp_path, users) as nats:
            nats.url += f"?{options}".replace("FILE", str(file))
            for done in (
                agent(vmibridge, nats, image(GUEST)),
                vmibridge("serve", "--listen", nats.url, "--handlers", handlers),
            ):
                assert done.returncode == 1
                (line,) = done.stderr.splitlines()
                assert says.replace("FILE", str(file)) in line
                assert "s3cret" not in line

    def test_trio_is_refused_in_one_line(self, nats, vmibridge, image, handlers):
        for done in (
            agent(vmibridge, nats, image(GUEST), "--async-backend", "trio"),
            vmibridge("serve", "--listen", nats.url, "--handlers", handlers,
                      "--async-backend", "trio"),
        ):  # fmt: skip
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1].endswith(
                "nats-py is for asyncio: run without --async-backend trio"
            )


class TestRecordings:
    def test_one_that_is_kept_comes_back_as_it_was(self, jetstream, here, recording, tmp_path):
        url = jetstream.url
        done = here("recordings", "put", recording, url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == [str(recording.stat().st_size), "web-1.mcap"]
        done = here("recordings", "get", "web-1.mcap", url, "-o", "again.mcap", "--json")
        assert json.loads(done.stdout)["name"] == "web-1.mcap"
        assert (tmp_path / "again.mcap").read_bytes() == recording.read_bytes()
        here("recordings", "put", recording, url, "--name", "other")
        done = here("recordings", "list", url, "--json")
        assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == [
            "other",
            "web-1.mcap",
        ]
        assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            (["put", "cut.mcap", "URL"], 1, "is not finished"),
            (["put", "text", "URL"], 1, "is not a recording"),
            (["put", "nowhere", "URL"], 1, "No such file"),
            (["put", "web-1.mcap", "unix:x"], 2, "recordings are kept at nats://HOST:PORT"),
            (["put", "web-1.mcap", "URL?bucket=a/b"], 1, "a store has letters"),
            (["get", "web-1.mcap", "URL"], 1, "already exists"),
            (["get", "nothing", "URL"], 1, "no recording of that name"),
            (["get", "nothing", "URL?bucket=none"], 1, "there is no store none"),
            (["list", "URL?bucket=none"], 1, "there is no store none"),
        ],
    )
    def test_what_cannot_be_done_is_said(
        self, jetstream, here, recording, tmp_path, arguments, status, says
    ):
        here("recordings", "put", recording, jetstream.url, "--name", "there")
        (tmp_path / "cut.mcap").write_bytes(recording.read_bytes()[:-4])
        (tmp_path / "text").write_text("text")
        done = here(
            "recordings", *[each.replace("URL", jetstream.url) for each in arguments]
        )  # fmt: skip
        assert done.returncode == status
        assert says in done.stderr

    def test_a_name_that_is_taken_is_not_written_over(self, jetstream, here, recording):
        assert here("recordings", "put", recording, jetstream.url).returncode == 0
        done = here("recordings", "put", recording, jetstream.url)
        assert (done.returncode, "web-1.mcap: already exists" in done.stderr) == (1, True)

    def test_a_nats_without_jetstream_is_said(self, nats, here, recording):
        done = here("recordings", "put", recording, nats.url)
        assert (done.returncode, "has no JetStream" in done.stderr) == (1, True)

    def test_and_so_is_that_there_is_none(self, tmp_path, here):
        done = here("recordings", "list", "nats://127.0.0.1:1")
        assert done.returncode == 1
        assert "connection refused" in done.stderr

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_an_empty_store_lists_nothing(self, jetstream, recording, tmp_path):
        from vmibridge.transport.urls.nats import parse_nats_url

        url = parse_nats_url(jetstream.url)
        kept = await nats_store.put_recording(url, recording)
        assert await nats_store.list_recordings(url) == [kept]
        with pytest.raises(RecordingError, match="already exists"):
            await nats_store.put_recording(url, recording)
        await nats_store.get_recording(url, kept.name, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == recording.read_bytes()
