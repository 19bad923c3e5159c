"""Which traps are ours, and the law of the order in which handlers are tried."""

import pytest
from dispatch_parts import (
    CPUID,
    MAGIC,
    OTHER_MAGIC,
    UNKNOWN_MAGIC,
    VMCALL,
    Answering,
    Deciding,
    ask,
    context,
    targets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.vm.trap import TrapReason

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
