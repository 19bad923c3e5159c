"""Handlers are no package: they are loaded by path, as the server loads them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HANDLERS = Path(__file__).parents[3] / "handlers"


@pytest.fixture(scope="session")
def load_handler() -> Callable[[str], ModuleType]:
    """Load `handlers/NAME.py` afresh."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, HANDLERS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
