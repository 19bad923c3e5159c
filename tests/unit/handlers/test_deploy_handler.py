"""Guests of vmi-rs that deploy: gates, downloads that fail, and hosts that follow each other."""

import logging

import anyio
import msgspec
import pytest
from upstream_guests import DEPLOY, DOWNLOAD, EXECUTE, EXIT, MEMORY, DeployGuest

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    Bridge,
    BridgePacket,
    BridgeServer,
    Gate,
    OutcomeKind,
    Status,
    StatusKind,
)
from vmibridge.handlers.deploy import Deploy
from vmibridge.handlers.hello import Hello
from vmibridge.testing import FakeGuest, drive

pytestmark = pytest.mark.anyio
STAMPS = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)
GO = {"download": "continue", "execute": "continue"}
NOT_FOUND, TIMED_OUT = 0x800C_0005, 0x800C_000B


async def serve(guest, handler, **options):
    """Serve a guest until it returns; gives the outcomes."""
    async with FakeGuest(guest.run, memory=MEMORY) as backend:
        server = BridgeServer(backend, Bridge(handler), **options)
        return [outcome async for outcome in server.run()]


async def deploy(downloads=(0,), **settings):
    guest = DeployGuest(downloads)
    outcomes = await serve(guest, Deploy(Deploy.Settings(**settings)))
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.HANDLED}
    assert outcomes[-1].output == guest.done
    return guest


async def test_a_guest_downloads_and_executes(anyio_backend):
    guest = await deploy(**GO)
    assert guest.asked == [(DOWNLOAD, 0, 0), (EXECUTE,)]
    assert guest.done == Status(5)


async def test_a_download_that_fails_is_tried_again(anyio_backend, caplog):
    guest = await deploy([NOT_FOUND, TIMED_OUT, 0], **GO)
    assert guest.asked == [
        (DOWNLOAD, 0, 0),
        (DOWNLOAD, 1, NOT_FOUND),
        (DOWNLOAD, 2, TIMED_OUT),
        (EXECUTE,),
    ]
    assert guest.done == Status(5)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == [
        "vm fake: download 1 failed with HRESULT 0x800c0005: CONTINUE",
        "vm fake: download 2 failed with HRESULT 0x800c000b: CONTINUE",
    ]


async def test_a_download_that_fails_too_often_ends_it(anyio_backend, caplog):
    guest = await deploy([NOT_FOUND] * 9, attempts=2, **GO)
    assert guest.asked == [(DOWNLOAD, 0, 0), (DOWNLOAD, 1, NOT_FOUND), (DOWNLOAD, 2, NOT_FOUND)]
    assert guest.done == Status(1, StatusKind.ABORTED)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        pytest.param({}, [(DOWNLOAD, 0, 0)], id="without settings"),
        pytest.param({"execute": "continue"}, [(DOWNLOAD, 0, 0)], id="download"),
        pytest.param({"download": "continue"}, [(DOWNLOAD, 0, 0), (EXECUTE,)], id="execute"),
    ],
)
async def test_a_gate_that_is_shut_ends_it(anyio_backend, settings, asked):
    guest = await deploy(**settings)
    assert guest.asked == asked
    assert guest.done == Status(1, StatusKind.ABORTED)


@pytest.mark.parametrize(("first", "stage"), [("download", DOWNLOAD), ("execute", EXECUTE)])
async def test_a_guest_polls_while_one_host_takes_over_from_another(anyio_backend, first, stage):
    guest = DeployGuest([NOT_FOUND, 0])
    guest.patience = 3
    hosts = [{**GO, first: "wait"}, {**GO, first: "wait"}, GO]
    for settings in hosts:
        await serve(guest, Deploy(Deploy.Settings(**settings)))
    assert guest.done == Status(5)
    assert guest.polls == 6
    assert [asked[0] for asked in guest.asked].count(stage) >= 7
    assert (DOWNLOAD, 1, NOT_FOUND) in guest.asked


async def test_a_guest_polls_where_there_is_no_host_yet(anyio_backend):
    guest = DeployGuest()
    guest.patience = 2
    await serve(guest, Hello())
    assert guest.done is None
    await serve(guest, Deploy(Deploy.Settings(**GO)))
    assert guest.done == Status(5)


@pytest.mark.parametrize("gate", ["download", "execute"])
async def test_a_gate_opens_when_its_file_is_there(tmp_path, anyio_backend, gate):
    guest = DeployGuest()
    guest.patience = 3
    settings = Deploy.Settings(**GO, **{f"{gate}_after": str(tmp_path / "ready")})
    await serve(guest, Deploy(settings))
    assert (guest.done, guest.polls) == (None, 3)
    (tmp_path / "ready").touch()
    await serve(guest, Deploy(settings))
    assert guest.done == Status(5)


async def test_a_class_of_its_own_opens_the_gates_and_may_be_slow(anyio_backend):
    class Slow(Deploy):
        REQUEST = DEPLOY

        async def may_download(self, attempt, hresult):
            assert (attempt, hresult) == (0, 0)
            while not guest.polls:
                await anyio.sleep(0.001)
            return Gate.CONTINUE

        async def may_execute(self):
            return Gate.CONTINUE

    guest = DeployGuest()
    outcomes = await serve(guest, Slow(), soft_timeout=0.001)
    assert guest.done == Status(5)
    assert guest.polls >= 1
    waiting = [each for each in outcomes if each.kind is OutcomeKind.WAITING]
    assert {each.response.values for each in waiting} == {(1, None, *STAMPS)}


@pytest.mark.parametrize(
    ("method", "values", "answer", "output"),
    [
        (DOWNLOAD, (0, 0), (0, None, *STAMPS), None),
        (EXECUTE, (0xDEAD, 0xBEEF), (0, None, *STAMPS), None),
        (EXIT, (0x8000_4005_0002_FE03, 7), (None, None, *STAMPS), Status(3, 0xFE, 2, 0x8000_4005)),
        (EXIT, (0x0002_FE03, 0x8000_4005), (None, None, *STAMPS), Status(3, 0xFE, 2, 0x8000_4005)),
        (EXIT, (5, (1 << 64) - 1), (None, None, *STAMPS), Status(5, 0, 0, 0xFFFF_FFFF)),
    ],
)
async def test_answers_are_bit_for_bit_those_of_upstream(
    anyio_backend, method, values, answer, output
):
    handler = Deploy(Deploy.Settings(**GO))
    outcome = await drive(handler, BridgePacket(STANDARD_MAGIC, DEPLOY, method, *values))
    assert outcome.response.values == answer
    assert outcome.output == output


async def test_an_unknown_method_is_rejected(anyio_backend):
    outcome = await drive(Deploy(), BridgePacket(STANDARD_MAGIC, DEPLOY, 3))
    assert outcome.kind is OutcomeKind.REJECTED


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"download": "maybe"}, "download"),
        ({"execute": 1}, "execute"),
        ({"attempts": 0}, "attempts"),
        ({"download_after": ""}, "download_after"),
        ({"execute_after": "a\0"}, "execute_after"),
        ({"color": True}, "color"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, Deploy.Settings)


def test_settings_made_in_python_are_checked_too():
    with pytest.raises(ValueError, match="download is one of continue, wait, abort"):
        Deploy.Settings(download="maybe")
