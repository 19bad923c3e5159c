"""Recordings in a JetStream object store: put there, listed, and got back.

A recording is one object, in chunks, with a SHA-256 that is checked when it is got.
"""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec

from vmibridge.aio.own_thread import in_own_thread
from vmibridge.errors import BackendError, NatsRefusedError, RecordingError
from vmibridge.files import reason
from vmibridge.text import printable
from vmibridge.transport.nats.client import NatsClient
from vmibridge.transport.urls.nats import NatsUrl

if TYPE_CHECKING:
    from nats.errors import Error
    from nats.js.object_store import ObjectStore

_MAGIC = b"\x89MCAP0\r\n"
"""At both ends of a file that was finished (MCAP specification, "Magic")."""
_SLOW = 256 << 10
"""Bytes a second: what is slower has stopped."""
_ANSWER = 30.0
"""Seconds for anything that JetStream does, beyond what its bytes take."""


class StoredRecording(msgspec.Struct, frozen=True):
    """One object of the store."""

    name: str
    size: int
    """Bytes."""
    digest: str
    """Of its content, as JetStream has it: `SHA-256=` and base64."""


async def put_recording(url: NatsUrl, file: Path, name: str | None = None) -> StoredRecording:
    """Keep a finished recording, under the name of its file by default.

    The store is made when it is not there. Raises `RecordingError` for a file that is none or
    is not finished, for a name that is taken, and when it fails; `BackendError` without NATS.
    """
    from nats.js.errors import ObjectNotFoundError

    name = name or file.name
    size = await in_own_thread(_finished, file)
    async with _store(url, create=True, seconds=_ANSWER + size / _SLOW) as store:
        try:
            await store.get_info(name)
        except ObjectNotFoundError:
            pass
        else:
            raise RecordingError(f"{url}: {name}: already exists")
        with file.open("rb") as source:
            done = await store.put(name, source)
    return StoredRecording(name, done.size or 0, done.digest or "")


async def get_recording(url: NatsUrl, name: str, target: Path) -> StoredRecording:
    """Write a recording that is kept to `target`, which must not be there.

    Raises as `put_recording` does; then there is no file.
    """
    if await in_own_thread(target.exists):
        raise RecordingError(f"{target}: already exists")
    async with _store(url, seconds=_ANSWER) as store:
        info = await store.get_info(name)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        async with _store(url, seconds=_ANSWER + (info.size or 0) / _SLOW) as store:
            with partial.open("xb") as sink:
                await store.get(name, sink)
        os.link(partial, target)
    except OSError as error:
        raise RecordingError(f"{target}: {reason(error, target)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return StoredRecording(name, info.size or 0, info.digest or "")


async def list_recordings(url: NatsUrl) -> list[StoredRecording]:
    """What is kept, by name. Raises as `put_recording` does."""
    from nats.js.errors import NotFoundError

    async with _store(url, seconds=_ANSWER) as store:
        try:
            found = await store.list(ignore_deletes=True)
        except NotFoundError:
            found = []
    return sorted(
        (StoredRecording(each.name, each.size or 0, each.digest or "") for each in found),
        key=lambda each: each.name,
    )


@asynccontextmanager
async def _store(
    url: NatsUrl, *, seconds: float, create: bool = False
) -> "AsyncIterator[ObjectStore]":
    from nats.errors import Error
    from nats.js.errors import (
        BucketNotFoundError,
        DigestMismatchError,
        InvalidBucketNameError,
        ObjectNotFoundError,
    )

    client = NatsClient(url, "vmibridge recordings")
    at_work = False
    try:
        async with client:
            with anyio.fail_after(seconds) as scope:
                # A client without the right to ask gets no answer at all.
                client.on_trouble = scope.cancel
                stream = client.nats.jetstream()
                try:
                    store = await stream.object_store(url.bucket)
                except BucketNotFoundError:
                    if not create:
                        raise
                    store = await stream.create_object_store(
                        url.bucket, description="recordings of vmibridge"
                    )
                at_work = True
                yield store
            if client.denied:
                raise RecordingError(f"{url}: {client.denied[0]}")
    except (NatsRefusedError, OSError) as error:
        if isinstance(error, TimeoutError):
            raise RecordingError(f"{url}: JetStream does not answer") from error
        if at_work and isinstance(error, OSError):
            raise RecordingError(f"{error.filename}: {error.strerror}") from error
        # The text of asyncio has the address in it once more, as a tuple.
        refused = isinstance(error, ConnectionRefusedError)
        why = "connection refused" if refused else getattr(error, "strerror", None) or str(error)
        raise BackendError(f"{url}: {why}") from error
    except ObjectNotFoundError:
        raise RecordingError(f"{url}: no recording of that name in {url.bucket}") from None
    except BucketNotFoundError:
        raise RecordingError(f"{url}: there is no store {url.bucket}") from None
    except InvalidBucketNameError:
        raise RecordingError(f"{url}: a store has letters, digits, - and _") from None
    except DigestMismatchError as error:
        raise RecordingError(f"{url}: what came is not what was put there") from error
    except Error as error:
        raise RecordingError(f"{url}: {_refusal(error)}") from error


def _refusal(error: "Error") -> str:
    """What JetStream says, such as that it is full; or that there is none."""
    from nats.errors import NoRespondersError
    from nats.js.errors import APIError, ServiceUnavailableError

    if isinstance(error, APIError) and error.description:
        return f"JetStream refuses: {printable(error.description)}"
    # nats-py makes the second one, without a description, when there is no answer.
    if isinstance(error, NoRespondersError | ServiceUnavailableError):
        return "this NATS has no JetStream"
    return type(error).__name__


def _finished(file: Path) -> int:
    """Its size in bytes. Raises `RecordingError` unless it is a recording that was finished."""
    try:
        with file.open("rb") as source:
            start = source.read(len(_MAGIC))
            size = source.seek(0, os.SEEK_END)
            source.seek(max(0, size - len(_MAGIC)))
            end = source.read()
    except OSError as error:
        raise RecordingError(f"{file}: {error.strerror}") from error
    if start != _MAGIC:
        raise RecordingError(f"{file}: is not a recording")
    if end != _MAGIC or size < 2 * len(_MAGIC):
        raise RecordingError(f"{file}: is not finished: vmibridge recover makes a whole one of it")
    return size
