"""Where the calls of a deployment go, as pure functions of the kernel's state: to its pool, or, while it has nobody who answers, to
this service, which says why. While another model replaces it the kernel moves the calls; only the part that is the deployment's own
is its own then."""

from collections.abc import Iterable

from kernelm_contracts.deployments import Deployment
from kernelm_jobs.deployment import LOG
from kernelm_jobs.holdings import GONE
from kernelm_sdk.system import Destination, PoolSpec, Swap, SystemState

QUARANTINED = "quarantined: "  # so begins what the kernel's health says of a pool that it does not start any more

Destinations = tuple[Destination, ...]


def pool_in(deployment: Deployment, system: SystemState) -> PoolSpec | None:
    return next((p for p in system.pools if p.pool == deployment.pool), None)


def swap_in(name: str, system: SystemState) -> Swap | None:
    """The swap that decides about the calls of `name` now."""
    return next((s for s in system.swaps if name in s.routes and not s.over), None)


def route_in(name: str, system: SystemState) -> Destinations:
    return next((r.to for r in system.routes if r.kind == "model" and r.name == name), ())


def shares(deployment: Deployment, swap: Swap | None, to: str) -> Destinations:
    """Where its calls are to go if what is its own of them goes to `to`: its pool, or the service that answers for it. A canary
    keeps its share and gets no more. () where it has none: the model that replaces it has all calls, or waits to take them."""
    if swap is None:
        return (Destination(to, 100),)
    if swap.before != deployment.pool:
        return ()
    if swap.phase == "watching" and swap.canary:
        return Destination(to, 100 - swap.canary), Destination(swap.pool, swap.canary)
    return (Destination(to, 100),) if swap.phase == "starting" else ()


def canaries(system: SystemState) -> dict[str, int]:
    """Deployment -> percent of its calls that go to what shall replace it."""
    return {name: swap.canary for swap in system.swaps if swap.phase == "watching" and swap.canary for name in swap.routes}


def quarantine(pool: str, system: SystemState) -> str:
    """Why the kernel does not start the pool any more, in one line; "" where it does."""
    said = system.health.get(f"pool {pool}", "")
    return said.removeprefix(QUARANTINED).partition(LOG)[0] if said.startswith(QUARANTINED) else ""


def failing(deployment: Deployment, places: Iterable[str], system: SystemState) -> tuple[set[str], str]:
    """(of the nodes where replicas are to be those where none lives, why the kernel starts no more of them); (set(), "") while it
    does, or where another model is about to replace it."""
    why = quarantine(deployment.pool, system)
    if not why or swap_in(deployment.name, system) is not None:
        return set(), ""
    alive = {i.node for i in system.instances if i.pool == deployment.pool and i.state not in GONE}
    return {node for node in places if node not in alive | deployment.avoid.keys()}, why
