"""From a packet to the handler that answers it: order, outcomes, filters, routing."""

import abc

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.dispatch import Bridge, BridgeDispatch
from vmibridge.bridge.handler import BridgeHandler, method
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.bridge.status import Status
from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeBackend
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

MAGIC, OTHER_MAGIC, UNKNOWN_MAGIC = 0x4249_4D56, 0x5245_4854, 0xDEAD_BEEF
VMCALL, CPUID = TrapReason.VMCALL, TrapReason.CPUID


class Answering(BridgeHandler[str]):
    """Answers what its test tells it to, and counts how often it was asked."""

    def __init__(self, label="", *, magic=MAGIC, request=1, any_cpuid=False, answer="label"):
        self.label = label
        self.MAGIC = magic
        self.REQUEST = request
        self.ANY_CPUID = any_cpuid
        self.answer = answer
        self.asked = 0

    def __repr__(self):
        return f"<{self.label or hex(id(self))}>"

    async def handle(self, vmi, packet):
        self.asked += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer == "label":
            return BridgeResponse(packet.value1).with_output(self.label)
        return self.answer


class Deciding(BridgeDispatch):
    """A dispatcher of one's own: it decides for itself which requests it answers."""

    def __init__(self, *contracts, answers=()):
        self._contracts = contracts
        self._answers = answers
        self.asked = 0

    def contracts(self):
        return self._contracts

    async def dispatch(self, vmi, packet):
        self.asked += 1
        if packet.method in self._answers:
            return Outcome(OutcomeKind.HANDLED, packet, BridgeResponse(1, output=self), "deciding")
        return Outcome(OutcomeKind.UNMATCHED, packet)


def context(reason: TrapReason = VMCALL) -> BridgeContext:
    return BridgeContext(TrapEvent(1, reason, Registers(), length=3), FakeBackend())


def ask(magic: int = MAGIC, request: int = 1, method: int = 1, value1: int = 0) -> BridgePacket:
    return BridgePacket(magic, request, method, value1)


def targets(bridge: Bridge, packet: BridgePacket, reason: TrapReason = VMCALL) -> list:
    return [entry.target for entry in bridge.match(packet, reason)]


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
async def test_a_handler_that_returns_no_response_has_failed(answer):
    class Wrong(BridgeHandler):
        MAGIC, REQUEST = MAGIC, 1

        async def handle(self, vmi, packet):
            return answer

    outcome = await Bridge(Wrong()).dispatch(context(), ask())
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error == (
        f"TypeError: handle() returned {type(answer).__name__}, not a BridgeResponse"
    )


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


# --- which traps are ours -----------------------------------------------------------


def test_the_filter_names_every_magic():
    bridge = Bridge(
        Answering(magic=MAGIC), Bridge(Answering(magic=OTHER_MAGIC), Answering(magic=MAGIC))
    )
    traps = bridge.trap_filter
    assert traps.magics == {MAGIC, OTHER_MAGIC}
    assert (traps.any_hypercall, traps.any_cpuid) == (False, False)


@pytest.mark.parametrize(
    ("handlers", "wanted"),
    [
        # A named magic is ours by whichever instruction it comes.
        ([{"magic": MAGIC}], {(VMCALL, MAGIC), (TrapReason.VMMCALL, MAGIC), (CPUID, MAGIC)}),
        # Without a magic every hypercall is ours, and no CPUID.
        (
            [{"magic": None}],
            {
                (VMCALL, MAGIC),
                (TrapReason.VMMCALL, MAGIC),
                (VMCALL, OTHER_MAGIC),
                (TrapReason.VMMCALL, OTHER_MAGIC),
            },
        ),
        # To have every CPUID of the guest takes an explicit word.
        (
            [{"magic": None, "any_cpuid": True}],
            {
                (reason, magic)
                for reason in (VMCALL, TrapReason.VMMCALL, CPUID)
                for magic in (MAGIC, OTHER_MAGIC)
            },
        ),
        # That word means nothing on a handler that names its magic.
        (
            [{"magic": MAGIC, "any_cpuid": True}],
            {(VMCALL, MAGIC), (TrapReason.VMMCALL, MAGIC), (CPUID, MAGIC)},
        ),
        ([], set()),
    ],
    ids=["magic", "any magic", "any magic, any CPUID", "magic, any CPUID", "empty"],
)
def test_the_filter_wants_what_a_handler_may_answer(handlers, wanted):
    traps = Bridge(*(Answering(**handler) for handler in handlers)).trap_filter
    assert wanted == {
        (reason, magic)
        for reason in (VMCALL, TrapReason.VMMCALL, CPUID)
        for magic in (MAGIC, OTHER_MAGIC)
        if traps.wants(reason, magic)
    }


def test_the_filter_compares_the_magic_as_32_bits():
    traps = Bridge(Answering(magic=MAGIC)).trap_filter
    assert traps.wants(VMCALL, 0xFFFF_FFFF_0000_0000 | MAGIC)
    assert not traps.wants(VMCALL, MAGIC << 32)


def test_the_filter_counts_the_contracts_of_dispatchers():
    traps = Bridge(Deciding(BridgeContract(1, MAGIC), BridgeContract(2))).trap_filter
    assert traps.magics == {MAGIC}
    assert (traps.any_hypercall, traps.any_cpuid) == (True, False)


def test_a_cpuid_with_a_magic_that_nobody_names_goes_only_to_those_that_opted_in():
    plain, opted = Answering("plain", magic=None), Answering("in", magic=None, any_cpuid=True)
    bridge = Bridge(plain, opted)
    assert targets(bridge, ask(UNKNOWN_MAGIC), CPUID) == [opted]
    # A hypercall with that magic is a bridge call all the same, in the usual order.
    assert targets(bridge, ask(UNKNOWN_MAGIC), VMCALL) == [plain]
    assert targets(Bridge(plain), ask(UNKNOWN_MAGIC), CPUID) == []


def test_a_handler_opts_in_only_by_saying_so():
    class Plain(BridgeHandler):
        REQUEST = 1

    class Opted(Plain):
        ANY_CPUID = True

    assert (Plain.MAGIC, Plain.ANY_CPUID) == (None, False)
    assert not Bridge(Plain()).trap_filter.wants(CPUID, UNKNOWN_MAGIC)
    assert Bridge(Opted()).trap_filter.wants(CPUID, UNKNOWN_MAGIC)


@pytest.mark.anyio
async def test_a_cpuid_of_the_guests_own_is_unmatched():
    handler = Answering(magic=None)
    outcome = await Bridge(handler).dispatch(context(CPUID), ask(magic=1))
    assert outcome.kind is OutcomeKind.UNMATCHED
    assert handler.asked == 0


def test_a_cpuid_with_a_magic_that_somebody_names_goes_to_handlers_of_any_magic_too():
    # It is a bridge call by its magic, so the usual order holds; also where the magic's
    # own handler is for another request.
    plain = Answering("plain", magic=None, request=1)
    named = Answering("named", request=2)
    assert targets(Bridge(plain, named), ask(request=1), CPUID) == [plain]
    both = Answering("both", request=1)
    assert targets(Bridge(plain, both), ask(request=1), CPUID) == [plain]


@pytest.mark.parametrize("any_cpuid", [False, True])
def test_opting_in_does_not_change_which_magic_and_request_a_handler_is_for(any_cpuid):
    bridge = Bridge(Answering(magic=MAGIC, any_cpuid=any_cpuid))
    assert targets(bridge, ask(UNKNOWN_MAGIC), CPUID) == []
    assert targets(bridge, ask(request=2), CPUID) == []


# --- the law of the order -----------------------------------------------------------

# Few of each, so that they meet.
magics = st.none() | st.integers(0, 2)
requests = st.integers(0, 2)
handlers = st.builds(Answering, magic=magics, request=requests, any_cpuid=st.booleans())
dispatchers = st.lists(st.builds(BridgeContract, requests, magics), max_size=3).map(
    lambda contracts: Deciding(*contracts)
)
nested = st.recursive(
    handlers | dispatchers, lambda inner: st.lists(inner, max_size=4), max_leaves=24
)


def flat(tree) -> list:
    return [leaf for part in tree for leaf in flat(part)] if isinstance(tree, list) else [tree]


def build(tree):
    return Bridge(*map(build, tree)) if isinstance(tree, list) else tree


def contracts_of(target) -> list[BridgeContract]:
    return [target.contract] if isinstance(target, BridgeHandler) else list(target.contracts())


def search(order: list, packet: BridgePacket, reason: TrapReason) -> list:
    """Who is asked, by trying one after the other."""
    named = {c.magic for target in order for c in contracts_of(target)} - {None}
    is_call = reason is not CPUID or packet.magic in named
    found = []
    for target in order:
        opted = getattr(target, "ANY_CPUID", False)
        matches = any(
            c.request == packet.request
            and (c.magic == packet.magic if c.magic is not None else is_call or opted)
            for c in contracts_of(target)
        )
        if matches and target not in found:
            found.append(target)
            if isinstance(target, BridgeHandler):
                break
    return found


@pytest.mark.no_cover
@settings(max_examples=examples(300))
@given(st.lists(nested, max_size=8))
def test_a_match_agrees_with_trying_one_handler_after_the_other(tree):
    bridge, order = build(tree), flat(tree)
    for reason in (VMCALL, TrapReason.VMMCALL, CPUID):
        for magic in range(4):
            for request in range(4):
                packet = ask(magic, request)
                found = search(order, packet, reason)
                assert targets(bridge, packet, reason) == found
                # No trap that somebody may answer is dropped below.
                assert not found or bridge.trap_filter.wants(reason, magic)


# --- handlers: methods --------------------------------------------------------------


class Files(BridgeHandler[str]):
    MAGIC, REQUEST = MAGIC, 0x0012
    timeout = 4.0

    @method(0x0001)
    async def begin(self, vmi, packet):
        """Open a file.

        And more about it.
        """
        return BridgeResponse(packet.value1 + 1, output="begin")

    @method(0x0002, timeout=0.5)
    async def chunk(self, vmi, packet):
        return None

    @method(0xFFFF, timeout=60)
    async def exit(self, vmi, packet):
        return BridgeResponse()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("code", "kind", "response"),
    [
        (0x0001, OutcomeKind.HANDLED, BridgeResponse(8, output="begin")),
        (0x0002, OutcomeKind.REJECTED, None),
        (0xFFFF, OutcomeKind.HANDLED, BridgeResponse()),
        (0x0000, OutcomeKind.REJECTED, None),
        (0x0003, OutcomeKind.REJECTED, None),
        (0xFFFE, OutcomeKind.REJECTED, None),
    ],
)
async def test_a_method_code_goes_to_its_method_and_an_unknown_one_is_rejected(
    code, kind, response
):
    outcome = await Bridge(Files()).dispatch(context(), ask(request=0x0012, method=code, value1=7))
    assert (outcome.kind, outcome.response, outcome.handler) == (kind, response, "files")


def test_a_handlers_methods_are_listed_by_code():
    assert {code: (m.code, m.name, m.timeout, m.doc) for code, m in Files.methods.items()} == {
        0x0001: (0x0001, "begin", None, "Open a file."),
        0x0002: (0x0002, "chunk", 0.5, ""),
        0xFFFF: (0xFFFF, "exit", 60, ""),
    }
    with pytest.raises(TypeError):
        Files.methods[3] = Files.methods[1]


def test_methods_are_inherited_and_added_to():
    class More(Files):
        @method(0x0004)
        async def close(self, vmi, packet):
            return BridgeResponse(4)

        @method(0x0002)
        async def chunk(self, vmi, packet):
            return BridgeResponse(2)

    assert sorted(More.methods) == [0x0001, 0x0002, 0x0004, 0xFFFF]
    assert More.methods[0x0002].timeout is None
    assert sorted(Files.methods) == [0x0001, 0x0002, 0xFFFF]


@pytest.mark.anyio
async def test_a_handler_that_overrides_handle_sees_every_method():
    class Everything(Files):
        async def handle(self, vmi, packet):
            return await super().handle(vmi, packet) or BridgeResponse(packet.method)

    for code, value1 in [(0x0001, 1), (0x0777, 0x0777)]:
        outcome = await Bridge(Everything()).dispatch(context(), ask(request=0x0012, method=code))
        assert outcome.response.value1 == value1


def test_two_methods_for_one_code_are_a_mistake_of_the_class():
    with pytest.raises(TypeError, match=r"Twice: first and again both answer method 0x0007"):

        class Twice(BridgeHandler):
            @method(7)
            async def first(self, vmi, packet): ...

            @method(7)
            async def again(self, vmi, packet): ...


def test_a_subclass_may_not_add_a_second_method_for_a_code_either():
    with pytest.raises(TypeError, match="both answer method 0x0001"):

        class Worse(Files):
            @method(0x0001)
            async def start(self, vmi, packet): ...


@pytest.mark.anyio
async def test_a_marked_method_can_be_called_as_any_other():
    assert (await Files().begin(context(), ask(value1=1))).value1 == 2


# --- handlers: timeouts -------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        pytest.param(0x0002, 0.5, id="the method's own"),
        pytest.param(0xFFFF, 60, id="the method's, though it is longer"),
        pytest.param(0x0001, 4.0, id="the handler's, where the method has none"),
        pytest.param(0x0777, 4.0, id="the handler's, for an unknown method"),
    ],
)
def test_a_methods_timeout_comes_before_the_handlers(code, seconds):
    assert ServerSettings(timeout=7.0).terms(Files(), code).timeout == seconds


def test_without_any_timeout_the_server_decides():
    assert ServerSettings(timeout=7.0).terms(Answering(), 1).timeout == 7.0


def test_an_instance_may_have_a_timeout_of_its_own():
    files = Files()
    files.timeout = 9.0
    terms = ServerSettings().terms
    assert (terms(files, 0x0001).timeout, terms(files, 0x0002).timeout) == (9.0, 0.5)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.5, float("nan"), float("-inf")])
def test_a_timeout_is_a_positive_number(timeout):
    with pytest.raises(ValueError, match="timeout must be above 0 seconds"):
        method(1, timeout=timeout)
    with pytest.raises(ValueError, match="timeout must be above 0 seconds"):
        type("Hasty", (BridgeHandler,), {"timeout": timeout})


@pytest.mark.parametrize("timeout", [None, 1, 0.001, 3600.0, float("inf")])
def test_any_positive_timeout_will_do(timeout):
    assert type("Patient", (BridgeHandler,), {"timeout": timeout}).timeout == timeout


# --- handlers: names ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("Hello", "hello"),
        ("FileTransfer", "file_transfer"),
        ("MsgBox", "msg_box"),
        ("HTTPFetch", "http_fetch"),
        ("GuestTCPProxy", "guest_tcp_proxy"),
        ("X86Dump", "x86_dump"),
        ("Sha256", "sha256"),
        ("already_snake", "already_snake"),
        ("A", "a"),
        ("KV", "kv"),
    ],
)
def test_a_handler_is_named_after_its_class_in_snake_case(class_name, name):
    assert type(class_name, (BridgeHandler,), {}).name == name


def test_a_handler_may_have_a_name_of_its_own():
    class Hello(BridgeHandler):
        name = "greeter"

    class Louder(Hello):
        pass

    assert Hello.name == "greeter"
    # A subclass is another handler, so it has another name.
    assert Louder.name == "louder"


@pytest.mark.anyio
async def test_an_outcome_tells_the_handler_by_its_name():
    class Hello(Answering):
        name = "greeter"

    assert (await Bridge(Hello()).dispatch(context(), ask())).handler == "greeter"


# --- handlers: which classes can answer ---------------------------------------------


def base():
    return BridgeHandler


def routed():
    class Routed(BridgeHandler):
        REQUEST = 1

        @method(1)
        async def one(self, vmi, packet): ...

    return Routed


def overriding():
    class Overriding(BridgeHandler):
        REQUEST = 1

        async def handle(self, vmi, packet): ...

    return Overriding


def without_request():
    class WithoutRequest(BridgeHandler):
        async def handle(self, vmi, packet): ...

    return WithoutRequest


def without_answer():
    class WithoutAnswer(BridgeHandler):
        REQUEST = 1

    return WithoutAnswer


def abstract():
    class Abstract(overriding(), abc.ABC):
        @abc.abstractmethod
        def decide(self): ...

    return Abstract


def made_concrete():
    class Concrete(abstract()):
        def decide(self):
            return None

    return Concrete


def inheriting():
    class Inheriting(without_answer(), without_request()):
        pass

    return Inheriting


@pytest.mark.parametrize(
    ("make", "concrete"),
    [
        (base, False),
        (routed, True),
        (overriding, True),
        (without_request, False),
        (without_answer, False),
        (abstract, False),
        (made_concrete, True),
        (inheriting, True),
    ],
)
def test_a_class_is_concrete_when_it_can_answer(make, concrete):
    assert make().is_concrete() is concrete


# --- ranges: refused where they are written -----------------------------------------


@pytest.mark.parametrize(
    ("field", "bits"),
    [
        ("magic", 32),
        ("request", 16),
        ("method", 16),
        ("value1", 64),
        ("value2", 64),
        ("value3", 64),
        ("value4", 64),
    ],
)
def test_a_packets_fields_have_their_widths(field, bits):
    fields = {"magic": 0, "request": 0, "method": 0}
    most = (1 << bits) - 1
    assert getattr(BridgePacket(**fields | {field: most}), field) == most
    for value in (-1, 1 << bits, -(1 << bits), 1 << 200):
        with pytest.raises(ValueError, match="out of range"):
            BridgePacket(**fields | {field: value})


def test_a_packet_without_values_has_zeros():
    assert BridgePacket(1, 2, 3) == BridgePacket(1, 2, 3, 0, 0, 0, 0)
    assert BridgePacket(1, 2, 3, 4, 5, 6, 7).values == (4, 5, 6, 7)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [-1, 1 << 64, 1 << 200])
def test_a_copy_of_a_packet_or_response_is_checked_too(n, value):
    for original in (ask(), BridgeResponse(1, 2, 3, 4)):
        with pytest.raises(ValueError, match="out of range"):
            getattr(original, f"with_value{n}")(value)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_copy_differs_in_one_value_and_the_original_stays(n):
    packet, response = BridgePacket(1, 2, 3, 11, 12, 13, 14), BridgeResponse(21, 22, 23, 24, "out")
    for original in (packet, response):
        before = msgspec.structs.asdict(original)
        copy = getattr(original, f"with_value{n}")(99)
        assert msgspec.structs.asdict(copy) == before | {f"value{n}": 99}
        assert msgspec.structs.asdict(original) == before
    assert getattr(getattr(response, f"with_value{n}")(None), f"value{n}") is None


def test_a_response_may_get_an_output():
    assert BridgeResponse(1, 2, 3, 4).with_output("out") == BridgeResponse(1, 2, 3, 4, "out")
    assert BridgeResponse(1, output="out").with_output(None) == BridgeResponse(1)


@pytest.mark.parametrize("field", ["value1", "value2", "value3", "value4"])
def test_a_responses_values_have_64_bits(field):
    most = (1 << 64) - 1
    assert getattr(BridgeResponse(**{field: most}), field) == most
    assert getattr(BridgeResponse(**{field: 0}), field) == 0
    assert getattr(BridgeResponse(), field) is None
    for value in (-1, 1 << 64, 1 << 200):
        with pytest.raises(ValueError, match="out of range"):
            BridgeResponse(**{field: value})


@pytest.mark.parametrize(
    ("field", "bits"),
    [
        ("request", 16),
        ("magic", 32),
        ("verify_value1", 64),
        ("verify_value2", 64),
        ("verify_value3", 64),
        ("verify_value4", 64),
    ],
)
def test_a_contracts_fields_have_their_widths(field, bits):
    most = (1 << bits) - 1
    assert getattr(BridgeContract(**{"request": 0, field: most}), field) == most
    for value in (-1, 1 << bits):
        with pytest.raises(ValueError, match=f"{field.upper()} has {bits} bits"):
            BridgeContract(**{"request": 0, field: value})


@pytest.mark.parametrize(
    "wrong",
    [{"REQUEST": 1 << 16}, {"REQUEST": -1}, {"MAGIC": 1 << 32}, {"VERIFY_VALUE2": 1 << 64}],
)
def test_a_handler_whose_contract_is_out_of_range_makes_no_bridge(wrong):
    handler = type("Wrong", (overriding(),), wrong)()
    with pytest.raises(ValueError, match="bits"):
        Bridge(handler)
    with pytest.raises(ValueError, match="bits"):
        Bridge(Bridge(), Answering(), handler)


@pytest.mark.parametrize("code", [-1, 1 << 16, 1 << 32])
def test_a_method_code_has_16_bits(code):
    with pytest.raises(ValueError, match="16 bits"):
        method(code)


@pytest.mark.parametrize("code", [0, 0xFFFF])
def test_any_16_bits_are_a_method_code(code):
    @method(code)
    async def answer(self, vmi, packet): ...

    assert type("Any", (BridgeHandler,), {"answer": answer}).methods[code].name == "answer"


def test_structs_of_the_protocol_are_values():
    # Frozen, equal by content and fit for a set: a test may compare them whole.
    for value in (ask(), BridgeResponse(1, output="out"), BridgeContract(1, MAGIC), Status(1)):
        assert value == msgspec.structs.replace(value)
        assert len({value, msgspec.structs.replace(value)}) == 1
        with pytest.raises(AttributeError):
            setattr(value, value.__struct_fields__[0], 2)


# --- a handler's life ---------------------------------------------------------------


@pytest.mark.anyio
async def test_a_handler_is_an_async_context_manager_that_lets_errors_pass():
    handler = Answering()
    async with handler as entered:
        assert entered is handler
    with pytest.raises(LookupError):
        async with handler:
            raise LookupError
