"""What one uses without vmibridge to have work done in another process: grpc.aio and NATS.

Each gives the seconds for the same bodies, there and back, with so many callers at a time.
Both need asyncio; grpcio and the NATS server come with the extra `test`.
"""

import asyncio
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

Ask = Callable[[bytes], Awaitable[object]]


async def timed(ask: Ask, bodies: list[bytes], in_flight: int) -> float:
    async def one(mine: list[bytes]) -> None:
        for body in mine:
            await ask(body)

    await ask(bodies[0])
    start = time.perf_counter()
    async with anyio.create_task_group() as callers:
        for number in range(in_flight):
            callers.start_soon(one, bodies[number::in_flight])
    return time.perf_counter() - start


async def grpc_aio(path: str, bodies: list[bytes], in_flight: int) -> float:
    """A unary call over a unix socket."""
    import grpc

    async def answer(body: bytes, _: object) -> bytes:
        return body

    method = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.aio.server()
    handlers = grpc.method_handlers_generic_handler("bench", {"echo": method})
    server.add_generic_rpc_handlers((handlers,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        taken = await timed(channel.unary_unary("/bench/echo"), bodies, in_flight)
    await server.stop(None)
    return taken


async def nats_request(path: str, bodies: list[bytes], in_flight: int) -> float:
    """A request to a queue group, through a server on the same core."""
    import nats

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("nats-server", path=str(Path(sys.executable).parent))
    assert program is not None, "there is no nats-server: install the extra test"
    server = await asyncio.create_subprocess_exec(
        *(program, "-a", "127.0.0.1", "-p", str(port), "-l", f"{path}.log")
    )
    try:
        url = f"nats://127.0.0.1:{port}"
        while True:
            with socket.socket() as listens:
                if not listens.connect_ex(("127.0.0.1", port)):
                    break
            await asyncio.sleep(0.05)
        worker = await nats.connect(url)
        caller = await nats.connect(url)

        async def answer(message: object) -> None:
            await message.respond(message.data)

        async def ask(body: bytes) -> None:
            await caller.request("bench", body, timeout=10)

        await worker.subscribe("bench", queue="bench", cb=answer)
        await worker.flush()
        taken = await timed(ask, bodies, in_flight)
        await caller.close()
        await worker.close()
    finally:
        server.terminate()
        await server.wait()
    return taken


PEERS = {"grpc.aio": grpc_aio, "nats": nats_request}
