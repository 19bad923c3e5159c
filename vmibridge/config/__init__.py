"""What a server is started from.

| module | holds |
|---|---|
| `file` | the TOML file |
| `handlers`, `checks` | the handlers that a VM gets, and what is wrong with them |
| `sources`, `loaded`, `foreign` | what handlers come from; modules made of it; what those raise |
| `source_files` | the files that a reload would read |
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
