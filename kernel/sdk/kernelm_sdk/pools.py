"""Which pool a name means. Pure: the kernel asks it of what it holds, a client of the state that it was told."""

from collections.abc import Iterable, Mapping

from kernelm_sdk.system import PoolSpec, Route


def find_pool(name: str, pools: Mapping[str, PoolSpec], routes: Iterable[Route]) -> PoolSpec | None:
    """The pool called so, or the one that serves the contract, deployment or plugin called so; what runs comes before what is
    parked. None where there is nothing of the kind."""
    called = [name] if name in pools and not pools[name].parked else []
    routed = [route.to[-1].pool for route in routes if route.name == name and route.to]
    of_plugin = [p.pool for p in pools.values() if p.plugin == name and p.contracts and not p.parked][-1:]
    return next((pools[pool] for pool in (*called, *routed, *of_plugin, name) if pool in pools), None)
