"""Sizes in specs and options of commands."""

import pytest

from vmibridge.vm.spec import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("0x10", 16),
        ("4K", 4096),
        ("1MiB", 1 << 20),
        ("2G", 2 << 30),
        ("1GiB", 1 << 30),
    ],
)
def test_sizes_have_units_of_1024(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1B", "1KB", "1iB", "1k", "1KiBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="invalid literal"):
        parse_size(text)
