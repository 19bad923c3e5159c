"""A handler class that could only fail is refused when it is made; a dataclass is taken."""

import functools
from abc import abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass, field

import pytest
from odd_objects import OUTPUTS

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, method
from vmibridge.bridge.contract import GuestRead
from vmibridge.testing import FakeGuest

PACKET = BridgePacket(1, 0x100, 0)


def made(**attributes):
    return type("Files", (BridgeHandler,), {"REQUEST": 0x100, **attributes})


async def answer(self, vmi, packet):
    return BridgeResponse(value1=1)


def answers(self, vmi, packet):
    return BridgeResponse(value1=1)


async def no_packet(self, vmi):
    return BridgeResponse(value1=1)


async def stream(self, vmi, packet):
    yield BridgeResponse(value1=1)


class TestWhatAnswersIsAsync:
    @pytest.mark.parametrize("wrong", [answers, stream, lambda self, vmi, packet: None])
    def test_a_handle_that_is_not_async_is_refused(self, wrong):
        with pytest.raises(TypeError, match=r"^Files\.handle is not async"):
            made(handle=wrong)

    @pytest.mark.parametrize("wrong", [None, 5, property(answer), "answer"])
    def test_so_is_one_that_cannot_be_called(self, wrong):
        with pytest.raises(TypeError, match=r"^Files\.handle is .*, not an async method"):
            made(handle=wrong)

    def test_so_is_one_that_does_not_take_a_packet(self):
        with pytest.raises(TypeError, match=r"^Files\.handle does not take what it is given"):
            made(handle=no_packet)
        with pytest.raises(TypeError, match=r"^Files\.ask does not take what it is given"):
            made(ask=method(1)(no_packet))  # which marks it

    def test_so_is_a_plain_method_in_the_place_of_a_marked_one(self):
        @method(1)
        async def ask(self, vmi, packet):
            return None

        base = made(ask=ask)
        with pytest.raises(TypeError, match=r"^Other\.ask is not async"):
            type("Other", (base,), {"ask": answers})

    def test_an_abstract_one_may_be_what_it_likes(self):
        base = made(handle=abstractmethod(lambda self: None))
        assert type("Other", (base,), {"handle": answer}).is_concrete()

    def test_a_decorated_one_is_taken(self):
        @functools.wraps(answer)
        def counted(*arguments):
            return answer(*arguments)

        def declared(self, vmi, packet) -> Awaitable[BridgeResponse | None]:
            return answer(self, vmi, packet)

        async def with_more(self, vmi, packet, retries=3):
            return None

        for handle in (counted, declared, with_more, functools.partialmethod(answer)):
            assert made(handle=handle).is_concrete()


class TestAttributes:
    @pytest.mark.parametrize(
        ("attributes", "told"),
        [
            ({"REQUEST": "1"}, "REQUEST is '1', not of type int"),
            ({"REQUEST": True}, "REQUEST is True, not of type int"),
            ({"timeout": True}, "timeout is True, not of type int or float or None"),
            ({"MAGIC": b"VMIB"}, "MAGIC is b'VMIB', not of type int or None"),
            ({"Settings": dict}, "Settings is <class 'dict'>, not a msgspec.Struct"),
            ({"reads": [5]}, r"reads is \[5\], not of GuestReads"),
            ({"name": ""}, "name is '', not printable text"),
            ({"name": "a\nb"}, "name is 'a.nb', not printable text"),
            ({"name": "\ud800"}, "name is '.ud800', not printable text"),
            ({"timeout": OUTPUTS["a repr that raises"]}, "timeout is <Lazy: its repr raised"),
            ({"wait": OUTPUTS["poses as an int"]}, "wait is "),
            ({"contract": 5}, "contract has the name of an attribute"),
            ({"has_life": True}, "has_life has the name of an attribute"),
        ],
    )
    def test_of_a_class_are_checked_when_it_is_made(self, attributes, told):
        with pytest.raises(TypeError, match=rf"^Files\.{told}"):
            made(handle=answer, **attributes)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("name", BridgePacket(1, 2, 3)),
            ("name", "two\nlines"),
            ("shared", {}),
            ("wait", 5),
            ("reads", 0),
            ("serial", "a number"),
            ("methods", []),
            ("handle", None),
            ("MAGIC", "VMIB"),
        ],
    )
    def test_of_an_instance_are_checked_when_it_is_bound(self, name, value):
        handler = made(handle=answer)()
        setattr(handler, name, value)
        with pytest.raises(TypeError, match=f"{name} "):
            Bridge(handler)

    def test_of_an_instance_may_be_its_own(self):
        handler = made(handle=answer)()
        handler.timeout, handler.REQUEST, handler.reads = 3, 7, (GuestRead(address=1, size=8),)
        assert Bridge(handler).entries[0].contract.request == 7

    def test_what_a_method_says_is_checked_too(self):
        with pytest.raises(TypeError, match="wait is 5, not of type BridgeResponse"):
            method(1, wait=5)
        with pytest.raises(TypeError, match="a method code is a whole number"):
            method("1")


class TestNeverAsked:
    def test_a_handler_behind_one_of_the_same_requests_is_named(self):
        first, second = made(handle=answer, MAGIC=1)(), made(handle=answer, MAGIC=1)()
        other = made(handle=answer, MAGIC=2)()
        assert Bridge(first, other).never_asked == []
        bridge = Bridge(first, other, second)
        ((entry, before),) = bridge.never_asked
        assert (entry.target, before.target) == (second, first)

    def test_one_for_any_magic_takes_those_of_each(self):
        any_magic, named = made(handle=answer)(), made(handle=answer, MAGIC=1)()
        ((entry, before),) = Bridge(any_magic, named).never_asked
        assert (entry.target, before.target) == (named, any_magic)
        assert Bridge(named, any_magic).never_asked == []


@dataclass
class Counts(BridgeHandler[int]):
    """Compares by its fields, as dataclasses do."""

    REQUEST = 0x100
    MAGIC = 1
    serial = True
    start: int = 0
    seen: list = field(default_factory=list)

    async def handle(self, vmi, packet):
        self.seen.append(packet)
        return BridgeResponse(value1=self.start + len(self.seen))

    async def __aenter__(self):
        return self


@dataclass(frozen=True)
class Fixed(BridgeHandler[int]):
    REQUEST = 0x200
    MAGIC = 1
    timeout: float = 2.0

    async def handle(self, vmi, packet):
        return BridgeResponse(value1=9)


@pytest.mark.anyio
class TestDataclasses:
    async def test_serve_each_vm_with_an_object_of_its_own(self):
        answers = []

        async def guest(vm):
            for packet in (PACKET, PACKET, BridgePacket(1, 0x200, 0)):
                answers.append((await vm.call(packet)).rax)

        async with FakeGuest(guest, vm="red") as red, FakeGuest(guest, vm="blue") as blue:
            # Equal, and yet two: what one guest left the other must not see.
            server = BridgeServer([red, blue], lambda vm: Bridge(Counts(), Fixed()))
            assert len([outcome async for outcome in server.run()]) == 6
        assert sorted(answers) == [1, 1, 2, 2, 9, 9]

    async def test_are_told_apart_by_identity(self):
        one, other = Counts(), Counts()
        assert one == other
        assert len({one, other}) == 2
        assert hash(Fixed()) != hash(Fixed())
