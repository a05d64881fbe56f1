"""Who answers for a model with a generation that a client has seen deployed: during a canary, and while routes change, the broker
may give its call to an older one."""

from kernelm_sdk.system import SystemState


def of_generation(state: SystemState, model: str, at_least: int) -> list[str] | None:
    """The ready instances that answer for `model` as generation `at_least` or a later one; [] while that is on its way, None if
    there is no such thing."""
    swaps = [s for s in state.swaps if model in s.routes and s.generation >= at_least and s.phase in ("starting", "watching")]
    route = next((r for r in state.routes if r.kind == "model" and r.name == model and r.generation >= at_least), None)
    if not swaps and route is None:
        return None
    pools = {swap.pool for swap in swaps if swap.phase == "watching"} | {to.pool for to in (route.to if route else ())}
    return sorted(i.id for i in state.instances if i.pool in pools and i.state == "ready" and model in i.models)
