"""Settings that are made in Python: what is of another type is refused there, and ends no run."""

import pytest

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, method
from vmibridge.engine.access_policy import AddressRange, Policy, Rate
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeBackend
from vmibridge.transport import AgentLimits


class Sneaky:
    def __bool__(self):
        raise SystemExit(3)

    __index__ = __float__ = __lt__ = __gt__ = __repr__ = __bool__


class Handler(BridgeHandler[None]):
    MAGIC, REQUEST = 0x1234, 1

    async def handle(self, vmi, packet):
        return BridgeResponse()


WRONG = ["5", b"5", [], {}, 1j, BridgeResponse(), lambda: 5.0, Sneaky()]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("timeout", "a number"),
        ("soft_timeout", "a number or None"),
        ("result_timeout", "a number"),
        ("stop_timeout", "a number"),
        ("blocked_after", "a number"),
        ("queue", "a whole number"),
        ("in_flight", "a whole number"),
        ("in_flight_total", "a whole number"),
        ("handshake", "True or False"),
        ("policy", "a Policy or None"),
    ],
)
def test_a_server_is_not_made_with_it(name, named, wrong):
    said = f"^{name} is {named}, not of type {type(wrong).__name__}$"
    with pytest.raises(TypeError, match=said):
        BridgeServer(FakeBackend(), Handler(), **{name: wrong})
    with pytest.raises(TypeError, match=said):
        ServerSettings(**{name: wrong})


@pytest.mark.parametrize("name", ["timeout", "queue"])
def test_true_is_no_number(name):
    with pytest.raises(TypeError, match=f"^{name} is a .*number, not of type bool$"):
        ServerSettings(**{name: True})


def test_a_number_that_no_float_holds_is_out_of_bounds():
    for name in ("timeout", "grace", "queue"):
        with pytest.raises(
            ValueError, match=f"^{name} must be a number that is not far too large$"
        ):
            ServerSettings(**{name: 10**400})


@pytest.mark.parametrize("name", ["fallback", "wait"])
def test_what_a_guest_gets_is_a_response(name):
    with pytest.raises(TypeError, match=f"^{name} is a BridgeResponse, not of type int$"):
        ServerSettings(**{name: 5})


def test_of_values_there_may_be_any_collection():
    for values in ((1, 2), [1, 2], {1, 2}):
        assert ServerSettings(retry_values=values).retry_values is values
    for wrong in (5, "12", b"12", {1: 2}, [1.0], ["1"]):
        with pytest.raises(
            TypeError, match=r"^retry_values is a tuple, each of them a whole number"
        ):
            ServerSettings(retry_values=wrong)


def test_a_policy_is_not_made_with_it():
    for name, wrong in {
        "rings": "01",
        "address_spaces": [32.0],
        "instructions": [(1, 2)],
        "vm": 5,
    }.items():
        with pytest.raises(TypeError, match=f"^{name} is "):
            Policy(**{name: wrong})
    assert Policy(instructions=[AddressRange(1, 2)], rings={0, 3}).denied == "native"
    with pytest.raises(TypeError, match=r"^burst is a number, not of type str$"):
        Rate("1")
    with pytest.raises(TypeError, match=r"^sessions is a whole number, not of type float$"):
        AgentLimits(sessions=1.0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("timeout", "5"), ("soft_timeout", []), ("retry_values", "12"), ("may_wait", "yes")],
)
def test_a_method_is_not_marked_with_it(name, wrong):
    with pytest.raises(TypeError, match=f"^{name} is .* or None, not of type"):
        method(1, **{name: wrong})


def test_a_handler_is_not_served_with_one_of_its_own():
    handler = Handler()
    handler.timeout = "5"
    with pytest.raises(TypeError, match=r"^Handler\.timeout is '5', not of type int or float"):
        Bridge(handler)
