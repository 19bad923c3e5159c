"""The configuration file: TOML, decoded by msgspec.

    [server]
    timeout = 2.5
    fallback = { value1 = 0xffffffff }

    [policy]
    rings = [3]
    vm.requests = { burst = 100, rate = 50 }

    [handlers.fetch]
    allow = ["https://example.com/samples/"]

An error names the file, the line where it can be found, and the key.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import msgspec

from vmibridge.bridge.contract import STANDARD_FALLBACK
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.policy import AddressRange, Policy, Quota
from vmibridge.engine.settings import DEFAULTS, ServerSettings
from vmibridge.errors import ConfigError

__all__ = ["Config"]

S = TypeVar("S", bound=msgspec.Struct)

_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")


_Seconds = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class _Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    value1: _Unsigned | None = None
    value2: _Unsigned | None = None
    value3: _Unsigned | None = None
    value4: _Unsigned | None = None

    def __post_init__(self) -> None:
        # A number of more than 64 bits is told here, where its key is known.
        BridgeResponse(*msgspec.structs.astuple(self))


class _Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    timeout: _Seconds = DEFAULTS.timeout
    soft_timeout: _Seconds | None = DEFAULTS.soft_timeout
    wait: _Reply = _Reply(*DEFAULTS.wait.values)
    retry_values: tuple[Annotated[int, msgspec.Meta(ge=1, le=4)], ...] = DEFAULTS.retry_values
    result_timeout: _Seconds = DEFAULTS.result_timeout
    fallback: _Reply | Literal["standard"] = _Reply(*DEFAULTS.fallback.values)
    queue: _Count = DEFAULTS.queue
    in_flight: _Count = DEFAULTS.in_flight
    in_flight_total: _Count = DEFAULTS.in_flight_total
    grace: Annotated[float, msgspec.Meta(ge=0)] = DEFAULTS.grace
    stop_timeout: _Seconds = DEFAULTS.stop_timeout
    handshake: bool = DEFAULTS.handshake
    blocked_after: _Seconds = DEFAULTS.blocked_after

    def settings(self, policy: Policy | None) -> ServerSettings:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        replies = {
            name: BridgeResponse(*msgspec.structs.astuple(value))
            for name, value in values.items()
            if isinstance(value, _Reply)
        }
        if self.fallback == "standard":
            replies["fallback"] = STANDARD_FALLBACK
        return ServerSettings(**{**values, **replies}, policy=policy)


_Ring = Annotated[int, msgspec.Meta(ge=0, le=3)]
_Root = Annotated[int, msgspec.Meta(ge=0, le=(1 << 52) - 1, multiple_of=32)]


class _Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rings: Annotated[frozenset[_Ring], msgspec.Meta(min_length=1)] = frozenset({0, 1, 2, 3})
    address_spaces: frozenset[_Root] | None = None
    instructions: tuple[AddressRange, ...] | None = None
    vm: Quota = Quota()
    address_space: Quota = Quota()
    max_address_spaces: _Count = 4096
    denied: Literal["native", "skip"] | _Reply = "native"

    @property
    def policy(self) -> Policy:
        values = msgspec.structs.asdict(self)
        if isinstance(self.denied, _Reply):
            values["denied"] = BridgeResponse(*msgspec.structs.astuple(self.denied))
        return Policy(**values)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    server: _Server = _Server()
    policy: _Policy | None = None
    handlers: dict[str, dict[str, Any]] = {}


class Config:
    """A configuration; `Config()` is the one without a file."""

    def __init__(self, source: str = "", text: str = "") -> None:
        """Decode `text`, which errors call `source`. Raises `ConfigError`."""
        self._source = source
        self._text = text
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: {error}") from error
        self._file = self._convert(tree, _File, ())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The configuration in a file. Raises `ConfigError`."""
        try:
            return cls(str(path), path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def server(self) -> ServerSettings:
        """`[server]` with `[policy]`, and defaults for what is not there."""
        return self._file.server.settings(self.policy)

    @property
    def policy(self) -> Policy | None:
        """`[policy]`; `None` where the file has no such table."""
        return None if self._file.policy is None else self._file.policy.policy

    def settings_of(self, handler: str, kind: type[S]) -> S:
        """`[handlers.NAME]`, decoded. Raises `ConfigError`."""
        return self._convert(self._file.handlers.get(handler, {}), kind, ("handlers", handler))

    def check_handlers(self, known: Collection[str]) -> None:
        """Raises `ConfigError` when there are settings for a handler that is not loaded."""
        for name in self._file.handlers:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"loaded: {', '.join(sorted(known))}"
                )
                raise self._error(("handlers", name), f"no such handler is loaded; {hint}")

    def has_settings(self, handler: str) -> bool:
        """Whether there are settings for this handler."""
        return handler in self._file.handlers

    def refuse_settings(self, handler: str, why: str) -> None:
        """Raises `ConfigError`, saying `why`, when there are settings for this handler."""
        if handler in self._file.handlers:
            raise self._error(("handlers", handler), f"the handler {why}")

    def _convert(self, tree: dict[str, Any], kind: type[S], path: tuple[str, ...]) -> S:
        try:
            return msgspec.convert(tree, kind)
        except msgspec.ValidationError as error:
            message = str(error)
            at = _AT.search(message)
            inside = re.findall(r"[\w-]+", at["path"]) if at else []
            unknown = re.search(r"unknown field `([^`]+)`", message)
            if unknown:
                message = f"no such key; there are {', '.join(_keys_at(kind, inside))}"
                inside.append(unknown[1])
            elif message.startswith("Invalid enum value") and (known := _words_at(kind, inside)):
                message = f"no such value; there are {', '.join(known)}"
            raise self._error((*path, *inside), _AT.sub("", message)) from error

    def _error(self, path: tuple[str, ...], message: str) -> ConfigError:
        line = _line_of(self._text, path)
        place = self._source if line is None else f"{self._source}:{line}"
        return ConfigError(f"{place}: {'.'.join(path) or 'the file'}: {message}")


def _keys_at(kind: Any, path: Iterable[str]) -> list[str]:
    """The keys that a table may have."""
    return [field.encode_name for option in _types_at(kind, path) for field in _fields(option)]


def _words_at(kind: Any, path: Iterable[str]) -> list[str]:
    """The words that a key may have for a value."""
    literals = [option for option in _types_at(kind, path) if get_origin(option) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def _types_at(kind: Any, path: Iterable[str]) -> list[Any]:
    """What the value of a key may be: the parts of a union. An index is a key, too."""
    kinds = _options(kind)
    for key in path:
        inside: list[Any] = []
        for option in kinds:
            inside += [field.type for field in _fields(option) if field.encode_name == key]
            # The values of a dict, the items of what else holds any.
            inside += get_args(option)[1:] if get_origin(option) is dict else get_args(option)[:1]
        kinds = [option for part in inside for option in _options(part)]
    return kinds


def _options(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for part in get_args(kind) for option in _options(part)]
    return [kind]


def _fields(kind: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    struct = get_origin(kind) or kind
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
        return msgspec.structs.fields(kind)
    return ()


def _line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line of a key, for the usual forms of TOML.

    Otherwise the first line of what is in it, or that of the nearest table around it.
    """
    table: tuple[str, ...] = ()
    inside: int | None = None
    around: int | None = None
    lengths: Counter[tuple[str, ...]] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?([^\]]+)\]", line)
        entry = re.match(r"\s*([\w\-.\"']+)\s*=", line)
        if header:
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            if line.lstrip().startswith("[["):
                lengths[table] += 1
                table = (*table, str(lengths[table] - 1))
            here = table
        elif entry:
            here = (*table, *(part.strip("\"'") for part in entry[1].split(".")))
        else:
            continue
        if here == path:
            return number
        if here == path[: len(here)]:
            around = number
        elif inside is None and path and path == here[: len(path)]:
            inside = number
    return inside or around
