"""The options of a spec or a URL: a wrong one is refused in the words of who writes it."""

from typing import Annotated, Literal

import msgspec
import pytest

from vmibridge.errors import BackendSpecError
from vmibridge.vm.spec import parse_options


class Options(msgspec.Struct):
    width: Literal[64, 32] = 64
    order: Literal["recorded", "vcpu"] = "recorded"
    stay: bool = False
    speed: float = 0.0
    copies: Annotated[int, msgspec.Meta(ge=1, le=10)] = 1
    loop: Annotated[int, msgspec.Meta(ge=0)] = 1
    most: int | None = None
    mode: int = 0o600


class Files(msgspec.Struct):
    cert: str
    key: str
    name: str = ""


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("width=17", "width=17 is not one of 64, 32"),
        ("order=wrong", "order=wrong is not one of recorded, vcpu"),
        ("stay=9", "stay=9 is not true or false"),
        ("speed=fast", "speed=fast is not a number"),
        ("copies=0", "copies=0 is not a whole number, 1 to 10"),
        ("loop=-1", "loop=-1 is not a whole number, 0 or more"),
        ("most=few", "most=few is not a whole number"),
        ("mode=9", "mode=9 is not the mode of a file, such as 0o600"),
        ("mode=640", "mode=640 is not the mode of a file, such as 0o640"),
        ("mode=0o1777", "mode=0o1777 is not the mode of a file, such as 0o600"),
        ("mode=384", "mode=384 is not the mode of a file, such as 0o600"),
        ("mode=1KiB", "mode=1KiB is not the mode of a file, such as 0o600"),
    ],
)
def test_a_wrong_value_is_told_with_what_it_may_be(options, why):
    with pytest.raises(BackendSpecError) as error:
        parse_options("vm:x", options, Options, {})
    assert str(error.value) == f"vm:x: {why}"


@pytest.mark.parametrize(
    ("options", "missing"), [("", "cert, key"), ("cert=a", "key"), ("key=a&name=b", "cert")]
)
def test_options_that_are_missing_are_named_with_those_that_are_needed(options, missing):
    with pytest.raises(BackendSpecError) as error:
        parse_options("tls:x", options, Files, {})
    assert str(error.value) == f"tls:x: needs the options cert=...&key=...: no {missing} is given"


def test_a_mode_is_octal():
    assert parse_options("vm:x", "mode=0o660", Options, {}).mode == 0o660
