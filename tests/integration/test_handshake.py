"""The handshake with real guests: they check the host, and it must not fool them."""

import math
import re
from pathlib import Path

import pytest
from flipping_host import INFO, FlippingHost

from vmibridge import Bridge, BridgeHandler, BridgeServer, OutcomeKind, open_backend
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.handshake import NO_END, VERSION, Feature, Host, HostInfo, Limit

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
CPUID, VMCALL, VMMCALL = 1, 2, 3
FORMS = {
    "x64-cpuid": (64, CPUID),
    "x64-vmcall": (64, VMCALL),
    "x64-vmmcall": (64, VMMCALL),
    "x86-cpuid": (32, CPUID),
    "x86-vmcall": (32, VMCALL),
    "x86-vmmcall": (32, VMMCALL),
}
every_form = pytest.mark.parametrize(("width", "how"), FORMS.values(), ids=FORMS)

# What a guest of `handshake.asm` ends with: the check that failed, or that all passed.
NO_VERSION, NO_SELF_TEST, PASSED = 1, 8, 0x600D

EXPECTED = {
    "FEATURES": 5,
    "SOFT": 250,
    "HARD": 60_000,
    "ACCESS": 16 << 20,
    "IN_FLIGHT": 17,
    "RESULT_TIMEOUT": 30_000,
}
ENDLESS = HostInfo(
    features=Feature(0x8000_0000),
    soft_timeout=None,
    timeout=math.inf,
    result_timeout=1e9,
    in_flight=1 << 40,
)
EXPECTED_OF_ENDLESS = {
    "FEATURES": 0x8000_0000,
    "SOFT": 0,
    "HARD": 0xFFFF_FFFF,
    "ACCESS": 16 << 20,
    "IN_FLIGHT": 0xFFFF_FFFF,
    "RESULT_TIMEOUT": 0xFFFF_FFFF,
}


class Other(BridgeHandler[None]):
    """Makes the standard magic the bridge's own, without a handshake."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    may_wait = True

    async def handle(self, vmi, packet):
        return None


class Flips(FlippingHost):
    """Answers echoes with one bit of one register wrong."""

    async def handle(self, vmi, packet):
        if packet.method < 0x0010:
            return await super().handle(vmi, packet)
        if self.side == "request":
            return await super().handle(vmi, self.flip(packet))
        return self.flip(await super().handle(vmi, packet))


async def run_guest(build_guest, width, how, handler, expected=EXPECTED, **options):
    """Run `handshake.asm` with this handler alone: what it ended with, and the outcomes."""
    image = build_guest("handshake", WIDTH=width, HOW=how, **expected)
    async with open_backend(f"unicorn:{image}?width={width}") as backend:
        server = BridgeServer(backend, Bridge(handler), **{"handshake": False} | options)
        outcomes = [outcome async for outcome in server.run()]
    (end,) = server.summary.guest.vcpus
    assert end.reason == "halted", end.detail
    return end.registers["rax"], outcomes


@every_form
@pytest.mark.parametrize(
    ("info", "expected"),
    [(INFO, EXPECTED), (ENDLESS, EXPECTED_OF_ENDLESS)],
    ids=["bounded", "endless"],
)
async def test_a_guest_learns_what_there_is_and_tests_its_registers(
    build_guest, width, how, info, expected
):
    end, outcomes = await run_guest(build_guest, width, how, Host(info), expected)
    assert end == PASSED
    assert [(o.kind, o.handler) for o in outcomes] == [(OutcomeKind.HANDLED, "host")] * 10


@every_form
async def test_a_server_answers_it_unasked_with_its_own_settings(build_guest, width, how):
    end, outcomes = await run_guest(
        build_guest,
        width,
        how,
        Other(),
        EXPECTED | {"FEATURES": 1},
        handshake=True,
        soft_timeout=0.25,
        timeout=60.0,
        result_timeout=30.0,
        in_flight=17,
    )
    assert end == PASSED
    assert {o.handler for o in outcomes} == {"host"}


@every_form
async def test_a_host_without_a_handshake_looks_like_none(build_guest, width, how):
    end, outcomes = await run_guest(build_guest, width, how, Other())
    assert (end, [o.kind for o in outcomes]) == (NO_VERSION, [OutcomeKind.UNMATCHED])


@pytest.mark.parametrize("width", [64, 32])
async def test_no_host_at_all_is_safe_to_ask_by_cpuid(build_guest, width):
    class Elsewhere(Other):
        MAGIC = 0x1234_5678

    end, outcomes = await run_guest(build_guest, width, CPUID, Elsewhere())
    assert (end, outcomes) == (NO_VERSION, [])


@every_form
async def test_a_host_of_another_major_version_is_not_taken(build_guest, width, how, monkeypatch):
    monkeypatch.setattr("vmibridge.engine.handshake.VERSION", 0x0002_0000)
    end, _ = await run_guest(build_guest, width, how, Host(INFO))
    assert end == NO_VERSION


def values_of(width, how):
    return (
        ["value1", "value2"] if (width, how) == (32, VMCALL) else [f"value{n}" for n in range(1, 5)]
    )


@pytest.mark.parametrize(
    ("width", "how", "side", "value", "bit"),
    [
        pytest.param(width, how, side, value, bit, id=f"{form}-{side}-{value}-{bit}")
        for form, (width, how) in FORMS.items()
        if how != VMMCALL
        for side, values in (("request", values_of(width, how)), ("response", ["value1", "value2"]))
        for value in values
        for bit in (0, width - 1)
    ],
)
@pytest.mark.no_cover
async def test_the_self_test_finds_one_wrong_bit(build_guest, width, how, side, value, bit):
    end, _ = await run_guest(build_guest, width, how, Flips(INFO, side, value, bit))
    assert end == NO_SELF_TEST


@every_form
@pytest.mark.parametrize("stamp", ["VERIFY_VALUE3", "VERIFY_VALUE4"])
async def test_a_wrong_stamp_is_no_host(build_guest, width, how, stamp, monkeypatch):
    monkeypatch.setattr(Host, stamp, getattr(Host, stamp) ^ 1)
    end, _ = await run_guest(build_guest, width, how, Host(INFO))
    assert end == NO_VERSION


def test_the_guests_constants_are_the_hosts():
    source = (ROOT / "guest/include/handshake.inc").read_text()
    found = re.findall(r"^BRIDGE_(\w+) +equ +(0x\w+|\d+)(?: << (\d+))?", source, re.MULTILINE)
    constants = {name: int(value, 0) << int(shift or 0) for name, value, shift in found}
    patterns = [constants.pop(f"PATTERN{n}").to_bytes(8) for n in range(1, 5)]
    assert len(set(b"".join(patterns))) == 4 * 8
    assert constants == {
        "HOST": Host.REQUEST,
        **{f"HOST_{m.name.upper()}": code for code, m in Host.methods.items()},
        "VERSION_MAJOR": VERSION >> 16,
        "NO_END": NO_END,
        **{f"FEATURE_{feature.name}": feature for feature in Feature},
        **{f"LIMIT_{limit.name}": limit for limit in Limit},
    }
