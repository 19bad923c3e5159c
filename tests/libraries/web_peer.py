"""The web server of the tests: `web_peer.py PORT`. It ends a request whose client has gone."""

import asyncio
import sys

from aiohttp import web

routes = web.RouteTableDef()
under_way: list[web.Request] = []
together: list[asyncio.Future[None]] = []


@web.middleware
async def counted(request: web.Request, handler):
    under_way.append(request)
    try:
        return await handler(request)
    finally:
        under_way.remove(request)


@routes.get("/echo/{number}")
async def echo(request: web.Request) -> web.Response:
    return web.Response(text=request.match_info["number"])


@routes.get("/wait/{seconds}")
async def wait(request: web.Request) -> web.Response:
    await asyncio.sleep(float(request.match_info["seconds"]))
    return web.Response(text="0")


@routes.get("/lines")
async def lines(request: web.Request) -> web.StreamResponse:
    """Lines without an end."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    number = 0
    while True:
        await answer.write(b"%d\n" % number)
        number += 1
        await asyncio.sleep(0.001)


@routes.get("/together/{count}")
async def meet(request: web.Request) -> web.Response:
    """Answers when as many are here at a time."""
    here = asyncio.get_running_loop().create_future()
    together.append(here)
    try:
        if len(together) == int(request.match_info["count"]):
            for each in together:
                each.set_result(None)
        await here
    finally:
        together.remove(here)
    return web.Response(text="0")


@routes.get("/under-way")
async def count(request: web.Request) -> web.Response:
    return web.Response(text=str(len(under_way) - 1))


def main() -> None:
    app = web.Application(middlewares=[counted])
    app.add_routes(routes)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=None,
        access_log=None,
        handler_cancellation=True,
    )


main()
