"""Recordings in JetStream, and NATS that does not let us keep them."""

import anyio
import pytest
from nats_parts import ON_ASYNCIO, nats_server

from vmibridge.errors import BackendError, RecordingError
from vmibridge.transport.nats import store as nats_store
from vmibridge.transport.nats.store import get_recording, list_recordings, put_recording
from vmibridge.transport.urls.nats import parse_nats_url

pytestmark = ON_ASYNCIO

USERS = """
    authorization { users = [
        { user: all, password: a }
        { user: none, password: n, permissions: { publish: "else.>" } }
    ] }
"""


@pytest.fixture
def url(tmp_path):
    config = f'jetstream {{ store_dir: "{tmp_path / "jetstream"}" }}\n{USERS}'
    with nats_server(tmp_path, config) as server:
        yield f"{server.url}?user=all&password=a"


@pytest.fixture
def recording(tmp_path):
    file = tmp_path / "web-1.mcap"
    file.write_bytes(b"\x89MCAP0\r\n" + bytes(2000) + b"\x89MCAP0\r\n")
    return file


async def test_a_store_whose_objects_are_gone_lists_nothing(url, recording):
    import nats

    parsed = parse_nats_url(url)
    await put_recording(parsed, recording)
    client = await nats.connect(parsed.servers, user="all", password="a")
    store = await client.jetstream().object_store(parsed.bucket)
    await store.delete(recording.name)
    assert await list_recordings(parsed) == []
    await client.jetstream().purge_stream(f"OBJ_{parsed.bucket}")
    await client.close()
    assert await list_recordings(parsed) == []


async def test_what_a_user_may_not_do_is_said(url, recording, monkeypatch):
    parsed = parse_nats_url(url.replace("user=all&password=a", "user=none&password=n"))
    with pytest.raises(RecordingError, match=r'not permit publish to "\$js\.api'):
        await list_recordings(parsed)


async def test_a_wrong_password_is_an_error_of_nats(url):
    with pytest.raises(BackendError, match="wrong credentials"):
        await list_recordings(parse_nats_url(url.replace("=a", "=x")))


async def test_a_place_that_cannot_be_written_leaves_nothing(url, recording, tmp_path):
    parsed = parse_nats_url(url)
    await put_recording(parsed, recording)
    with pytest.raises(RecordingError, match="No such file"):
        await get_recording(parsed, recording.name, tmp_path / "nowhere" / "again")


async def test_what_came_back_otherwise_is_no_recording(url, recording, tmp_path, monkeypatch):
    from nats.js.errors import DigestMismatchError
    from nats.js.object_store import ObjectStore

    async def get(*_):
        raise DigestMismatchError

    parsed = parse_nats_url(url)
    await put_recording(parsed, recording)
    monkeypatch.setattr(ObjectStore, "get", get)
    with pytest.raises(RecordingError, match="what came is not what was put there"):
        await get_recording(parsed, recording.name, tmp_path / "again")
    assert not [each for each in tmp_path.iterdir() if "again" in each.name]


async def test_a_jetstream_that_says_nothing_is_given_up(url, monkeypatch):
    from nats.js import JetStreamContext

    monkeypatch.setattr(nats_store, "_ANSWER", 0.05)
    monkeypatch.setattr(JetStreamContext, "object_store", lambda *_: anyio.sleep_forever())
    with pytest.raises(RecordingError, match="JetStream does not answer"):
        await list_recordings(parse_nats_url(url))
