"""The configuration file: TOML, decoded by msgspec.

    [server]
    timeout = 2.5
    fallback = { value1 = 0xffffffff }

    [policy]
    rings = [3]
    vm.requests = { burst = 100, rate = 50 }

    [handlers.fetch]
    allow = ["https://example.com/samples/"]

    [replay]
    ignore = ["output.id"]

An error names the file, the line where it can be found, and the key.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, UnsetType

from vmibridge.bridge.bounds import options, plain_type, problem
from vmibridge.bridge.contract import STANDARD_FALLBACK
from vmibridge.bridge.response import BridgeResponse
from vmibridge.engine.access_policy import Policy
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import ConfigError

__all__ = ["Config"]

S = TypeVar("S", bound=msgspec.Struct)

_Unsigned = Annotated[int, msgspec.Meta(ge=0)]
_MISSING = re.compile(r"missing required field `([^`]+)`")
_EXPECTED = re.compile(r"Expected `([^`]*)`([^,]*)(?:, got `([^`]*)`)?")
_TYPES = MappingProxyType(
    {
        "object": "a table",
        "array": "an array",
        "str": "a string",
        "int": "an integer",
        "float": "a number",
        "bool": "a boolean",
        "datetime": "a date and time",
    }
)
"""What TOML calls the types of msgspec."""
_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")


class _Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    value1: _Unsigned | None = None
    value2: _Unsigned | None = None
    value3: _Unsigned | None = None
    value4: _Unsigned | None = None

    def __post_init__(self) -> None:
        # A number of more than 64 bits is reported here, where its key is known.
        BridgeResponse(*msgspec.structs.astuple(self))


def _table(
    struct: type[msgspec.Struct],
    *,
    without: str = "",
    words: Mapping[str, Any] = MappingProxyType({}),
) -> type[msgspec.Struct]:
    """What a table of the file is decoded into that sets the fields of `struct`.

    It has a key for each field but `without`, of the same type and bounds; none of them has to be
    there, so defaults are those of `struct`. A response is a table of its values, or one of the
    `words` that are given for its key.
    """
    keys: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(struct):
        kinds = [_Reply if _is_response(kind) else kind for kind in options(field.type)]
        if field.name != without:
            kinds.append(words.get(field.name, UnsetType))
            keys.append((field.name, Union[(*kinds, UnsetType)], UNSET))
    return msgspec.defstruct(f"_{struct.__name__}", keys, frozen=True, forbid_unknown_fields=True)


def _is_response(kind: Any) -> bool:
    plain = plain_type(kind)
    return (get_origin(plain) or plain) is BridgeResponse


def _given(table: msgspec.Struct) -> dict[str, Any]:
    """The fields that a decoded table sets."""
    values = {name: getattr(table, name) for name in table.__struct_fields__}
    return {
        name: BridgeResponse(*msgspec.structs.astuple(value))
        if isinstance(value, _Reply)
        else value
        for name, value in values.items()
        if value is not UNSET
    }


# The policy is a table beside it.
_SERVER = _table(ServerSettings, without="policy", words={"fallback": Literal["standard"]})
_POLICY = _table(Policy)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    server: dict[str, Any] = {}
    policy: dict[str, Any] | None = None
    handlers: dict[str, dict[str, Any]] = {}
    replay: dict[str, Any] = {}


class _Replay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ignore: tuple[str, ...] = ()


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
        except RecursionError as error:
            raise ConfigError(f"{source}: is nested too deeply") from error
        except ValueError as error:
            # A number of more than 4,300 digits, or a date that there is not.
            raise ConfigError(f"{source}: has a value that cannot be read: {error}") from error
        self._file = self._convert(tree, _File, ())
        table = self._file.policy
        self._policy = None
        if table is not None:
            self._policy = Policy(**_given(self._convert(table, _POLICY, ("policy",))))
        given = _given(self._convert(self._file.server, _SERVER, ("server",)))
        if given.get("fallback") == "standard":
            given["fallback"] = STANDARD_FALLBACK
        self._server = ServerSettings(**given, policy=self._policy)
        self._replay = self._convert(self._file.replay, _Replay, ("replay",))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The configuration in a file. Raises `ConfigError`."""
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            line = 1 + error.object.count(b"\n", 0, error.start)
            raise ConfigError(f"{path}:{line}: is not text in UTF-8") from error
        except ValueError as error:  # a path with a NUL
            raise ConfigError(f"{path}: {error}") from error
        if text.startswith("\ufeff"):
            raise ConfigError(f"{path}:1: begins with a byte order mark; save it as UTF-8 without")
        return cls(str(path), text)

    @property
    def server(self) -> ServerSettings:
        """`[server]` with `[policy]`, and defaults for what is not there."""
        return self._server

    @property
    def policy(self) -> Policy | None:
        """`[policy]`; `None` where the file has no such table."""
        return self._policy

    @property
    def replay_ignore(self) -> tuple[str, ...]:
        """`ignore` of `[replay]`: what `vmibridge replay` does not compare."""
        return self._replay.ignore

    @property
    def source(self) -> str:
        """What errors call it."""
        return self._source

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

    @property
    def handler_names(self) -> tuple[str, ...]:
        """The handlers that the file has settings for."""
        return tuple(self._file.handlers)

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
            elif missing := _MISSING.search(message):
                raise self._missing((*path, *inside), missing[1]) from error
            elif message.startswith("Invalid enum value") and (known := _words_at(kind, inside)):
                message = f"no such value; there are {', '.join(known)}"
            else:
                value = _value_at(tree, inside)
                found = (problem(value, option) for option in _types_at(kind, inside))
                message = next((why for why in found if why is not None), _in_words(message))
            raise self._error((*path, *inside), _AT.sub("", message)) from error

    def _missing(self, path: tuple[str, ...], key: str) -> ConfigError:
        table = ".".join(path)
        if not self._source:
            return ConfigError(
                f"{table}: needs the setting {key}: write {key} = ... into [{table}] of a file, and"
                " give that with --config"
            )
        where = "there" if any(part.isdigit() for part in path) else f"into [{table}]"
        return self._error(path, f"the key {key} is missing; write {key} = ... {where}")

    def _error(self, path: tuple[str, ...], message: str) -> ConfigError:
        line = _line_of(self._text, path)
        place = self._source if line is None else f"{self._source}:{line}"
        return ConfigError(f"{place}: {'.'.join(path) or 'the file'}: {message}")


def _in_words(message: str) -> str:
    """What msgspec says of a type, in the words of TOML."""
    expected = _EXPECTED.match(message)
    if expected is None:
        return message
    kinds = [kind for kind in expected[1].split(" | ") if kind != "null"]
    wanted = " or ".join(_TYPES.get(kind, kind) for kind in kinds)
    got = f", got {_TYPES.get(expected[3], expected[3])}" if expected[3] else ""
    return f"must be {wanted}{expected[2]}{got}"


def _keys_at(kind: Any, path: Iterable[str]) -> list[str]:
    """The keys that a table may have."""
    return [field.encode_name for option in _types_at(kind, path) for field in _fields(option)]


def _words_at(kind: Any, path: Iterable[str]) -> list[str]:
    """The words that a key may have for a value."""
    kinds = [plain_type(option) for option in _types_at(kind, path)]
    literals = [plain for plain in kinds if get_origin(plain) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def _types_at(kind: Any, path: Iterable[str]) -> list[Any]:
    """What the value of a key may be: the parts of a union. An index is a key, too."""
    kinds = options(kind)
    for key in path:
        inside: list[Any] = []
        for option in kinds:
            inside += [field.type for field in _fields(option) if field.encode_name == key]
            plain = plain_type(option)
            # The values of a dict, the items of what else holds any.
            inside += get_args(plain)[1:] if get_origin(plain) is dict else get_args(plain)[:1]
        kinds = [option for part in inside for option in options(part)]
    return kinds


def _value_at(tree: Any, path: Iterable[str]) -> object:
    """The value of a key; `None` where it cannot be found."""
    for key in path:
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return tree


def _fields(kind: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    plain = plain_type(kind)
    struct = get_origin(plain) or plain
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
        return msgspec.structs.fields(plain)
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
