"""The guide's table of taps has every call, field and event that there is."""

import inspect
import re
from typing import get_args

import msgspec
from documents import section

from vmibridge.engine.taps import HandlerBegan, NativeReason, Tap
from vmibridge.vm.backend import SessionEventKind


def told():
    lines = section("docs/guide.md", "## A tap of your own").splitlines()
    return [line for line in lines if line.startswith("| ")]


def names(rows, column):
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[column])]


def test_every_call_of_a_tap_is_there():
    calls = [name for name, _ in inspect.getmembers(Tap, inspect.isfunction) if name != "room"]
    assert set(calls) <= set(names(told(), 0))


def test_every_field_of_a_handler_that_begins_is_there():
    assert {field.name for field in msgspec.structs.fields(HandlerBegan)} <= set(names(told(), 0))


def test_every_event_of_a_session_and_every_reason_is_there():
    rows = "\n".join(told())
    assert [kind.name for kind in SessionEventKind if f"`{kind.name}`" not in rows] == []
    assert [reason for reason in get_args(NativeReason) if f'"{reason}"' not in rows] == []
