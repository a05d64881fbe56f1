"""The routing table as a whole: several routes are set by one push, whoever looks or pushes meanwhile."""

import asyncio
from collections.abc import Callable
from typing import Any

from kernelm.testing.harness import System
from kernelm_sdk.system import Destination, Route


def pools(router: Any) -> set[str]:
    """Where the broker is to send calls of models, by the mappings that are pushed."""
    return {to["subject"].split(".")[1] for source, rows in router.mappings().items() if source.startswith("model.") for to in rows}


def held(owner: Any, method: str, when: Callable[[str], bool]) -> tuple[asyncio.Event, asyncio.Event]:
    """Have calls for which `when` says so of the first argument wait: (one is there, they may go on)."""
    whole, there, go_on = getattr(owner, method), asyncio.Event(), asyncio.Event()

    async def slow(what: str, *rest: Any, **more: Any) -> Any:
        if when(what):
            there.set()
            await go_on.wait()
        return await whole(what, *rest, **more)

    setattr(owner, method, slow)
    return there, go_on


async def test_while_several_routes_are_set_nobody_pushes_half_of_them_or_misses_one() -> None:
    async with System() as system:
        assert system.kernel is not None
        router = system.kernel.router

        def both(pool: str, generation: int) -> list[Route]:
            return [Route(name, "model", (Destination(pool, 100),), generation) for name in ("first", "second")]

        await router.set_all(both("old", 1))
        half, go_on = held(router._routes, "put", lambda key: key.endswith("second"))
        setting = asyncio.create_task(router.set_all(both("new", 2)))
        await half.wait()
        await router.check()  # raised "routes_not_in_force": one of the two was in the table, and not pushed yet
        await router.push()
        assert pools(router) == {"old"}
        go_on.set()
        await setting
        assert pools(router) == {"new"}
        await router.check()
        assert router.health == "in force"


async def test_the_state_tells_of_a_route_when_the_broker_has_it_and_not_before() -> None:
    async with System() as system:
        assert system.kernel is not None
        router = system.kernel.router

        def to(pool: str, generation: int) -> Route:
            return Route("news", "model", (Destination(pool, 100),), generation)

        async def told() -> list[str]:
            return [to.pool for route in (await system.state()).routes if route.name == "news" for to in route.to]

        await router.set_all([to("old", 1)])
        assert await told() == ["old"]
        pushes, go_on = held(router._system, "request", lambda subject: subject.endswith("CLAIMS.UPDATE"))
        setting = asyncio.create_task(router.set_all([to("new", 2)]))
        await pushes.wait()
        assert await told() == ["old"]  # was "new", while all calls still went to the old one
        go_on.set()
        await setting
        assert await told() == ["new"]
