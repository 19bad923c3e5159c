"""What a server is started from.

| module | holds |
|---|---|
| `file` | the TOML file |
| `handlers` | files, folders and modules of handlers, and the handlers that a VM gets of them |
"""

from vmibridge.config.file import Config
from vmibridge.config.handlers import (
    HandlerFactory,
    Offered,
    find_handlers,
    load_handlers,
    reload_handlers,
)

__all__ = [
    "Config",
    "HandlerFactory",
    "Offered",
    "find_handlers",
    "load_handlers",
    "reload_handlers",
]
