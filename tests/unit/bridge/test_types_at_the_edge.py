"""What handlers give is checked where it is made; from there on it fits into registers, files,
frames and lines.

The law: whatever a handler gives either raises where the response is made, with our message, or
passes through all of them.
"""

import decimal
import io
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from odd_objects import NO_VALUES, OUTPUTS, Flags, Level, Whole
from rich.console import Console

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, Outcome, OutcomeKind
from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.dispatch import BridgeDispatch
from vmibridge.bridge.output import output_json
from vmibridge.bridge.registers import write_response
from vmibridge.cli.trap_line import trap_columns, trap_json
from vmibridge.recording.messages import Reply, output_text
from vmibridge.testing import drive
from vmibridge.text import repr_of, str_of, type_name
from vmibridge.transport.wire import (
    FROM_SERVER,
    FrameReader,
    answer_frame,
    encode,
    register_writes,
)
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

NAMES = ["value1", "value2", "value3", "value4"]
PACKET = BridgePacket(1, 2, 3)

whole = st.one_of(
    st.integers(-(1 << 70), 1 << 70),
    st.integers(0, (1 << 64) - 1),
    st.booleans(),
    st.sampled_from([Level.HIGH, Flags.ONE, Whole(7), Whole(1 << 64), Whole(True)]),
)


class Odd(str):
    """The name of an object that hypothesis could not generate: it asks for the class."""

    __slots__ = ()


def meant(given):
    return {**NO_VALUES, **OUTPUTS}[given] if type(given) is Odd else given


odd = st.sampled_from([*NO_VALUES, *OUTPUTS]).map(Odd)
anything = st.one_of(
    st.none(),
    whole,
    st.floats(),
    st.text(st.characters(codec=None)),
    st.binary(),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.lists(st.integers()),
    odd,
)


def sent(writes):
    (frame,) = FrameReader(FROM_SERVER).feed(encode(answer_frame(1, writes)))
    return register_writes(frame)


def recorded(outcome):
    reply = Reply(
        "vm",
        1,
        0,
        outcome.kind,
        outcome.packet,
        outcome.writes,
        outcome.handler,
        outcome.error,
        output_text(outcome.output),
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=Reply)


def pass_through_all(response, width=64):
    """Registers, a frame, a recording, lines of both kinds, and a prompt."""
    event = TrapEvent(1, TrapReason.VMCALL, Registers(), ip=0x1000, length=3, width=width)
    writes = write_response(event, response)
    for value in writes.values:
        assert value is None or (type(value) is int and 0 <= value < 1 << width)
    assert sent(writes) == writes
    outcome = Outcome(OutcomeKind.HANDLED, PACKET, response, "handler", event=event, writes=writes)
    reply = recorded(outcome)
    assert reply.writes == writes
    line = trap_json(outcome)
    assert b"\n" not in line
    assert json.loads(line)["response"] == list(writes.values)
    cells = trap_columns(outcome)
    assert all(cell.isprintable() for cell in cells)
    assert repr(outcome).encode()
    Console(file=io.StringIO(), force_terminal=True).print(*cells)
    return reply


class TestTheLaw:
    @settings(max_examples=examples(1000))
    @given(
        st.tuples(anything, anything, anything, anything),
        anything | odd,
        st.sampled_from([64, 32]),
    )
    def test_what_is_made_passes_through_all(self, values, output, width):
        values = [meant(value) for value in values]
        try:
            response = BridgeResponse(*values, meant(output))
        except (TypeError, ValueError) as error:
            refused = str(error)
        else:
            refused = None
        if refused is not None:
            assert any(name in refused for name in NAMES)
            return
        for value, made in zip(values, response.values, strict=True):
            assert (value is None) == (made is None)
            assert made is None or type(made) is int
        pass_through_all(response, width)

    @pytest.mark.parametrize("what", OUTPUTS)
    def test_every_odd_output_does(self, what):
        output = OUTPUTS[what]
        reply = pass_through_all(BridgeResponse(1, output=output))
        assert type(reply.output) is str
        made = output_json(output)
        assert len(made.splitlines()) == 1
        json.loads(made[:4000] if made.isdigit() else made)

    def test_an_output_that_cannot_be_told_says_why(self):
        assert repr_of(OUTPUTS["a repr that raises"]) == "<Lazy: its repr raised RuntimeError>"
        assert str_of(OUTPUTS["a repr that exits"]) == "<Lazy: its str raised SystemExit>"
        assert type_name(OUTPUTS["a type without a name"]) == "Nameless"
        assert output_json(OUTPUTS["a repr that raises"]) == (
            b'"<Lazy: its repr raised RuntimeError>"'
        )


class TestValues:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("what", NO_VALUES)
    def test_what_is_no_whole_number_is_refused_where_it_is_made(self, name, what):
        value = NO_VALUES[what]
        told = rf"^{name} is a whole number of 64 bits, not of type \w+$"
        with pytest.raises(TypeError, match=told):
            BridgeResponse(**{name: value})
        with pytest.raises(TypeError, match=told):
            getattr(BridgeResponse(), f"with_{name}")(value)
        with pytest.raises(TypeError, match=f"^VERIFY_{name.upper()} is a whole number"):
            BridgeContract(1, **{f"verify_{name}": value})

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        ("value", "number"),
        [(True, 1), (False, 0), (Level.HIGH, 3), (Flags.ONE, 1), (Whole(9), 9), (1 << 63, 1 << 63)],
    )
    def test_a_whole_number_of_another_type_becomes_an_int(self, name, value, number):
        response = BridgeResponse(**{name: value})
        made = getattr(response, name)
        assert (type(made), made) == (int, number)
        stamped = BridgeContract(1, **{f"verify_{name}": value}).stamp(BridgeResponse())
        assert stamped == response

    @pytest.mark.parametrize("value", [-1, 1 << 64, -(1 << 64), Whole(-1), Whole(10**5000)])
    def test_one_out_of_range_is_refused_by_name(self, value):
        with pytest.raises(
            ValueError, match=r"^value3 has 64 bits, got .*: out of range$"
        ) as raised:
            BridgeResponse(1, 2, value, 4, OUTPUTS["a repr that raises"])
        assert len(str(raised.value)) < 200

    def test_decimals_are_no_whole_numbers(self):
        with pytest.raises(TypeError, match="value1"):
            BridgeResponse(decimal.Decimal(1))


class TestContract:
    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"request": "1"}, "REQUEST is a whole number of 16 bits, not of type str"),
            ({"request": 1, "magic": b"VMIB"}, "MAGIC is a whole number of 32 bits"),
            ({"request": 1.0}, "REQUEST is a whole number"),
        ],
    )
    def test_says_which_field_is_no_number(self, fields, told):
        with pytest.raises(TypeError, match=f"^{told}"):
            BridgeContract(**fields)


class Loose(BridgeResponse, frozen=True):
    """Has a check of its own, that is none."""

    def __post_init__(self):
        pass


class Answers(BridgeHandler[object]):
    REQUEST = 2

    def __init__(self, answer):
        self.answer = answer

    async def handle(self, vmi, packet):
        return self.answer


class Passes(BridgeDispatch):
    def __init__(self, answer):
        self.answer = answer

    def contracts(self):
        return [BridgeContract(2)]

    async def dispatch(self, vmi, packet):
        return self.answer


@pytest.mark.anyio
class TestWhatHandlersReturn:
    async def test_a_subclass_of_a_response_is_checked_too(self):
        outcome = await drive(Answers(Loose(True)), PACKET)
        assert (outcome.kind, outcome.response.value1) == (OutcomeKind.HANDLED, 1)
        assert type(outcome.response.value1) is int
        outcome = await drive(Answers(Loose(1.5)), PACKET)
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.error == (
            "TypeError: value1 is a whole number of 64 bits, not of type float"
        )

    @pytest.mark.parametrize("what", NO_VALUES)
    async def test_what_is_no_response_is_a_failure(self, what):
        outcome = await drive(Answers(NO_VALUES[what]), PACKET)
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.error.endswith("not a BridgeResponse")

    @pytest.mark.parametrize("what", [*NO_VALUES, None])
    async def test_what_is_no_outcome_of_a_dispatcher_is_one(self, what):
        outcome = await drive(Passes(NO_VALUES.get(what)), PACKET)
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.error.endswith("not an Outcome")

    @pytest.mark.parametrize(
        "answer",
        [
            Outcome("handled", PACKET),
            Outcome(OutcomeKind.HANDLED, None),
            Outcome(OutcomeKind.HANDLED, PACKET, 5),
            Outcome(OutcomeKind.HANDLED, PACKET, Loose("x")),
        ],
    )
    async def test_nor_is_an_outcome_with_fields_of_other_types(self, answer):
        outcome = await drive(Passes(answer), PACKET)
        assert (outcome.kind, outcome.response) == (OutcomeKind.FAILED, None)

    async def test_texts_of_a_dispatcher_are_made_fit(self):
        given = Outcome(OutcomeKind.FAILED, PACKET, None, 7, "\ud800\n" + "x")
        outcome = await drive(Passes(given), PACKET)
        assert (outcome.handler, outcome.error) == ("7", "\\ud800\\nx")
        good = Outcome(OutcomeKind.HANDLED, PACKET, BridgeResponse(1), "name")
        assert await drive(Bridge(Passes(good)), PACKET) is good
