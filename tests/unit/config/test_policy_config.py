"""`[policy]` of the configuration file: what it makes, and what is told when it is wrong."""

import pytest

from vmibridge import BridgeResponse
from vmibridge.config import Config
from vmibridge.engine.access_policy import AddressRange, Policy, Quota, Rate
from vmibridge.errors import ConfigError

TOP = (1 << 64) - 1

ALL = """
[server]
timeout = 1

[policy]
rings = [3, 0]
address_spaces = [0x1000, 0x20, 0xffffffffff000]
instructions = [
    { start = 0x1000, end = 0x1fff },
    { start = 0xffff800000000000, end = 0xffffffffffffffff },
]
max_address_spaces = 7
denied = { value1 = 1, value4 = 0xffffffffffffffff }

[policy.vm]
requests = { burst = 100, rate = 2.5 }
bytes = { burst = 9223372036854775808 }

[policy.address_space.requests]
burst = 1
"""


def policy_of(text: str) -> Policy | None:
    return Config("file.toml", text).policy


def test_every_key():
    assert policy_of(ALL) == Policy(
        rings=frozenset({0, 3}),
        address_spaces=frozenset({0x1000, 0x20, 0xF_FFFF_FFFF_F000}),
        instructions=(AddressRange(0x1000, 0x1FFF), AddressRange(0xFFFF_8000_0000_0000, TOP)),
        vm=Quota(Rate(100, 2.5), Rate(2.0**63)),
        address_space=Quota(Rate(1)),
        max_address_spaces=7,
        denied=BridgeResponse(value1=1, value4=TOP),
    )


def test_without_the_table_there_is_no_policy():
    assert policy_of("[server]\ntimeout = 1\n") is None


def test_what_is_not_there_is_as_in_the_default():
    assert policy_of("[policy]\n") == Policy()
    assert policy_of("[policy]\nvm.requests = { burst = 5 }\n") == Policy(vm=Quota(Rate(5)))


@pytest.mark.parametrize("word", ["native", "skip"])
def test_denied_may_be_a_word(word):
    assert policy_of(f"[policy]\ndenied = '{word}'\n") == Policy(denied=word)


def test_ranges_may_be_an_array_of_tables():
    text = "".join(f"[[policy.instructions]]\nstart = {n}\nend = {n}\n" for n in (1, 3))
    assert policy_of(text) == Policy(instructions=(AddressRange(1, 1), AddressRange(3, 3)))


def test_empty_lists_are_not_the_same_as_none():
    policy = policy_of("[policy]\naddress_spaces = []\ninstructions = []\n")
    assert policy == Policy(address_spaces=frozenset(), instructions=())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "[policy]\nring = [3]",
            "2: policy.ring: no such key; there are rings, address_spaces, instructions, vm, addr",
        ),
        ("[policy]\nrings = [4]", "2: policy.rings.0: must be 0 to 3, got 4"),
        ("[policy]\nrings = [0, -1]", "2: policy.rings.1: must be 0 to 3, got -1"),
        ("[policy]\n\nrings = []", "3: policy.rings: must have 1 or more, got 0"),
        ("[policy]\nrings = [true]", "2: policy.rings.0: must be an integer, got a boolean"),
        (
            "[policy]\naddress_spaces = [0x1000, 0x1005]",
            "2: policy.address_spaces.1: must be a page-table root of 52 bits, the low 5 clear",
        ),
        (
            "[policy]\naddress_spaces = [0xffff800000000000]",
            "2: policy.address_spaces.0: must be a page-table root of 52 bits",
        ),
        (
            "[policy]\nmax_address_spaces = 0",
            "2: policy.max_address_spaces: must be 1 or more, got 0",
        ),
        (
            "[policy]\nrings = [3]\nvm.requests = { brust = 3 }",
            "3: policy.vm.requests.brust: no such key; there are burst, rate",
        ),
        (
            "[policy.address_space]\n[policy.address_space.bytes]\nburst = 1\nper = 3",
            "4: policy.address_space.bytes.per: no such key; there are burst, rate",
        ),
        ("[policy.vm]\nbits = 1", "2: policy.vm.bits: no such key; there are requests, bytes"),
        (
            "[policy.vm.requests]\nburst = 3\nrate = -1",
            "3: policy.vm.requests.rate: must be a finite number, 0 or more, got -1",
        ),
        (
            "[policy.vm.bytes]\nburst = 0",
            "2: policy.vm.bytes.burst: must be a finite number above 0, got 0",
        ),
        (
            "[policy.vm.bytes]\nburst = nan",
            "2: policy.vm.bytes.burst: must be a finite number above 0, got nan",
        ),
        (
            "[policy.vm.bytes]\nburst = inf",
            "2: policy.vm.bytes.burst: must be a finite number above 0, got inf",
        ),
        (
            "[policy.vm.bytes]\nrate = 1",
            "1: policy.vm.bytes: the key burst is missing; write burst = ... into [policy.vm",
        ),
        (
            "[policy.vm.requests]\nburst = 0.5",
            "1: policy.vm: requests.burst is at least one request, got 0.5",
        ),
        (
            "[policy]\nrings = [3]\nvm.requests = { burst = 0.5 }",
            "3: policy.vm: requests.burst is at least one request, got 0.5",
        ),
        ("[policy]\ndenied = 'drop'", "2: policy.denied: no such value; there are native, skip"),
        (
            "[policy]\ndenied = { value5 = 1 }",
            "2: policy.denied.value5: no such key; there are value1, value2, value3, value4",
        ),
        ("[policy.denied]\nvalue2 = -1", "2: policy.denied.value2: must be 0 or more, got -1"),
        (
            "[policy]\ndenied = { value2 = 0x1ffffffffffffffff }",
            "2: policy.denied: value2 has 64 bits, got 0x1",
        ),
        (
            "[policy]\ninstructions = [{ start = 1, end = 2 }, { start = 2, edn = 3 }]",
            "2: policy.instructions.1.edn: no such key; there are start, end",
        ),
        (
            "[policy]\ninstructions = [{ start = 0x20, end = 0x10 }]",
            "2: policy.instructions.0: a range goes up from start to end",
        ),
        (
            "[policy]\ninstructions = [{ start = 0, end = 0x10000000000000000 }]",
            "2: policy.instructions.0: a range goes up",
        ),
        (
            "[policy]\ninstructions = [{ start = 0 }]",
            "2: policy.instructions.0: the key end is missing; write end = ... there",
        ),
        ("policy = 3", "1: policy: must be a table, got an integer"),
    ],
)
def test_what_is_wrong_is_named_with_key_and_line(text, told):
    with pytest.raises(ConfigError) as error:
        policy_of(text)
    assert str(error.value).startswith(f"file.toml:{told}")


@pytest.mark.parametrize(
    ("broken", "at", "told"),
    [
        ("edn = 9", 6, "policy.instructions.1.edn: no such key; there are start, end"),
        ("end = 0", 4, "policy.instructions.1: a range goes up from start to end"),
    ],
)
def test_of_an_array_of_tables_the_one_that_is_wrong_is_named(broken, at, told):
    ends = ["end = 9", broken, "end = 9"]
    text = "\n".join(
        f"[[policy.instructions]]\nstart = {start}\n{end}" for start, end in enumerate(ends)
    )
    with pytest.raises(ConfigError) as error:
        policy_of(text)
    assert str(error.value).startswith(f"file.toml:{at}: {told}")
