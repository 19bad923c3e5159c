"""What guests are made of, wherever vmibridge runs from: the folder `guest/` of the source.

| file | is |
|---|---|
| `include/` | `bridge.inc`, `vmibridge.h` and their like |
| `linux/vmibridge_device/` | the driver of Linux for the device by which guests call |
| `demo/` | the guest of `vmibridge demo`: source and image |
| `init/` | the first process of `vmibridge qemu initramfs`: source and image |
| `tools/` | the source of vmib, which `vmibridge guest tools` compiles |
| `qemu/fetch-qemu` | the script of `vmibridge qemu fetch` |

A wheel has these in the package, a checkout beside it.
"""

from pathlib import Path

from vmibridge.errors import VmiBridgeError


def guest_file(name: str) -> Path:
    """A file or folder by its path in `guest/`. Raises `VmiBridgeError`: it was not installed."""
    package = Path(__file__).resolve().parent
    for folder in (package / "guest", package.parent / "guest"):
        if (folder / name).exists():
            return folder / name
    raise VmiBridgeError(f"{package / 'guest' / name}: is missing: install vmibridge again")
