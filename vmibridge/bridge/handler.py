"""A handler: the host's end of one request.

    class Hello(BridgeHandler[int]):
        MAGIC = 0x4249_4D56
        REQUEST = 0x0001

        @method(0x0001, timeout=2.0)
        async def greet(self, vmi, packet): ...

Rules:

- `REQUEST` is a must; without `MAGIC` it takes any magic. Its verify values are
  stamped over the response, and only when there is one.
- Override `handle`, or mark methods with `@method`: the base class then routes by
  the packet's method code and rejects the rest. To return `None` is to reject.
- It may raise: the guest gets the fallback and the server goes on.
- It is an async context manager, entered before the guest runs and left after.
- A class is refused when it is made (`TypeError`) if one of its methods has the name of an
  attribute of `BridgeHandler`, or such an attribute has a value of another type. A function
  is true: a method `shared` would have one instance serve all VMs. What an instance sets for
  itself is checked when it becomes part of a bridge.
- So is one whose `handle`, or a marked method, is not async or does not take a context and a
  packet: it would fail each request.
- Handlers are distinguished by identity, also where a dataclass compares them by their fields.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from inspect import (
    getattr_static,
    getdoc,
    isabstract,
    iscoroutinefunction,
    isfunction,
    signature,
    unwrap,
)
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import msgspec

from vmibridge.bridge.bounds import Seconds, Value, check
from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import BridgeContract, GuestRead
from vmibridge.bridge.numbers import unsigned
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse, T
from vmibridge.bridge.signatures import compile_method
from vmibridge.bridge.typed_method import TypedMethod
from vmibridge.text import repr_of, type_name

__all__ = ["BridgeHandler", "Method", "contract_of", "method"]

_F = TypeVar("_F", bound=Callable[..., Awaitable[object]])


class Method(NamedTuple):
    """One method of a handler."""

    code: int
    """16 bits: the packet's method."""
    name: str
    """The attribute of the handler that answers it."""
    timeout: float | None
    """Seconds; `None` leaves it to the handler. So it does for the next three."""
    doc: str
    """The first line of its docstring."""
    soft_timeout: float | None = None
    wait: BridgeResponse[Any] | None = None
    retry_values: tuple[int, ...] | None = None
    may_wait: bool | None = None
    typed: TypedMethod | None = None
    """How its words become parameters; `None`: it takes the packet."""


def method(
    code: int,
    *,
    timeout: float | None = None,
    soft_timeout: float | None = None,
    wait: BridgeResponse[Any] | None = None,
    retry_values: tuple[int, ...] | None = None,
    may_wait: bool | None = None,
) -> Callable[[_F], _F]:
    """Mark an async method of a `BridgeHandler` as the answer to a method code.

    `code` has 16 bits. The others override what the handler says under the same name.
    Raises `ValueError` for one out of range, `TypeError` for one of another type and for a
    function that is not async.
    """
    code = unsigned(code, "a method code", 16)
    if wait is not None and not isinstance(wait, BridgeResponse):
        raise TypeError(f"wait is {_shown(wait)}, not of type BridgeResponse or None")
    check_timeout(timeout)
    check_timeout(soft_timeout, "soft_timeout")
    check_retry_values(retry_values)
    check("may_wait", may_wait, bool | None)

    def mark(function: _F) -> _F:
        is_async = iscoroutinefunction(function)
        if not is_async:
            name = getattr(function, "__qualname__", type_name(function))
            raise TypeError(f"{name} answers a method, so it has to be async")
        if not isinstance(getattr(function, "__name__", None), str):
            # Such as a partial of one.
            raise TypeError(f"{type_name(function)} answers a method, so it has to have a name")
        doc = (getdoc(function) or "").partition("\n")[0]
        function.__bridge_method__ = Method(  # type: ignore[attr-defined]
            code, function.__name__, timeout, doc, soft_timeout, wait, retry_values, may_wait
        )
        return function

    return mark


def check_timeout(timeout: float | None, name: str = "timeout") -> None:
    """Raise `ValueError` or `TypeError` for what is not a time limit in seconds; `None` is none."""
    check(name, timeout, Seconds | None)


def check_retry_values(values: tuple[int, ...] | None) -> None:
    """Raise `ValueError` or `TypeError` for what are no numbers, 1 to 4; `None` is none."""
    check("retry_values", values, tuple[Value, ...] | None)


class BridgeHandler(Generic[T]):
    """Base of all handlers; `T` is the type of its output."""

    REQUEST: ClassVar[int]
    """16 bits."""
    MAGIC: ClassVar[int | None] = None
    """32 bits; `None` takes any magic."""
    VERIFY_VALUE1: ClassVar[int | None] = None
    """64 bits; stamped over the response. So are the others."""
    VERIFY_VALUE2: ClassVar[int | None] = None
    VERIFY_VALUE3: ClassVar[int | None] = None
    VERIFY_VALUE4: ClassVar[int | None] = None
    ANY_CPUID: ClassVar[bool] = False
    """Without `MAGIC`: make every CPUID of the guest ours, not only every VMCALL."""

    name: ClassVar[str] = "bridge_handler"
    """Its name in outcomes and in the configuration; by default the class's, in snake case."""
    timeout: ClassVar[float | None] = None
    """Seconds to the hard deadline of one request: it is cancelled, and the guest gets the
    fallback. `None` leaves it to the server."""
    soft_timeout: ClassVar[float | None] = None
    """Seconds to the soft deadline: the guest gets WAIT and asks again, while the handler goes
    on. `None`: that of the server where `may_wait` is set, else none. `math.inf`: none."""
    may_wait: ClassVar[bool] = False
    """Its guests take WAIT for what it is and ask again, so that the server's soft deadline holds
    for it. Where `soft_timeout` is set it holds in any case."""
    wait: ClassVar[BridgeResponse[Any] | None] = None
    """What the guest is told at the soft deadline, before stamps; see `STANDARD_WAIT`."""
    retry_values: ClassVar[tuple[int, ...] | None] = None
    """Which of value1 to value4 a retry has in common with its request. Leave out one that
    counts the attempts."""
    serial: ClassVar[bool] = False
    """Answer one request at a time; the others wait for their turn."""
    instant: ClassVar[bool] = False
    """It answers without awaiting anything, so it needs no place in flight."""
    own_task: ClassVar[bool] = True
    """A request that waits is answered in a task of its own, named after the method. Without, it
    may share one with those before and after it, which saves some 10 to 30 microseconds."""
    shared: ClassVar[bool] = False
    """One instance may serve several VMs: it keeps nothing of a guest."""
    reads: ClassVar[tuple[GuestRead, ...]] = ()
    """Guest memory that it is known to read: an agent on another machine sends it along."""
    replay_ignore: ClassVar[tuple[str, ...]] = ()
    """What `vmibridge replay` leaves out when it compares answers, as `output.id`, `value2` or
    `/REGEX/`: what differs each time, such as an id or the time of day."""
    Settings: ClassVar[type[msgspec.Struct] | None] = None
    """The type of `[handlers.NAME]` in the configuration; an instance of it is then
    the only argument of the constructor."""
    methods: ClassVar[Mapping[int, Method]] = MappingProxyType({})
    """The methods by code, as marked with `@method`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = re.sub(
                r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__
            ).lower()
        # `@dataclass` would take it away, unless the class has one itself.
        if vars(cls).get("__hash__") is None:
            type.__setattr__(cls, "__hash__", object.__hash__)
        _check_attributes(cls)
        check_timeout(cls.timeout)
        check_timeout(cls.soft_timeout, "soft_timeout")
        check_retry_values(cls.retry_values)
        cls.methods = MappingProxyType(_collect_methods(cls))
        plain = (marked.name for marked in cls.methods.values() if marked.typed is None)
        for name in ("handle", *plain):
            _check_answer(cls, name)
        _add_reads(cls)

    @classmethod
    def is_concrete(cls) -> bool:
        """Whether this class can answer: it has a `REQUEST`, and nothing abstract."""
        return hasattr(cls, "REQUEST") and answers(cls) and not isabstract(cls)

    @classmethod
    def has_life(cls) -> bool:
        """Whether there is something to enter or leave: most handlers have nothing."""
        plain = (BridgeHandler.__aenter__, BridgeHandler.__aexit__)
        return (cls.__aenter__, cls.__aexit__) != plain

    @property
    def contract(self) -> BridgeContract:
        """What this handler answers to. Raises `ValueError` for a code out of range."""
        return contract_of(self)

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[T] | None:
        """Answer one request; `None` rejects it.

        Cancelled at its hard deadline, and when the server stops: the guest then has its
        fallback already, and `vmi.memory` is closed. From its soft deadline on, an access
        to `vmi.memory` waits until the guest has asked again.
        """
        marked = self.methods.get(packet.method)
        if marked is None:
            return None
        body = getattr(self, marked.name)
        if marked.typed is not None:
            return await marked.typed.answer(body, vmi, packet)
        response: BridgeResponse[T] | None = await body(vmi, packet)
        return response

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return None


def answers(cls: type[BridgeHandler[Any]]) -> bool:
    """Whether a class has a `handle` of its own, or methods."""
    return bool(cls.methods) or cls.handle is not BridgeHandler.handle


_NUMBER = (int, type(None))
_SECONDS = (int, float, type(None))
_ATTRIBUTES: Mapping[str, tuple[type, ...]] = {
    "REQUEST": (int,),
    "MAGIC": _NUMBER,
    "VERIFY_VALUE1": _NUMBER,
    "VERIFY_VALUE2": _NUMBER,
    "VERIFY_VALUE3": _NUMBER,
    "VERIFY_VALUE4": _NUMBER,
    "ANY_CPUID": (bool,),
    "name": (str,),
    "timeout": _SECONDS,
    "soft_timeout": _SECONDS,
    "may_wait": (bool,),
    "wait": (BridgeResponse, type(None)),
    "retry_values": (tuple, list, type(None)),
    "serial": (bool,),
    "instant": (bool,),
    "own_task": (bool,),
    "shared": (bool,),
    "reads": (tuple, list),
    "replay_ignore": (tuple, list),
    "Settings": (type, type(None)),
}
"""What a class attribute of a handler may be."""


def _check_attributes(cls: type[BridgeHandler[Any]]) -> None:
    # As the class has them, without calling a property: a mixin may be what shadows.
    for name in _ATTRIBUTES:
        value = getattr_static(cls, name, None)
        if isfunction(value):
            raise _shadows(cls, name)
        if value is not None or name != "REQUEST":
            _check_attribute(cls, name, value)
    for name in ("contract", "is_concrete", "has_life"):
        # A property or a class method may stand in for that of the base class.
        value = getattr_static(cls, name)
        if isfunction(value) or not hasattr(type(value), "__get__"):
            raise _shadows(cls, name)
    if "methods" in vars(cls):
        raise _shadows(cls, "methods")


def _check_attribute(cls: type[BridgeHandler[Any]], name: str, value: object) -> None:
    kinds = _ATTRIBUTES[name]
    # A bool is an int to Python; a number that is one was not meant.
    is_bool = type(value) is bool and bool not in kinds
    if is_bool or not issubclass(type(value), kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{cls.__name__}.{name} is {_shown(value)}, not of type {expected}")
    if name == "name" and not (value and str(value).isprintable()):
        raise TypeError(f"{cls.__name__}.name is {_shown(value)}, not printable text")
    if name == "Settings" and value is not None and not issubclass(value, msgspec.Struct):  # type: ignore[arg-type]
        raise TypeError(f"{cls.__name__}.Settings is {_shown(value)}, not a msgspec.Struct")
    if name == "replay_ignore" and not all(type(rule) is str for rule in value):  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__}.replay_ignore is {_shown(value)}, not of texts")
    if name == "reads" and not all(type(read) is GuestRead for read in value):  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__}.reads is {_shown(value)}, not of GuestReads")


def check_instance(handler: BridgeHandler[Any]) -> None:
    """Raise `TypeError` for an attribute of the instance that is out of range."""
    cls = type(handler)
    for name, value in getattr(handler, "__dict__", {}).items():
        if name in _ATTRIBUTES:
            _check_attribute(cls, name, value)
        elif name in ("methods", "contract", "is_concrete", "has_life") or (
            name == "handle" and not callable(value)
        ):
            raise _shadows(cls, name)


def _check_answer(cls: type[BridgeHandler[Any]], name: str) -> None:
    function = getattr_static(cls, name)
    if getattr(function, "__isabstractmethod__", False):
        return
    if not isfunction(function):
        # Such as a `partialmethod`: what other callables are cannot be seen.
        if not callable(getattr(cls, name)):
            raise TypeError(f"{cls.__name__}.{name} is {_shown(function)}, not an async method")
        return
    inner = unwrap(function)
    declared = str(getattr(function, "__annotations__", {}).get("return", ""))
    if not (
        iscoroutinefunction(function)
        or iscoroutinefunction(inner)
        or "Awaitable" in declared
        or "Coroutine" in declared
    ):
        raise TypeError(
            f"{cls.__name__}.{name} is not async; write 'async def {name}', or say in its return"
            " type that it is an Awaitable"
        )
    try:
        signature(function, follow_wrapped=False).bind(None, None, None)
    except TypeError:
        raise TypeError(
            f"{cls.__name__}.{name} does not take what it is given: (self, vmi, packet)"
        ) from None


def _add_reads(cls: type[BridgeHandler[Any]]) -> None:
    """What typed methods are known to read, to what the class says itself."""
    found = [
        read
        for marked in cls.methods.values()
        if marked.typed is not None
        for read in marked.typed.reads(marked.code)
        if read not in cls.reads
    ]
    if found:
        cls.reads = (*cls.reads, *found)


def _shown(value: object) -> str:
    return repr_of(value)[:80]


def _shadows(cls: type[BridgeHandler[Any]], name: str) -> TypeError:
    return TypeError(
        f"{cls.__name__}.{name} has the name of an attribute of BridgeHandler; rename it"
    )


def contract_of(handler: BridgeHandler[Any] | type[BridgeHandler[Any]]) -> BridgeContract:
    """The contract of a handler, or of a class of them. Raises `TypeError`, `ValueError`."""
    if not hasattr(handler, "REQUEST"):
        name = handler.__name__ if isinstance(handler, type) else type(handler).__name__
        raise ValueError(f"{name} has no REQUEST")
    return BridgeContract(
        handler.REQUEST,
        handler.MAGIC,
        handler.VERIFY_VALUE1,
        handler.VERIFY_VALUE2,
        handler.VERIFY_VALUE3,
        handler.VERIFY_VALUE4,
    )


def _collect_methods(cls: type[BridgeHandler[Any]]) -> dict[int, Method]:
    # A method that overrides a marked one answers in its place, marked again or not.
    marks: dict[str, Method] = {}
    for base in reversed(cls.__mro__):
        for attribute, value in vars(base).items():
            marked = getattr(value, "__bridge_method__", None)
            if isinstance(marked, Method):
                if hasattr(BridgeHandler, attribute):
                    raise _shadows(cls, attribute)
                marks[attribute] = marked._replace(name=attribute)
    methods: dict[int, Method] = {}
    for attribute, marked in marks.items():
        if marked.code in methods:
            raise TypeError(
                f"{cls.__name__}: {methods[marked.code].name} and {attribute}"
                f" both answer method {marked.code:#06x}"
            )
        methods[marked.code] = marked._replace(typed=compile_method(cls, attribute, marked.code))
    return methods
