"""What tools see that follow what a task awaits, where its body runs inline."""

from types import coroutine

import pytest

from vmibridge.aio.coroutines import run_inline


@pytest.mark.anyio
async def test_tools_that_follow_what_is_awaited_find_the_body():
    @coroutine
    def forever():
        while True:
            yield "a wish"

    async def body():
        await forever()

    running = run_inline(body(), lambda: None)
    running.send(None)
    assert running.gi_yieldfrom.cr_frame.f_code is body.__code__
    assert running.gi_yieldfrom.cr_await.gi_code.co_name == "forever"
    running.close()
