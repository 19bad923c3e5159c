"""A gate asks a service or a person, and what is no clear yes in time is the default."""

import contextlib
import json
import logging
import socket
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import anyio
import msgspec
import pytest

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    BridgePacket,
    BridgeServer,
    Gate,
    OutcomeKind,
)
from vmibridge.errors import MissingExtraError
from vmibridge.handlers import _gate_askers
from vmibridge.handlers.exec_gate import ExecGate, GateDecision, Why
from vmibridge.testing import FakeGuest, drive

COMMAND = 0x1000
ASK = BridgePacket(STANDARD_MAGIC, 0x0113, 1, COMMAND)
MEMORY = {COMMAND: b"rm -rf /\0"}
STAMPS = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)


def gate(**fields):
    return ExecGate(ExecGate.Settings(**{"patience": 20.0, **fields}))


async def asked(handler, memory=MEMORY):
    """The code of the gate and why, of one request."""
    outcome = await drive(handler, ASK, memory)
    assert outcome.kind is OutcomeKind.HANDLED, outcome.error
    assert outcome.response.values[2:] == STAMPS
    code, why = outcome.response.values[:2]
    if outcome.output is not None:
        assert outcome.output == GateDecision("rm -rf /", code, why)
    return Gate(code), Why(why)


# --- nobody ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_without_anybody_to_ask_nothing_may_run():
    assert await asked(ExecGate()) == (Gate.ABORT, Why.NO_ANSWER)


@pytest.mark.anyio
async def test_the_default_is_a_setting():
    assert await asked(gate(default="continue")) == (Gate.CONTINUE, Why.NO_ANSWER)


@pytest.mark.anyio
@pytest.mark.parametrize("memory", [{}, {COMMAND: b"\xff\0"}, {COMMAND: b"a" * 4097 + b"\0"}])
async def test_a_command_that_cannot_be_read_may_not_run_whatever_the_default(memory):
    assert await asked(gate(default="continue"), memory) == (Gate.ABORT, Why.NO_COMMAND)


# --- a service -------------------------------------------------------------------------


class Policy(ThreadingHTTPServer):
    """Answers with `status` and `body`, or not at all when they are `None`."""

    def __init__(self):
        self.status, self.body = 200, b'{"verdict": "continue"}'
        self.questions, self.headers = [], []
        self.arrived, self.go = threading.Semaphore(0), threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/ask?of=it"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Policy

    def do_POST(self):
        policy = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        policy.questions.append((self.path, json.loads(body)))
        policy.headers.append(self.headers)
        policy.arrived.release()
        if policy.body is None:
            policy.go.wait(20)
            self.close_connection = True
            return
        self.send_response(policy.status)
        self.send_header("Content-Length", str(len(policy.body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(policy.body)

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def policy():
    server = Policy()
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.002))
    thread.start()
    yield server
    server.go.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.anyio
@pytest.mark.parametrize(("verdict", "code"), [("continue", Gate.CONTINUE), ("abort", Gate.ABORT)])
async def test_a_service_decides(policy, verdict, code):
    policy.body = json.dumps({"verdict": verdict, "more": 1}).encode()
    default = "abort" if code is Gate.CONTINUE else "continue"
    handler = gate(webhook=policy.url, default=default)
    assert await asked(handler) == (code, Why.DECIDED)
    ((path, question),) = policy.questions
    assert path == "/ask?of=it"
    assert question.pop("time") >= 0
    assert question == {"vm": "vm", "vcpu": 0, "address_space": 0, "command": "rm -rf /"}
    assert "Authorization" not in policy.headers[0]


@pytest.mark.anyio
async def test_a_token_goes_along(policy):
    await asked(gate(webhook=policy.url, token="s3cret"))
    assert policy.headers[0]["Authorization"] == "Bearer s3cret"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b'{"verdict": "continue"}'),
        (302, b'{"verdict": "continue"}'),
        (200, b""),
        (200, b"continue"),
        (200, b'{"verdict": "Continue"}'),
        (200, b'{"verdict": true}'),
        (200, b"{}"),
        (200, b'{"verdict": "continue"' + b" " * 70_000 + b"}"),
        (200, b"\xff\xfe\x00"),
    ],
)
async def test_anything_else_is_no_answer(policy, caplog, status, body):
    caplog.set_level(logging.WARNING, "vmibridge.exec_gate")
    policy.status, policy.body = status, body
    assert await asked(gate(webhook=policy.url)) == (Gate.ABORT, Why.NO_ANSWER)
    assert "no answer of the webhook" in caplog.text


@pytest.mark.anyio
async def test_a_service_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    assert await asked(gate(webhook=url)) == (Gate.ABORT, Why.NO_ANSWER)


@pytest.mark.anyio
async def test_a_service_that_takes_too_long(policy):
    policy.body = None
    handler = gate(webhook=policy.url, patience=0.05)
    assert await asked(handler) == (Gate.ABORT, Why.NO_ANSWER)


@pytest.mark.anyio
async def test_one_question_more_than_may_be_gets_the_default(policy):
    policy.body = None
    handler = gate(webhook=policy.url, max_questions=1)
    codes = []

    async def guest(vm):
        async def call(vcpu):
            while (answer := await vm.call(ASK, vcpu=vcpu)).rax == Gate.WAIT:
                pass
            codes.append(answer.values[:2])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, 0)
            await anyio.to_thread.run_sync(policy.arrived.acquire)
            await call(1)
            # Now the service ends the connection without an answer.
            policy.go.set()

    async with FakeGuest(guest, memory=MEMORY) as backend:
        async for _ in BridgeServer(backend, handler).run():
            pass
    assert codes == [(Gate.ABORT, Why.TOO_MANY), (Gate.ABORT, Why.NO_ANSWER)]


# --- a person --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "questions"


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(_gate_askers, "LOOK_AGAIN", 0.001)


async def question_in(folder):
    """The file of the one question, when it is there."""
    while not (found := list(folder.glob("*.json"))):
        await anyio.sleep(0.001)
    return found[0]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("suffixes", "code"),
    [
        ([".continue"], Gate.CONTINUE),
        ([".abort"], Gate.ABORT),
    ],
)
async def test_a_person_decides(folder, suffixes, code):
    given = []

    async def ask():
        given.append(await asked(gate(folder=str(folder))))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        question = await question_in(folder)
        assert json.loads(question.read_bytes())["command"] == "rm -rf /"
        assert (folder.stat().st_mode & 0o777, question.stat().st_mode & 0o777) == (0o700, 0o600)
        for suffix in suffixes:
            question.with_suffix(suffix).touch()
    assert given == [(code, Why.DECIDED)]
    assert list(folder.iterdir()) == []


@pytest.mark.anyio
async def test_of_two_answers_the_one_that_lets_nothing_happen_counts(folder, monkeypatch):
    number = UUID(int=7)
    monkeypatch.setattr(_gate_askers, "uuid4", lambda: number)
    folder.mkdir()
    for suffix in ("continue", "abort"):
        (folder / f"{number.hex[:12]}.{suffix}").touch()
    assert await asked(gate(folder=str(folder))) == (Gate.ABORT, Why.DECIDED)


@pytest.mark.anyio
async def test_what_the_guest_sends_cannot_steer_the_terminal_of_a_person(folder):
    question = _gate_askers.Question("vm", 0, 0, 0, "\x1b[2J\u202e\x7fok")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_gate_askers.Folder(str(folder)).ask, question)
        data = (await question_in(folder)).read_text()
        tasks.cancel_scope.cancel()
    assert all(char.isprintable() or char == "\n" for char in data)
    assert json.loads(data)["command"] == question.command


@pytest.mark.anyio
async def test_a_question_that_nobody_waits_for_is_taken_away(folder):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drive, gate(folder=str(folder)), ASK, MEMORY)
        await question_in(folder)
        tasks.cancel_scope.cancel()
    assert list(folder.iterdir()) == []


@pytest.mark.anyio
async def test_a_folder_that_cannot_be_made(folder, caplog):
    caplog.set_level(logging.WARNING, "vmibridge.exec_gate")
    assert await asked(gate(folder=str(folder / "below"))) == (Gate.ABORT, Why.NO_ANSWER)
    early, late = caplog.messages
    assert "the folder around it is not there" in early
    assert "No such file or directory" in late


@pytest.mark.anyio
async def test_a_folder_that_is_a_file_is_told_before_a_guest_asks(folder, caplog):
    folder.touch()
    async with gate(folder=str(folder)):
        assert caplog.messages == [f"exec_gate: {folder}: is no folder"]


@pytest.mark.anyio
async def test_the_guest_is_told_to_wait_and_gets_the_answer(folder):
    handler = gate(folder=str(folder))
    codes = []

    async def guest(vm):
        while (answer := await vm.call(ASK)).rax == Gate.WAIT:
            (await question_in(folder)).with_suffix(".continue").touch()
        codes.append(answer.rax)

    async with FakeGuest(guest, memory=MEMORY) as backend:
        outcomes = [each async for each in BridgeServer(backend, handler).run()]
    assert codes == [Gate.CONTINUE]
    assert {each.kind for each in outcomes[:-1]} == {OutcomeKind.WAITING}


# --- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"webhook": "http://a/", "folder": "b"}, "webhook or folder, not both"),
        ({"webhook": "ftp://a/"}, "webhook: not of the form http"),
        ({"webhook": "http://"}, "webhook: not of the form http"),
        ({"webhook": "policy"}, "webhook: not of the form http"),
        ({"webhook": "http://a/ b"}, "printable ASCII"),
        ({"webhook": "http://a:99999999/"}, "webhook"),
        ({"webhook": "http://a:b/"}, "webhook"),
        ({"token": "a\r\nX: y"}, "token is printable ASCII"),
        ({"default": "allow"}, "default"),
        ({"patience": 0.0}, "patience"),
        ({"patience": 86401.0}, "patience"),
        ({"max_questions": 0}, "max_questions"),
        ({"url": "http://a"}, "url"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, ExecGate.Settings)


def test_its_deadline_leaves_time_for_the_answer():
    assert gate(patience=100.0).timeout > 100


def test_without_httpcore_only_the_webhook_is_missed(load_handler, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpcore", None)
    monkeypatch.delitem(sys.modules, "vmibridge.handlers._gate_askers")
    module = load_handler("exec_gate")
    module.ExecGate(module.ExecGate.Settings(folder="questions"))
    with pytest.raises(MissingExtraError, match="the extra 'exec_gate'"):
        module.ExecGate(module.ExecGate.Settings(webhook="http://a/"))
