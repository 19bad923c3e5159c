"""`vmi.outside`: what a handler gets is the same, whether it is recorded or not."""

import gc
import math
from contextlib import suppress
from functools import partial

import anyio
import msgspec
import pytest

from vmibridge import BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, OutcomeKind
from vmibridge.bridge import outside
from vmibridge.engine.taps import Tap
from vmibridge.errors import OutsideError, OutsideRefusedError
from vmibridge.testing import FakeGuest, drive

pytestmark = pytest.mark.anyio


class Score(msgspec.Struct):
    points: int
    words: tuple[str, ...] = ()


class Asks(BridgeHandler[object]):
    """Its output is what it got."""

    MAGIC, REQUEST = 0x1234, 1

    def __init__(self, function, key="key", **more):
        self.function = function
        self.key = key
        self.more = more

    async def handle(self, vmi, packet):
        got = await vmi.outside(self.key, self.function, **self.more)
        return BridgeResponse(1).with_output(got)


class TestGivenValues:
    """`drive(..., outside=)`."""

    PACKET = BridgePacket(0x1234, 1, 0)

    @staticmethod
    async def never():
        raise AssertionError("it must not be called")

    @pytest.mark.parametrize("key", ["key", "\u00e4 \u202e"])
    async def test_are_what_a_recording_would_give(self, key):
        outcome = await drive(Asks(self.never, key), self.PACKET, outside={key: (1, b"2")})
        assert outcome.output == [1, b"2"]
        given = {key: Score(5, ("a",)), "further": 1}
        outcome = await drive(Asks(self.never, key, type=Score), self.PACKET, outside=given)
        assert outcome.output == Score(5, ("a",))

    @pytest.mark.parametrize("error", [ConnectionResetError("gone"), ConnectionResetError])
    async def test_an_exception_is_that_of_the_function(self, error):
        class Catches(Asks):
            async def handle(self, vmi, packet):
                with pytest.raises(OutsideError) as caught:
                    await super().handle(vmi, packet)
                return BridgeResponse(1).with_output(caught.value.is_a("OSError"))

        outcome = await drive(Catches(self.never), self.PACKET, outside={"key": error})
        assert outcome.output is True

    async def test_what_cannot_be_recorded_is_an_error_as_in_a_run(self):
        outcome = await drive(Asks(self.never), self.PACKET, outside={"key": object()})
        assert outcome.kind is OutcomeKind.FAILED
        assert "its value cannot be recorded" in outcome.error

    async def test_what_is_not_given_is_told_though_the_handler_catches_it(self):
        class Catches(Asks):
            async def handle(self, vmi, packet):
                for self.key in ("one", "given", "two", "one"):
                    with suppress(OutsideError):
                        await super().handle(vmi, packet)
                return BridgeResponse(1)

        for kind in (Catches, Asks):
            with pytest.raises(LookupError, match=r"asked vmi\.outside for 'one'") as caught:
                await drive(kind(self.never, "one"), self.PACKET, outside={"given": 1})
            assert str(caught.value).endswith(" and outside= gives 'given'")
        with pytest.raises(LookupError, match=r"gives nothing$"):
            await drive(Asks(self.never), self.PACKET, outside={})

    @pytest.mark.parametrize(("key", "error"), [(5, TypeError), ("", ValueError)])
    async def test_what_is_no_key_is_refused(self, key, error):
        with pytest.raises(error):
            await drive(Asks(self.never), self.PACKET, outside={key: 1})

    async def test_without_them_functions_are_called(self):
        async def one():
            return 1

        assert (await drive(Asks(one), self.PACKET)).output == 1


class Hears(Tap):
    def __init__(self):
        self.calls = []

    def outside_called(self, event, first, call):
        self.calls.append(call)


async def outcomes(handler):
    """What becomes of a request without a tap, and with one; and what the tap heard."""
    packet = BridgePacket(0x1234, 1, 0)
    alone = await drive(handler, packet)

    async def guest(vm):
        await vm.call(packet)

    tap = Hears()
    async with FakeGuest(guest) as vm:
        heard = [each async for each in BridgeServer(vm, handler, taps=[tap]).run()]
    return alone, heard[0], tap.calls


def gives(value):
    async def function():
        await anyio.lowlevel.checkpoint()
        return value

    return function


async def suspended():
    """Gives what it is sent."""
    return await Sent()


class Sent:
    def __await__(self):
        return (yield)


def nothing():
    return None


def coroutine():
    return suspended()


def generator_function():
    def function():
        yield 1

    return function


def async_generator_function():
    async def function():
        yield 1

    return partial(function)


WRONG = [nothing, coroutine, generator_function, async_generator_function]
"""Each gives what is no async function."""


class TestAValue:
    @pytest.mark.parametrize(
        ("value", "got"),
        [
            *((each, each) for each in (None, True, 0, -(1 << 63), (1 << 64) - 1, 1.5, math.inf)),
            *(
                (each, each)
                for each in ("", "\u00e4\0", b"", b"\xff", [], {}, [1, [b"2", {"3": 4}]])
            ),
            ((1, 2), [1, 2]),
            ({1: 2}, {1: 2}),
            (Score(3, ("a",)), {"points": 3, "words": ["a"]}),
            (OutcomeKind.HANDLED, "handled"),
        ],
        ids=repr,
    )
    async def test_is_what_a_recording_gives(self, value, got):
        alone, heard, calls = await outcomes(Asks(gives(value)))
        for outcome in (alone, heard):
            assert outcome.error is None
            assert outcome.output == got
            assert type(outcome.output) is type(got)
        assert msgspec.msgpack.decode(calls[0].data) == got

    async def test_is_of_the_type_that_is_asked_for(self):
        handler = Asks(gives({"points": 3, "words": ["a"]}), type=Score)
        for outcome in (await outcomes(handler))[:2]:
            assert outcome.output == Score(3, ("a",))

    async def test_of_another_type_fails(self):
        for outcome in (await outcomes(Asks(gives({"points": "many"}), type=Score)))[:2]:
            assert outcome.kind is OutcomeKind.FAILED
            assert "'key': msgspec.ValidationError: its value is not as" in outcome.error

    @pytest.mark.parametrize(
        "value", [1 << 64, object(), "\ud800", [print]], ids=["large", "object", "text", "inside"]
    )
    async def test_that_cannot_be_recorded_fails(self, value):
        alone, heard, calls = await outcomes(Asks(gives(value)))
        assert "its value cannot be recorded" in alone.error
        assert heard.error == alone.error
        assert calls[0].data is None
        assert "cannot be recorded" in calls[0].error

    @pytest.mark.parametrize("kind", [bytes, str])
    async def test_is_bounded(self, kind, monkeypatch):
        monkeypatch.setattr(outside, "MAX_VALUE", 1000)
        text = "x" * 2000
        most = text.encode() if kind is bytes else text
        for size, fits in ((997, True), (998, False), (999, False), (1000, False), (2000, False)):
            alone, heard, _ = await outcomes(Asks(gives(most[:size])))
            assert (alone.error is None, heard.error is None) == (fits, fits)
        assert "bytes, 1000 is the most" in heard.error


class TestAFailure:
    async def test_is_an_error_that_names_the_exception(self):
        async def lose():
            raise ConnectionResetError("gone")

        got = []

        class Catches(Asks):
            async def handle(self, vmi, packet):
                try:
                    await super().handle(vmi, packet)
                except OutsideError as error:
                    got.append(error)

        alone, heard, calls = await outcomes(Catches(lose))
        assert alone.kind is heard.kind is OutcomeKind.REJECTED
        for error in got:
            assert (error.key, error.text) == ("key", "gone")
            assert error.types == (
                "ConnectionResetError",
                "ConnectionError",
                "OSError",
                "Exception",
            )
            assert error.is_a("ValueError", "OSError")
            assert not error.is_a("ValueError")
            assert isinstance(error.__cause__, ConnectionResetError)
        assert (calls[0].error, calls[0].types) == ("gone", got[0].types)

    async def test_is_bounded_whatever_an_exception_says(self):
        class Odd(Exception):
            def __str__(self):
                raise RuntimeError

        async def lose():
            raise ExceptionGroup("x" * 10_000, [Odd()])

        alone, heard, calls = await outcomes(Asks(lose))
        assert alone.error == heard.error
        assert len(calls[0].error) <= 2000

        async def odd():
            raise Odd

        _, heard, calls = await outcomes(Asks(odd))
        assert "Odd" in heard.error
        assert calls[0].types[0].endswith("Odd")

    async def test_may_be_a_function_whose_call_gives_nothing_to_await(self):
        alone, heard, calls = await outcomes(Asks(lambda: 1))
        assert "'key': TypeError: the function of vmi.outside has to be async" in alone.error
        assert heard.error == alone.error
        assert calls[0].types[0] == "TypeError"

    @pytest.mark.parametrize("wrong", WRONG, ids=[each.__name__ for each in WRONG])
    @pytest.mark.filterwarnings("error")
    async def test_of_what_is_no_async_function_is_not_recorded(self, wrong):
        class AsksAnew(Asks):
            async def handle(self, vmi, packet):
                with pytest.raises(TypeError, match=r"vmi\.outside calls an async function, got"):
                    await vmi.outside(self.key, wrong())
                return await super().handle(vmi, packet)

        alone, heard, calls = await outcomes(AsksAnew(gives(1)))
        gc.collect()
        assert (alone.output, heard.output) == (1, 1)
        assert [(call.key, call.number) for call in calls] == [("key", 0)]

    async def test_leaves_a_coroutine_alone_that_has_begun(self):
        begun = suspended()
        begun.send(None)
        with pytest.raises(TypeError, match="got coroutine"):
            outside.check_function(begun)
        with pytest.raises(StopIteration, match="5"):
            begun.send(5)

    @pytest.mark.parametrize("key", ["", "x" * 257, b"key", None, "\ud800"], ids=repr)
    async def test_may_be_a_wrong_key(self, key):
        alone, heard, calls = await outcomes(Asks(gives(1), key))
        assert alone.kind is heard.kind is OutcomeKind.FAILED
        assert "key" in alone.error or "surrogates" in alone.error
        assert calls == []

    def test_of_a_replay_is_one_too(self):
        error = OutsideRefusedError("key")
        assert isinstance(error, OutsideError)
        assert str(error) == "outside 'key': it is not in the recording, and is not called"


async def test_a_call_that_is_cut_off_is_told():
    tap = Hears()

    class Short(BridgeHandler[None]):
        MAGIC, REQUEST, timeout = 0x1234, 1, 0.05

        async def handle(self, vmi, packet):
            await vmi.outside("key", anyio.sleep_forever)

    async def guest(vm):
        await vm.call(BridgePacket(0x1234, 1, 0))

    async with FakeGuest(guest) as vm:
        got = [each.kind async for each in BridgeServer(vm, Short(), taps=[tap]).run()]
    assert got == [OutcomeKind.TIMEOUT]
    (call,) = tap.calls
    assert (call.key, call.number, call.data, call.error) == ("key", 0, None, None)
