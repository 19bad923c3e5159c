"""From a packet to the handler that answers it: outcomes, order, nesting, any number of them."""

import anyio
import pytest
from dispatch_parts import (
    CPUID,
    MAGIC,
    OTHER_MAGIC,
    VMCALL,
    Answering,
    Deciding,
    ask,
    context,
    targets,
)

from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler, method
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.response import BridgeResponse
from vmibridge.vm.trap import TrapReason

# --- the three outcomes -------------------------------------------------------------


@pytest.mark.anyio
async def test_a_request_that_a_handler_answers_is_handled():
    packet = ask(value1=7)
    outcome = await Bridge(Answering("hello")).dispatch(context(), packet)
    assert outcome == Outcome(
        OutcomeKind.HANDLED, packet, BridgeResponse(7, output="hello"), "answering"
    )
    assert outcome.output == "hello"


@pytest.mark.anyio
async def test_a_request_that_a_handler_returns_nothing_for_is_rejected():
    packet = ask()
    outcome = await Bridge(Answering(answer=None)).dispatch(context(), packet)
    assert outcome == Outcome(OutcomeKind.REJECTED, packet, None, "answering")


@pytest.mark.anyio
async def test_a_rejected_request_is_not_offered_to_the_next_handler():
    first, second = Answering(answer=None), Answering("second")
    outcome = await Bridge(first, second).dispatch(context(), ask())
    assert outcome.kind is OutcomeKind.REJECTED
    assert (first.asked, second.asked) == (1, 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "packet",
    [ask(magic=OTHER_MAGIC), ask(request=2), ask(magic=OTHER_MAGIC, request=2)],
    ids=["magic", "request", "both"],
)
async def test_a_request_that_no_handler_is_for_is_unmatched(packet):
    handler = Answering()
    outcome = await Bridge(handler).dispatch(context(), packet)
    assert outcome == Outcome(OutcomeKind.UNMATCHED, packet)
    assert handler.asked == 0


@pytest.mark.anyio
@pytest.mark.parametrize("reason", [VMCALL, CPUID])
async def test_an_empty_bridge_answers_nothing(reason):
    bridge = Bridge()
    outcome = await bridge.dispatch(context(reason), ask())
    assert outcome == Outcome(OutcomeKind.UNMATCHED, ask())
    assert list(bridge.contracts()) == []
    assert bridge.handlers == []
    assert not any(bridge.trap_filter.wants(reason, magic) for magic in (0, MAGIC))


# --- a handler that does not answer as it should -------------------------------------


@pytest.mark.anyio
async def test_a_handler_that_raises_makes_the_outcome_failed(caplog):
    packet = ask()
    first, second = Answering(answer=OSError("no such\nfile")), Answering("second")
    outcome = await Bridge(first, second).dispatch(context(), packet)
    assert outcome == Outcome(
        OutcomeKind.FAILED, packet, None, "answering", "OSError: no such\\nfile"
    )
    assert second.asked == 0
    assert "handler answering failed" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [0, "text", (1, 2), b"", Outcome(OutcomeKind.HANDLED, None)])
async def test_a_handler_that_returns_no_response_has_failed(answer, caplog):
    class Wrong(BridgeHandler):
        MAGIC, REQUEST = MAGIC, 1

        async def handle(self, vmi, packet):
            return answer

    outcome = await Bridge(Wrong()).dispatch(context(), ask())
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error == (
        f"TypeError: Wrong.handle() returned {type(answer).__name__}, not a BridgeResponse"
    )
    line = Wrong.handle.__code__.co_firstlineno
    assert f"handler wrong failed on method 0x0001 at {__file__}:{line}: TypeError" in caplog.text


@pytest.mark.anyio
async def test_a_method_that_returns_no_response_is_named(caplog):
    class Wrong(BridgeHandler):
        MAGIC, REQUEST = MAGIC, 1

        @method(7)
        async def look_up(self, vmi, packet):
            return 5

    outcome = await Bridge(Wrong()).dispatch(context(), ask(method=7))
    assert outcome.error == "TypeError: Wrong.look_up() returned int, not a BridgeResponse"
    line = Wrong.look_up.__code__.co_firstlineno
    assert f"method 0x0007 at {__file__}:{line}: TypeError" in caplog.text


@pytest.mark.anyio
async def test_an_error_may_quote_the_guest_and_still_prints_on_one_line():
    hostile = ValueError("\x1b[2J\r\n\u2028\u202e" + "A" * 10_000)
    outcome = await Bridge(Answering(answer=hostile)).dispatch(context(), ask())
    assert outcome.error.startswith("ValueError: \\x1b[2J\\r\\n\\u2028\\u202eAAA")
    assert outcome.error.isprintable()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "text",
    ["A" * 10_000, "\0" * 10_000, "\U000e0001" * 499, "A" * 480 + "\u2028" * 10],
    ids=["printable", "escaped", "escaped at length", "escaped at the end"],
)
async def test_an_error_has_at_most_500_characters(text):
    outcome = await Bridge(Answering(answer=ValueError(text))).dispatch(context(), ask())
    assert len(outcome.error) <= 500
    assert outcome.error.isprintable()


@pytest.mark.anyio
async def test_an_error_that_cannot_say_what_it_is_fails_like_any_other():
    class Speechless(Exception):
        def __str__(self):
            raise LookupError

    outcome = await Bridge(Answering(answer=Speechless())).dispatch(context(), ask())
    assert outcome.kind is OutcomeKind.FAILED
    assert "Speechless" in outcome.error


@pytest.mark.anyio
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
async def test_what_is_no_exception_of_the_handler_passes_through(error):
    with pytest.raises(type(error)):
        await Bridge(Answering(answer=error)).dispatch(context(), ask())


@pytest.mark.anyio
async def test_cancellation_passes_through_a_dispatch():
    class Hanging(BridgeHandler):
        MAGIC, REQUEST = MAGIC, 1

        async def handle(self, vmi, packet):
            scope.cancel()
            await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await Bridge(Hanging()).dispatch(context(), ask())
    assert scope.cancelled_caught


# --- order --------------------------------------------------------------------------


@pytest.mark.anyio
async def test_of_two_handlers_for_a_request_the_first_answers():
    one, two = Answering("one"), Answering("two")
    assert (await Bridge(one, two).dispatch(context(), ask())).output == "one"
    assert (await Bridge(two, one).dispatch(context(), ask())).output == "two"
    assert (one.asked, two.asked) == (1, 1)


@pytest.mark.parametrize("reason", [VMCALL, TrapReason.VMMCALL, CPUID])
def test_the_magic_and_the_request_tell_handlers_apart(reason):
    handlers = {
        (magic, request): Answering(magic=magic, request=request)
        for magic in (MAGIC, OTHER_MAGIC)
        for request in (1, 2)
    }
    bridge = Bridge(*handlers.values())
    for (magic, request), handler in handlers.items():
        assert targets(bridge, ask(magic, request), reason) == [handler]
        # The method is the handler's own affair.
        assert targets(bridge, ask(magic, request, method=0xFFFF), reason) == [handler]


def test_a_handler_without_magic_takes_any():
    handler = Answering(magic=None)
    bridge = Bridge(handler)
    for magic in (0, 1, MAGIC, 0xFFFF_FFFF):
        assert targets(bridge, ask(magic)) == [handler]
    assert targets(bridge, ask(request=2)) == []


def test_magic_zero_is_a_magic_like_others():
    bridge = Bridge(Answering(magic=0))
    assert len(targets(bridge, ask(magic=0))) == 1
    assert targets(bridge, ask(magic=MAGIC)) == []
    assert bridge.trap_filter.wants(VMCALL, 0)
    assert not bridge.trap_filter.any_hypercall


def test_a_handler_with_any_magic_keeps_its_place_in_the_order():
    anyone, named = Answering("any", magic=None), Answering("named")
    assert targets(Bridge(anyone, named), ask()) == [anyone]
    assert targets(Bridge(named, anyone), ask()) == [named]
    for bridge in (Bridge(anyone, named), Bridge(named, anyone)):
        assert targets(bridge, ask(OTHER_MAGIC)) == [anyone]


def test_one_handler_in_two_places_answers_from_the_first():
    handler, between = Answering("twice"), Answering("between")
    bridge = Bridge(handler, between, handler)
    assert targets(bridge, ask()) == [handler]
    assert bridge.handlers == [handler, between, handler]


# --- nesting ------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    "nest",
    [
        Bridge,
        lambda a, b, c: Bridge(Bridge(a, b, c)),
        lambda a, b, c: Bridge(a, Bridge(b, c)),
        lambda a, b, c: Bridge(Bridge(a, b), Bridge(), c),
        lambda a, b, c: Bridge(Bridge(Bridge(a), Bridge(b)), Bridge(Bridge(Bridge(c)))),
    ],
)
async def test_nested_bridges_keep_the_order_of_their_handlers(nest):
    handlers = a, b, c = Answering("a"), Answering("b"), Answering("c", request=2)
    bridge = nest(*handlers)
    assert bridge.handlers == [a, b, c]
    assert list(bridge.contracts()) == [handler.contract for handler in handlers]
    assert (await bridge.dispatch(context(), ask())).output == "a"
    assert (await bridge.dispatch(context(), ask(request=2))).output == "c"


def test_a_nested_bridge_with_any_magic_comes_before_what_stands_behind_it():
    anyone, named = Answering("any", magic=None), Answering("named")
    assert targets(Bridge(Bridge(anyone), named), ask()) == [anyone]
    assert targets(Bridge(named, Bridge(anyone)), ask()) == [named]


@pytest.mark.anyio
async def test_a_dispatcher_of_ones_own_answers_what_it_answers_and_passes_on_the_rest():
    deciding = Deciding(BridgeContract(1, MAGIC), answers={5})
    behind = Answering("behind")
    bridge = Bridge(deciding, behind)
    assert (await bridge.dispatch(context(), ask(method=5))).output is deciding
    assert (await bridge.dispatch(context(), ask(method=6))).output == "behind"
    assert (deciding.asked, behind.asked) == (2, 1)


@pytest.mark.anyio
async def test_a_request_that_every_dispatcher_passes_on_is_unmatched():
    first, second = (Deciding(BridgeContract(1, MAGIC)) for _ in range(2))
    outcome = await Bridge(first, Bridge(second)).dispatch(context(), ask())
    assert outcome == Outcome(OutcomeKind.UNMATCHED, ask())
    assert (first.asked, second.asked) == (1, 1)


@pytest.mark.anyio
async def test_a_dispatcher_behind_a_handler_is_never_asked():
    deciding = Deciding(BridgeContract(1, MAGIC), answers={1})
    outcome = await Bridge(Answering("first"), deciding).dispatch(context(), ask())
    assert outcome.output == "first"
    assert deciding.asked == 0


@pytest.mark.anyio
async def test_a_dispatcher_is_asked_only_for_its_contracts():
    deciding = Deciding(BridgeContract(1, MAGIC), BridgeContract(2), answers={1})
    bridge = Bridge(deciding)
    for magic, request, kind in [
        (MAGIC, 1, OutcomeKind.HANDLED),
        (OTHER_MAGIC, 1, OutcomeKind.UNMATCHED),
        (OTHER_MAGIC, 2, OutcomeKind.HANDLED),
        (MAGIC, 3, OutcomeKind.UNMATCHED),
    ]:
        assert (await bridge.dispatch(context(), ask(magic, request))).kind is kind
    assert deciding.asked == 2
    assert list(bridge.contracts()) == [BridgeContract(1, MAGIC), BridgeContract(2)]


@pytest.mark.anyio
async def test_a_dispatcher_that_matches_by_two_contracts_is_asked_once():
    deciding = Deciding(BridgeContract(1, MAGIC), BridgeContract(1))
    assert (await Bridge(deciding).dispatch(context(), ask())).kind is OutcomeKind.UNMATCHED
    assert deciding.asked == 1


@pytest.mark.anyio
async def test_a_dispatcher_that_raises_has_failed():
    class Broken(Deciding):
        async def dispatch(self, vmi, packet):
            raise LookupError("lost")

    behind = Answering()
    outcome = await Bridge(Broken(BridgeContract(1)), behind).dispatch(context(), ask())
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED, "LookupError: lost")
    assert behind.asked == 0


@pytest.mark.anyio
async def test_a_dispatcher_that_returns_no_outcome_has_failed():
    class Wrong(Deciding):
        async def dispatch(self, vmi, packet):
            return None

    outcome = await Bridge(Wrong(BridgeContract(1))).dispatch(context(), ask())
    assert outcome.kind is OutcomeKind.FAILED


@pytest.mark.parametrize("target", [Answering, None, "hello", 7, BridgeContract(1)])
def test_a_bridge_takes_handlers_and_dispatchers_only(target):
    with pytest.raises(TypeError, match="a bridge takes handlers and dispatchers"):
        Bridge(target)


# --- no limit -----------------------------------------------------------------------


class Counted(int):
    """A number that counts how often it is compared."""

    compared = 0
    __hash__ = int.__hash__

    def __eq__(self, other):
        Counted.compared += 1
        return int(self) == other


def many(magics: int, requests: int) -> dict[tuple[int, int], Answering]:
    return {
        (magic, request): Answering(f"{magic}/{request}", magic=magic, request=request)
        for magic in range(magics)
        for request in range(requests)
    }


@pytest.mark.no_cover
@pytest.mark.parametrize(("magics", "requests"), [(1, 1000), (1000, 1), (1, 65_536), (64, 1024)])
def test_there_is_no_limit_to_the_number_of_handlers(magics, requests):
    handlers = many(magics, requests)
    bridge = Bridge(*handlers.values())
    assert len(bridge.handlers) == magics * requests
    for (magic, request), handler in handlers.items():
        (entry,) = bridge.match(ask(magic, request), VMCALL)
        assert entry.target is handler
    assert bridge.match(ask(magics, 0), VMCALL) == ()


@pytest.mark.anyio
async def test_each_of_1000_handlers_answers_its_own_requests():
    handlers = many(10, 100)
    bridge = Bridge(*handlers.values())
    for magic, request in handlers:
        outcome = await bridge.dispatch(context(), ask(magic, request))
        assert outcome.output == f"{magic}/{request}"


@pytest.mark.parametrize("place", ["first", "last", "none"])
@pytest.mark.no_cover
def test_a_match_costs_the_same_among_1_and_among_10_000_handlers(place):
    def comparisons(count):
        bridge = Bridge(
            *(Answering(magic=Counted(MAGIC), request=request) for request in range(count))
        )
        packet = ask(request={"first": 0, "last": count - 1, "none": 0xFFFF}[place])
        before = Counted.compared
        found = bridge.match(packet, VMCALL)
        assert len(found) == (place != "none")
        return Counted.compared - before

    assert comparisons(10_000) == comparisons(1) <= 1


def test_to_build_a_bridge_takes_few_comparisons_for_each_handler():
    handlers = [Answering(magic=Counted(magic)) for magic in range(1000)]
    before = Counted.compared
    Bridge(*handlers)
    assert Counted.compared - before < 10 * len(handlers)


def test_who_stands_behind_a_handler_is_not_kept_for_a_match():
    bridge = Bridge(*(Answering(str(n)) for n in range(1000)))
    assert targets(bridge, ask()) == bridge.handlers[:1]
