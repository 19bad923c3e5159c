"""Outputs as text that two processes have in common, and compared as values."""

import dataclasses
import sys

import msgspec
import pytest
from children import run as run_child
from odd_objects import OUTPUTS

from vmibridge.recording.outputs import MAX_TEXT, OutputText, leaves_of, output_text, stable


class Plain:
    pass


class Struct(msgspec.Struct):
    members: set[str]


@dataclasses.dataclass
class Data:
    members: frozenset[int]


def local_class():
    class Local:
        pass

    return Local


def different(then, now, output=None):
    leaves = leaves_of(then, now, output)
    return None if leaves is None else [leaf.path for leaf in leaves]


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (None, None),
        ({"b", "a", "c"}, '["a","b","c"]'),
        ({"b": 1, "a": {"y", "x"}}, '{"a":["x","y"],"b":1}'),
        ({2: {"y", "x"}, 1: 0}, '{"1":0,"2":["x","y"]}'),
        (Struct({"y", "x"}), '{"members":["x","y"]}'),
        (Data(frozenset({2, 1})), '{"members":[1,2]}'),
        (Plain(), '"<Plain object at ...>"'),
        ([Plain()], '["<Plain object at ...>"]'),
        (local_class()(), '"<Local object at ...>"'),
        (Plain, "\"<class 'Plain'>\""),
        (local_class, '"<function local_class at ...>"'),
        ("<Plain object at 0x7f0012345678>", '"<Plain object at 0x7f0012345678>"'),
        ({1, "a", Plain}, '["<class \'Plain\'>","a",1]'),
    ],
)
def test_the_text_has_no_order_of_hashes_and_no_address(output, text):
    assert output_text(output) == text


def test_the_text_is_the_same_in_processes_with_other_hashes():
    code = (
        "from vmibridge.recording.outputs import OutputText\n"
        "words = {str(n) for n in range(2000)}\n"
        "print(OutputText.of([words, {word: object() for word in words}]))"
    )
    first, second = (
        run_child(
            [sys.executable, "-c", code],
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    assert "digest='" in first


def test_what_is_behind_the_cut_is_in_the_digest():
    one, other = (OutputText.of("x" * 5000 + end) for end in "ab")
    assert one.text == other.text
    assert len(one.text) == MAX_TEXT + 3
    assert one.digest != other.digest
    assert OutputText.of("x" * 5000 + "a") == one
    assert OutputText.of("x" * 10).digest is None


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_output_raises(name):
    text = output_text(OUTPUTS[name])
    assert text == output_text(OUTPUTS[name])
    assert leaves_of(text, text, OUTPUTS[name]) in ([], None)


@pytest.mark.parametrize(
    ("then", "now", "paths"),
    [
        ('{"a":1,"b":2}', '{"b":2,"a":1}', []),
        ('{"id":1,"n":[1,{"m":2}]}', '{"id":2,"n":[1,{"m":3}]}', [".id", ".n[1].m"]),
        ('{"a b":1}', '{"c":1}', ['["a b"]', ".c"]),
        ("[1,2]", "[2,1]", ["[0]", "[1]"]),
        ("[1]", "[1,2]", [""]),
        ("1", "1.0", [""]),
        ("1", "true", [""]),
        ('"a"', "null", [""]),
        ('{"a":[' + "1," * 99 + "1]}", '{"a":[' + "2," * 99 + "2]}", [""]),
        ('"a', '"a"', None),
    ],
)
def test_outputs_differ_where_their_values_do(then, now, paths):
    assert different(then, now) == paths


class TestAnOlderRecording:
    """It has sets in the order of their hashes, and addresses."""

    def test_of_a_set_has_the_same_members(self):
        assert different('["b","a"]', '["a","b"]', {"a", "b"}) == []
        assert different('{"s":["b","a"]}', '{"s":["a","b"]}', {"s": {"a", "b"}}) == []
        assert different('["b","b"]', '["a","b"]', {"a", "b"}) == ["[0]"]
        assert different('["b","a"]', '["a","b"]', ["a", "b"]) == ["[0]", "[1]"]

    def test_of_an_object_has_another_address(self):
        then = '"<vmibridge_handlers_h_18d0f.h.Plain object at 0x7f1234567890>"'
        assert different(then, output_text(Plain()), Plain()) == []
        assert different(then.replace("Plain", "Other"), output_text(Plain()), Plain()) == [""]

    def test_of_a_text_that_looks_like_one_has_it(self):
        one, other = (f'"<Plain object at 0x7f000000000{n}>"' for n in (1, 2))
        assert different(one, other, "<Plain object at 0x7f0000000002>") == [""]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "<vmibridge.config.loaded./srv/handlers@2.fetch.Job object at 0x7f12>",
            "<Job object at ...>",
        ),
        ("in vmibridge.config.loaded./srv/handlers.fetch.Job", "in fetch.Job"),
        (
            "<bound method Job.run of <m.Job object at 0x7f12>>",
            "<bound method Job.run of <Job object at ...>>",
        ),
        ("<coroutine object run at 0x7f12>", "<coroutine object run at ...>"),
        ("<function <lambda> at 0x7f12>", "<function <lambda> at ...>"),
        ("guest memory at 0x9000: 5 < 6", "guest memory at 0x9000: 5 < 6"),
        ("at 0x10 > 5", "at 0x10 > 5"),
    ],
)
def test_addresses_and_paths_are_left_out_of_a_repr_alone(text, kept):
    assert stable(text) == kept


@pytest.mark.parametrize(
    "part", ["<", "<a ", "<class '", "at 0x1", "a.", "vmibridge.config.loaded.", "<'> object at 0x"]
)
def test_a_text_of_megabytes_is_read_once(part):
    # Not in a time: one that is read again for each of its places takes hours.
    assert stable(part * 200_000)
