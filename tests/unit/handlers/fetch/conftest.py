"""Servers, a guest and a handler for the tests of the fetch handler."""

import socket
from collections.abc import Iterator

import anyio
import pytest
import trustme
from fetch_parts import Site, serving


@pytest.fixture(scope="module", autouse=True)
def each_test_collects_its_garbage(only_new_garbage):
    """See `serving`."""


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def fetch(load_handler):
    return load_handler("fetch")


@pytest.fixture
def make(fetch):
    """A handler with the settings given."""

    def make(**fields):
        return fetch.Fetch(fetch.Fetch.Settings(**fields))

    return make


@pytest.fixture
def resolve(monkeypatch):
    """Answer every look-up with the addresses given, and keep the names."""

    def resolve(*addresses: str) -> list[str]:
        asked: list[str] = []

        async def getaddrinfo(host, port, **options):
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

        monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
        return asked

    return resolve
