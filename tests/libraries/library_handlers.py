"""A handler for each library, written as the documentation of the library has it.

All have the same methods, so that one guest calls them all. A pool has `POOL` connections, which
are fewer than there are vCPUs: what waits for a connection is cut off, too.
"""

from abc import abstractmethod
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import anyio

from vmibridge import BridgeContext, BridgeHandler, BridgePacket, BridgeResponse, method

POOL = 4
HOUR = 3600.0
DEADLINE = 0.02
"""Seconds that a request has which may be cut off."""

BRIEF, HASTY, SLOW, CHANGE, LEAVE = range(1, 6)
DEADLINES = {BRIEF: 60.0, HASTY: DEADLINE, SLOW: DEADLINE, CHANGE: DEADLINE, LEAVE: 60.0}


class Library(BridgeHandler[None]):
    """What the guest calls, and what a library has to do for it.

    An answer carries what was asked, as value1: one that was meant for another request shows.
    """

    MAGIC = 0x4C49_4252
    REQUEST = 0x0001

    loops: ClassVar[tuple[str, ...]] = ("asyncio", "uvloop")
    shields: ClassVar[bool] = False
    """Whether it shields its clean-up by scopes of anyio, which `Task.cancel` does not respect."""
    longest_round: ClassVar[int] = 1000
    """Requests of a round at most: for more there are more rounds."""

    def __init__(self, server: Any) -> None:
        self.server = server

    @method(BRIEF, timeout=DEADLINES[BRIEF])
    async def brief(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """A request that has all the time it needs."""
        return BridgeResponse(value1=await self.echo(packet.value1))

    @method(HASTY, timeout=DEADLINES[HASTY])
    async def hasty(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """The same, begun value2 microseconds after the trap: its deadline comes anywhere in it."""
        await anyio.sleep(packet.value2 / 1e6)
        return BridgeResponse(value1=await self.echo(packet.value1))

    @method(SLOW, timeout=DEADLINES[SLOW])
    async def slow(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """The server works for value2 microseconds; with 0 for an hour."""
        await self.work(packet.value2 / 1e6 or HOUR)
        return BridgeResponse(value1=packet.value1)

    @method(CHANGE, timeout=DEADLINES[CHANGE])
    async def change(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """What takes several exchanges, with value2 microseconds in the middle."""
        await self.transact(packet.value1, packet.value2 / 1e6)
        return BridgeResponse(value1=packet.value1)

    @method(LEAVE, timeout=DEADLINES[LEAVE])
    async def leave(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        """A stream that is left after its first piece."""
        await self.first_of_many()
        return BridgeResponse(value1=packet.value1)

    @abstractmethod
    async def echo(self, number: int) -> int: ...

    @abstractmethod
    async def work(self, seconds: float) -> None: ...

    async def transact(self, number: int, seconds: float) -> None:
        await self.echo(number)
        await anyio.sleep(seconds)
        await self.echo(number)

    @abstractmethod
    async def first_of_many(self) -> None: ...

    @abstractmethod
    async def use_all_at_once(self) -> None:
        """Use every connection that the pool may have, all at the same time."""

    async def give_back_lost(self) -> int:
        """Give the pool back the connections that it has lost by the one fault of the library that
        is known, and return how many they were. Called while no request is under way."""
        return 0

    async def half_done(self) -> int:
        """How many changes are there by halves."""
        return 0


METHODS = {
    BRIEF: Library.brief,
    HASTY: Library.hasty,
    SLOW: Library.slow,
    CHANGE: Library.change,
    LEAVE: Library.leave,
}


TABLE = "create table if not exists pairs (number bigint, side int)"
INSERT = "insert into pairs values "
HALVES = "select count(*) from (select number from pairs group by number having count(*) % 2 = 1) x"
MANY = "select generate_series(1, 100000)"


class Asyncpg(Library):
    async def __aenter__(self):
        import asyncpg

        self.pool = await asyncpg.create_pool(
            host=self.server.host, user="postgres", min_size=1, max_size=POOL
        )
        await self.pool.execute(TABLE)
        return self

    async def __aexit__(self, *error):
        await self.pool.close()

    async def echo(self, number):
        return await self.pool.fetchval("select $1::bigint", number)

    async def work(self, seconds):
        await self.pool.execute("select pg_sleep($1)", seconds)

    async def transact(self, number, seconds):
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(INSERT + "($1, 0)", number)
            await anyio.sleep(seconds)
            await connection.execute(INSERT + "($1, 1)", number)

    async def first_of_many(self):
        async with self.pool.acquire() as connection, connection.transaction():
            async for _ in connection.cursor(MANY):
                return

    async def use_all_at_once(self):
        async with AsyncExitStack() as held:
            for _ in range(POOL):
                connection = await held.enter_async_context(self.pool.acquire())
                assert await connection.fetchval("select 1") == 1
        assert self.pool.get_idle_size() == self.pool.get_size() == POOL

    async def half_done(self):
        return await self.pool.fetchval(HALVES)


class Psycopg(Library):
    async def __aenter__(self):
        from psycopg_pool import AsyncConnectionPool

        self.pool = AsyncConnectionPool(
            f"host={self.server.host} user=postgres dbname=postgres",
            min_size=POOL,
            max_size=POOL,
            open=False,
            check=AsyncConnectionPool.check_connection,
        )
        await self.pool.open(wait=True)
        async with self.pool.connection() as connection:
            await connection.execute(TABLE)
        return self

    async def __aexit__(self, *error):
        await self.pool.close()

    async def echo(self, number):
        async with self.pool.connection() as connection:
            cursor = await connection.execute("select %s::bigint", (number,))
            return (await cursor.fetchone())[0]

    async def work(self, seconds):
        async with self.pool.connection() as connection:
            await connection.execute("select pg_sleep(%s)", (seconds,))

    async def transact(self, number, seconds):
        async with self.pool.connection() as connection, connection.transaction():
            await connection.execute(INSERT + "(%s, 0)", (number,))
            await anyio.sleep(seconds)
            await connection.execute(INSERT + "(%s, 1)", (number,))

    async def first_of_many(self):
        async with self.pool.connection() as connection:
            async for _ in connection.cursor().stream(MANY):
                return

    async def use_all_at_once(self):
        async with AsyncExitStack() as held:
            for _ in range(POOL):
                connection = await held.enter_async_context(self.pool.connection())
                await connection.execute("select 1")
        stats = self.pool.get_stats()
        assert stats["pool_size"] == POOL
        assert stats.get("requests_waiting", 0) == 0

    async def half_done(self):
        async with self.pool.connection() as connection:
            return (await (await connection.execute(HALVES)).fetchone())[0]


class Sqlalchemy(Library):
    """Over a driver."""

    driver: ClassVar[str]

    async def __aenter__(self):
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        self.text = text
        self.engine = create_async_engine(
            f"postgresql+{self.driver}://postgres@/postgres?host={self.server.host}",
            pool_size=POOL,
            max_overflow=0,
            pool_pre_ping=True,
        )
        self.sessions = async_sessionmaker(self.engine)
        async with self.sessions.begin() as session:
            await session.execute(text(TABLE))
        return self

    async def __aexit__(self, *error):
        await self.engine.dispose()

    async def echo(self, number):
        async with self.sessions() as session:
            asked = self.text("select cast(:number as bigint)")
            return await session.scalar(asked, {"number": number})

    async def work(self, seconds):
        async with self.sessions() as session:
            await session.execute(self.text("select pg_sleep(:seconds)"), {"seconds": seconds})

    async def transact(self, number, seconds):
        async with self.sessions.begin() as session:
            await session.execute(self.text(INSERT + "(:number, 0)"), {"number": number})
            await anyio.sleep(seconds)
            await session.execute(self.text(INSERT + "(:number, 1)"), {"number": number})

    async def first_of_many(self):
        async with self.sessions() as session:
            async for _ in await session.stream(self.text(MANY)):
                return

    async def use_all_at_once(self):
        async with AsyncExitStack() as held:
            for _ in range(POOL):
                connection = await held.enter_async_context(self.engine.connect())
                await connection.execute(self.text("select 1"))
        assert self.engine.pool.checkedout() == 0
        assert self.engine.pool.checkedin() == POOL

    async def half_done(self):
        async with self.sessions() as session:
            return await session.scalar(self.text(HALVES))


class SqlalchemyAsyncpg(Sqlalchemy):
    driver = "asyncpg"


class SqlalchemyPsycopg(Sqlalchemy):
    driver = "psycopg"


class RedisClient(Library):
    async def __aenter__(self):
        from redis import asyncio as redis

        self.pool = redis.BlockingConnectionPool(
            connection_class=redis.UnixDomainSocketConnection,
            path=self.server.path,
            max_connections=POOL,
            timeout=30,
        )
        self.client = redis.Redis(connection_pool=self.pool)
        await self.client.ping()
        return self

    async def __aexit__(self, *error):
        await self.client.aclose()
        await self.pool.aclose()

    async def echo(self, number):
        return int(await self.client.echo(str(number)))

    async def work(self, seconds):
        await self.client.blpop("nobody pushes here", timeout=seconds)

    async def transact(self, number, seconds):
        async with self.client.pipeline(transaction=True) as pipe:
            pipe.incr("left")
            await anyio.sleep(seconds)
            pipe.incr("right")
            await pipe.execute()

    async def first_of_many(self):
        for number in range(20):
            await self.client.sadd("many", number)
        async for _ in self.client.sscan_iter("many"):
            return

    async def use_all_at_once(self):
        async with AsyncExitStack() as held:
            for _ in range(POOL):
                # A client of one connection, which it has taken from the pool.
                client = await held.enter_async_context(self.client.client())
                assert await client.ping()

    async def half_done(self):
        left, right = await self.client.mget("left", "right")
        return int(left or 0) - int(right or 0)


class Httpx(Library):
    loops = ("asyncio", "uvloop", "trio")
    shields = True
    # It loses connections by itself (see below). With none left each request waits for its
    # deadline, until the round is over.
    longest_round = 100

    async def __aenter__(self):
        import httpx

        self.client = httpx.AsyncClient(
            base_url=self.server.url,
            limits=httpx.Limits(max_connections=POOL, max_keepalive_connections=POOL),
            timeout=30,
            trust_env=False,
        )
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error):
        await self.client.__aexit__(*error)

    async def echo(self, number):
        return int((await self.client.get(f"/echo/{number}")).raise_for_status().text)

    async def work(self, seconds):
        (await self.client.get(f"/wait/{seconds}")).raise_for_status()

    async def first_of_many(self):
        async with self.client.stream("GET", "/lines") as answer:
            async for _ in answer.aiter_lines():
                return

    async def give_back_lost(self):
        # encode/httpcore#1093: a request that is cancelled after the pool has made a connection
        # for it, and before it was opened, leaves it in the pool: it is neither idle nor closed.
        pool = self.client._transport._pool
        lost = [each for each in pool.connections if not each.is_idle() and not each.is_closed()]
        for connection in lost:
            assert connection._connection is None, f"lost, but not by that fault: {connection}"
            pool._connections.remove(connection)
        return len(lost)

    async def use_all_at_once(self):
        async with anyio.create_task_group() as tasks:
            for _ in range(POOL):
                tasks.start_soon(self.client.get, f"/together/{POOL}")


class Aiohttp(Library):
    async def __aenter__(self):
        import aiohttp

        self.session = aiohttp.ClientSession(
            self.server.url,
            connector=aiohttp.TCPConnector(limit=POOL),
            timeout=aiohttp.ClientTimeout(total=30),
            raise_for_status=True,
        )
        return self

    async def __aexit__(self, *error):
        await self.session.close()

    async def echo(self, number):
        async with self.session.get(f"/echo/{number}") as answer:
            return int(await answer.text())

    async def work(self, seconds):
        async with self.session.get(f"/wait/{seconds}") as answer:
            await answer.read()

    async def first_of_many(self):
        async with self.session.get("/lines") as answer:
            async for _ in answer.content:
                return

    async def use_all_at_once(self):
        async def one():
            async with self.session.get(f"/together/{POOL}") as answer:
                await answer.read()

        async with anyio.create_task_group() as tasks:
            for _ in range(POOL):
                tasks.start_soon(one)
