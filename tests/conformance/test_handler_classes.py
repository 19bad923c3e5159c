"""What a handler's class says: its methods, timeouts and name, and whether it can answer."""

import abc

import pytest
from dispatch_parts import MAGIC, Answering, ask, context, overriding

from vmibridge.bridge.dispatch import Bridge
from vmibridge.bridge.handler import BridgeHandler, method
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.settings import ServerSettings

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


# --- a handler's life ---------------------------------------------------------------


@pytest.mark.anyio
async def test_a_handler_is_an_async_context_manager_that_lets_errors_pass():
    handler = Answering()
    async with handler as entered:
        assert entered is handler
    with pytest.raises(LookupError):
        async with handler:
            raise LookupError
