"""What a spec of the device may say, and where the backend listens."""

import pytest

from vmibridge.backends import open_backend
from vmibridge.backends.device.backend import DeviceBackend
from vmibridge.errors import BackendError, BackendSpecError


@pytest.mark.parametrize(
    "options",
    [
        *("slots=0", "slots=257", "slots=x", "kernel=65", "hold=-1", "hold=2", "hold=2min"),
        *("timeout=0", "hold=100ms&timeout=300ms", "mode=600", "stay=maybe", "what=1"),
    ],
)
def test_a_wrong_option_is_refused(options):
    with pytest.raises(BackendSpecError):
        open_backend(f"vfio-user:unix:/tmp/s?{options}")


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("hold=10", "a duration of 0 to 1 s, in us, ms or s"),
        ("hold=-1", "a duration of 0 to 1 s, in us, ms or s"),
        ("timeout=1e9", "a duration of 0.05 to 3600 s, in us, ms or s"),
        ("slots=0x200", "a whole number, 1 to 256"),
    ],
)
def test_a_wrong_number_is_shown_as_it_was_given_with_unit_and_range(option, wanted):
    with pytest.raises(BackendSpecError, match=f"s: {option} is not {wanted}$"):
        open_backend(f"vfio-user:unix:/s?{option}")


def test_a_spec_needs_a_path():
    for where in ("vfio-user:", "vfio-user:unix:", "vfio-user:tcp:localhost:1"):
        with pytest.raises(BackendSpecError, match="path of a socket"):
            open_backend(where)


@pytest.mark.anyio
@pytest.mark.parametrize("scheme", ["vfio-user", "ivshmem"])
async def test_it_logs_where_it_listens(tmp_path, caplog, scheme):
    with caplog.at_level("INFO"):
        async with open_backend(f"{scheme}:unix:{tmp_path}/s", vm="web"):
            assert f"vm web: listening at unix:{tmp_path}/s" in caplog.text


@pytest.mark.anyio
async def test_where_another_listens_it_does_not(tmp_path):
    async with open_backend(f"vfio-user:unix:{tmp_path / 's'}"):
        with pytest.raises(BackendError, match="address already in use"):
            async with DeviceBackend(tmp_path / "s"):
                raise AssertionError
