"""A handler class says what it is by class attributes: a method may not take the name of one."""

import math

import pytest

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import GuestRead
from vmibridge.config import load_handlers
from vmibridge.errors import HandlerLoadError

OWN = [*(name for name in dir(BridgeHandler) if name[0] != "_"), "__aenter__", "__aexit__"]
DECLARED = [name for name in BridgeHandler.__annotations__ if name != "methods"]

SOURCE = """
from vmibridge import BridgeHandler, BridgeResponse, method

class Files(BridgeHandler[int]):
    MAGIC = 0x42494D56
    REQUEST = 0x100

    @method(9)
    async def {name}(self, vmi, packet):
        return BridgeResponse(value1=0)
"""


def made(*bases, **attributes):
    return type("Files", (*bases, BridgeHandler), attributes)


async def answer(self, vmi, packet):
    return BridgeResponse(value1=0)


@pytest.mark.parametrize("name", [*OWN, "REQUEST"])
def test_a_marked_method_has_a_name_of_its_own(name):
    with pytest.raises(TypeError, match=rf"Files\.{name} has the name of an attribute"):
        made(**{name: method(9)(answer)})


@pytest.mark.parametrize("name", [*DECLARED, "contract", "has_life", "is_concrete", "methods"])
def test_so_has_a_method_that_is_not_marked(name):
    def plain(self): ...

    with pytest.raises(TypeError, match=rf"Files\.{name} has the name of an attribute"):
        made(**{name: plain})


@pytest.mark.parametrize("name", ["shared", "name", "wait"])
def test_a_mixin_does_not_bring_one_either(name):
    mixin = type("Mixin", (), {name: method(9)(answer)})
    with pytest.raises(TypeError, match=rf"Files\.{name} has the name of an attribute"):
        made(mixin)


@pytest.mark.parametrize("name", ["shared", "name", "wait", "contract", "MAGIC", "REQUEST"])
def test_a_file_with_one_is_refused_in_one_line_with_its_place(name, tmp_path):
    file = tmp_path / "files.py"
    file.write_text(SOURCE.format(name=name))
    with pytest.raises(HandlerLoadError) as raised:
        load_handlers([str(file)])
    where, _, what = str(raised.value).partition(": TypeError: ")
    assert where == f"{file}:4"
    assert what == f"Files.{name} has the name of an attribute of BridgeHandler; rename it"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("REQUEST", "0x100", "int"),
        ("MAGIC", 1.5, "int or None"),
        ("VERIFY_VALUE1", b"", "int or None"),
        ("ANY_CPUID", 1, "bool"),
        ("name", None, "str"),
        ("timeout", "5", "int or float or None"),
        ("soft_timeout", "5", "int or float or None"),
        ("wait", 258, "BridgeResponse or None"),
        ("retry_values", 1, "tuple or list or None"),
        ("may_wait", "no", "bool"),
        ("serial", "no", "bool"),
        ("instant", None, "bool"),
        ("shared", "no", "bool"),
        ("reads", None, "tuple or list"),
        ("Settings", {}, "type or None"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, expected):
    with pytest.raises(TypeError, match=rf"^Files\.{name} is .*, not of type {expected}$"):
        made(**{name: value})


@pytest.mark.parametrize("name", DECLARED)
def test_no_attribute_is_a_property(name):
    """It is asked of the class, too, where a property is an object and true."""
    with pytest.raises(TypeError, match=rf"^Files\.{name} is <property"):
        made(**{name: property(lambda self: None)})


def test_values_of_these_types_are_taken():
    handler = made(
        REQUEST=1,
        MAGIC=None,
        name="mine",
        timeout=2,
        soft_timeout=math.inf,
        wait=BridgeResponse(value1=1),
        retry_values=(1, 2),
        serial=True,
        reads=(GuestRead(address=1, size=16),),
        answer=method(9)(answer),
    )
    assert handler.is_concrete()


def test_a_property_may_stand_in_for_the_contract():
    class Files(BridgeHandler):
        REQUEST = 0x100

        @property
        def contract(self):
            return super().contract

        @classmethod
        def has_life(cls):
            return True

    assert Files().contract.request == 0x100
