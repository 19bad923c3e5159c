"""The architecture of a VM in its recording: named by the session, and how its traps are read."""

import io
from pathlib import Path

import msgspec
import pytest
from recorded_messages import export, read
from recorded_session import session, trap, write_file
from toy_architecture import MASK, TOY, ToyBackend, ToyRegisters, known_toy, page_tables, toy_trap

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer
from vmibridge.cli import main
from vmibridge.errors import RecordingReadError
from vmibridge.recording import (
    NewRecording,
    Recorder,
    RecordingReader,
    ReplayBackend,
    ReplayOptions,
    recorded_traps,
)
from vmibridge.recording.edit.editing import EditOptions, edit
from vmibridge.recording.file.recover import recover
from vmibridge.recording.json_lines import messages_of_lines
from vmibridge.recording.messages import (
    SESSION,
    TRAP,
    RecordedArchitecture,
    Session,
    architecture_of,
)
from vmibridge.testing import FakeGuest
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.trap import Registers, TrapEvent

pytestmark = pytest.mark.anyio
PACKET = BridgePacket(0x0701_0701, 1, 1, 0x1000, 4)
MEMORY = page_tables(0x50) | {0x5000: b"word".ljust(256, b"\0"), 0x1000: b"x86's"}


class Read(BridgeHandler[bytes]):
    REQUEST = 1
    name = "read"

    async def handle(self, vmi, packet):
        word = await vmi.memory.read(packet.value1, packet.value2)
        return BridgeResponse(value1=int.from_bytes(word, "big")).with_output(word)


async def call(vm):
    await vm.call(PACKET)


async def record(path):
    """A server with a VM of each architecture."""
    traps = [toy_trap(values=(0, 4, MASK, 9)), toy_trap(2, values=(2, 1), vcpu=1)]
    async with (
        Recorder(path) as recorder,
        ToyBackend(traps, memory=MEMORY, vm="toy") as toy,
        FakeGuest(call, vm="pc", memory=MEMORY) as pc,
    ):
        server = BridgeServer([toy, pc], lambda _: Bridge(Read()), taps=[recorder])
        return [outcome async for outcome in server.run()]


def messages(path, *kinds):
    with RecordingReader(path) as reader:
        return [message for _, message in reader.messages(*kinds)]


class TestASession:
    async def test_names_it(self, tmp_path):
        with known_toy():
            await record(tmp_path / "run.mcap")
            found = {
                each.vm: each.architecture for each in messages(tmp_path / "run.mcap", SESSION)
            }
        assert found == {
            "toy": RecordedArchitecture("toy", 3),
            "pc": RecordedArchitecture("x86", 1),
        }

    async def test_has_the_format_of_today(self, tmp_path):
        """0.2.0 reads format 1 only, and would take the registers of others for zeros."""
        with known_toy():
            await record(tmp_path / "run.mcap")
            found = {each.vm: each.format for each in messages(tmp_path / "run.mcap", SESSION)}
        assert found == {"toy": 4, "pc": 4}

    def test_writes_it_out(self):
        """Also that of x86: what is left out is a recording of 0.2.0."""
        written = msgspec.to_builtins(Session("pc", architecture=RecordedArchitecture("x86", 1)))
        assert written["architecture"] == {"name": "x86", "version": 1}

    def test_of_the_golden_recording_of_0_2_0_is_of_x86(self):
        found = messages(Path(__file__).parent / "golden" / "0.2.0.mcap", SESSION, TRAP)
        sessions = [each for each in found if isinstance(each, Session)]
        assert [(each.format, each.architecture) for each in sessions] == [(1, None)] * 2
        assert {architecture_of(each) for each in sessions} == {X86}
        assert {each.architecture for each in found if isinstance(each, TrapEvent)} == {X86}

    def test_of_0_2_0_is_of_x86(self):
        assert "architecture" not in msgspec.to_builtins(session())
        assert architecture_of(session()) is X86


class TestTraps:
    async def test_are_read_with_the_registers_of_their_vm(self, tmp_path):
        with known_toy():
            outcomes = await record(tmp_path / "run.mcap")
            traps = list(recorded_traps_of(tmp_path / "run.mcap"))
            assert {each.event.architecture for each in traps} == {TOY, X86}
        recorded = {(each.event.vm, each.event.seq): each for each in traps}
        assert len(recorded) == len(outcomes) == 3
        for outcome in outcomes:
            event = outcome.event
            found = recorded[event.vm, event.seq]
            assert msgspec.structs.astuple(found.event) == msgspec.structs.astuple(event)
            assert found.packet == outcome.packet
            assert isinstance(found.event, TrapEvent)
        assert type(recorded["toy", 1].event.registers) is ToyRegisters
        assert type(recorded["pc", 1].event.registers) is Registers

    async def test_are_read_so_where_nothing_else_is_asked_for(self, tmp_path):
        with known_toy():
            await record(tmp_path / "run.mcap")
            found = messages(tmp_path / "run.mcap", TRAP)
        assert sorted(type(each.registers).__name__ for each in found) == [
            "Registers",
            "ToyRegisters",
            "ToyRegisters",
        ]

    async def test_are_replayed(self, tmp_path):
        with known_toy():
            await record(tmp_path / "run.mcap")
            async with ReplayBackend(tmp_path / "run.mcap", ReplayOptions(vm="toy")) as backend:
                assert backend.architecture is TOY
                server = BridgeServer(backend, Read(), taps=[backend])
                outcomes = [outcome async for outcome in server.run()]
        assert [outcome.output for outcome in outcomes] == [b"word", b"r"]
        assert (backend.result.compared, backend.result.different) == (2, 0)

    @pytest.mark.parametrize("to", ["jsonl", "sqlite", "perfetto"])
    def test_are_exported_and_reported(self, tmp_path, to):
        path = tmp_path / "run.mcap"
        session_of_toy = Session("toy", architecture=RecordedArchitecture("toy", 3))
        with known_toy():
            write_file(path, [(1, session_of_toy), (2, toy_trap(values=(0xABCD,)))])
            assert main(["export", str(path), "--to", to]) == 0
            assert main(["inspect", str(path), "--json", "--full"]) == 0
            assert main(["report", str(path), "-o", str(tmp_path / "run.html")]) == 0
        if to == "jsonl":
            assert '"g2":43981' in (tmp_path / "run.jsonl").read_text()

    def test_are_recovered_edited_and_imported(self, tmp_path):
        path, clean, part = (tmp_path / name for name in ("run.mcap", "clean.mcap", "part.mcap"))
        session_of_toy = Session("toy", architecture=RecordedArchitecture("toy", 3))
        with known_toy():
            write_file(path, [(1, session_of_toy), (2, toy_trap(values=(0xABCD,)))])
            recorded = read(path)
            assert type(recorded[1][1].registers) is ToyRegisters
            assert recover(path, clean).messages["trap"] == 1
            edit([path], part, EditOptions())
            assert read(clean) == read(part) == recorded
            lines = export(path, tmp_path / "run.jsonl")
            assert [tuple(each) for each in messages_of_lines(io.BytesIO(lines), "x")] == recorded
            with NewRecording(tmp_path / "new.mcap") as made:
                for time, message in recorded:
                    made.add(message, time)
            assert read(tmp_path / "new.mcap") == recorded

    async def test_are_redacted(self, tmp_path):
        path = tmp_path / "run.mcap"
        with known_toy():
            async with (
                Recorder(path, redact=["value1"]) as recorder,
                ToyBackend([toy_trap(values=(0, 4))], memory=MEMORY, vm="toy") as toy,
            ):
                server = BridgeServer(toy, Read(), taps=[recorder])
                assert [outcome.output async for outcome in server.run()] == [b"word"]
            (event,) = messages(path, TRAP)
        kept = event.registers
        assert (kept.g0, kept.g1, kept.g2) == (0, 4, 0)
        assert (kept.pc, kept.g4, kept.medium) == (0x4000, 40, 0x0701_0701)


class TestWhatIsNotKnown:
    @pytest.mark.parametrize(
        ("name", "version", "why"),
        [
            ("toy", 3, "architecture 'toy' version 3 is not known here"),
            ("x86", 2, "'x86' version 2 is not known here: this vmibridge knows x86 version 1"),
            ("a\nb", 1, r"architecture 'a\\nb' version 1"),
        ],
    )
    @pytest.mark.parametrize("kinds", [(), (SESSION,), (TRAP,)], ids=["all", "session", "trap"])
    def test_is_not_read(self, tmp_path, name, version, why, kinds):
        told = Session("vm", architecture=RecordedArchitecture(name, version))
        path = write_file(tmp_path / "run.mcap", [(1, told), (2, trap(1))])
        with pytest.raises(RecordingReadError, match=why) as error:
            messages(path, *kinds)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("command", ["inspect", "report", "export", "replay"])
    def test_is_one_line_of_a_command(self, tmp_path, capfd, command):
        told = Session("vm", architecture=RecordedArchitecture("toy", 3))
        path = write_file(tmp_path / "run.mcap", [(1, told), (2, trap(1))])
        more = {
            "report": ["-o", str(tmp_path / "x.html")],
            "export": ["--to", "jsonl"],
            "replay": ["--handlers", "hello"],
        }
        assert main([command, str(path), *more.get(command, [])]) != 0
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1
        assert "'toy' version 3 is not known here" in said[0]

    def test_a_vm_without_a_session_is_of_x86(self, tmp_path):
        told = Session("toy", architecture=RecordedArchitecture("toy", 3))
        chunk = [(1, told), (2, toy_trap()), (3, trap(1, vm="lost its session"))]
        with known_toy():
            found = messages(write_file(tmp_path / "run.mcap", chunk), TRAP)
        assert [type(each.registers) for each in found] == [ToyRegisters, Registers]


def recorded_traps_of(path):
    with RecordingReader(path) as reader:
        yield from recorded_traps(reader.messages())
