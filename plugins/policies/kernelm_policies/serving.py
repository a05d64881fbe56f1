"""Served models under policies that know nothing of load: a model keeps its replicas, within its bounds, and one that has gone to
zero gets its first one when it is called. How many the load needs is the default scheduler's to say."""

from collections.abc import Callable

from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, ModelState, NodeState, PendingJob, Share
from kernelm_policies.placing import Room
from kernelm_sdk.system import Resources


def beside_models(state: ClusterState, decide: Callable[[ClusterState], Decisions]) -> Decisions:
    """Decisions on the models, and those of `decide` on what is left."""
    first, rest = served(state)
    answer = decide(rest)
    return replace(answer, decisions=(*first, *answer.decisions))


def served(state: ClusterState) -> tuple[list[Decision], ClusterState]:
    """Decisions on the models, and the state in which they have been carried out."""
    if "scale" not in state.actions:
        return [], state
    room, decisions = Room(state), list[Decision]()
    models = {model.name: model for model in state.models}
    for model in sorted(state.models, key=lambda m: (-m.priority, m.name)):
        wanted = _wanted(model)
        if wanted > model.replicas and (more := _more(model, wanted - model.replicas, room)):
            shares = _together((*model.allocation, *more))
        elif wanted < model.replicas:
            shares = _fewer(model.allocation, wanted)
        else:
            continue
        count = sum(share.members for share in shares)
        models[model.name] = replace(model, allocation=shares, replicas=count)
        why = f"{count} replicas: between {model.minimum} and {model.maximum}, and one when it is called"
        node, plugin = shares[0].node if shares else "", next(iter(model.plugins), "")
        decisions.append(Decision(model.name, "scale", node, plugin, why, 0.0, shares))
    nodes = tuple(_node(node, room) for node in state.nodes)
    return decisions, replace(state, nodes=nodes, models=tuple(models.values())) if decisions else state


def _wanted(model: ModelState) -> int:
    called = model.arrivals_per_s > 0 or model.queue > 0
    return min(max(model.replicas, model.minimum, 1 if called else 0), max(model.maximum, model.minimum))


def _more(model: ModelState, count: int, room: Room) -> tuple[Share, ...]:
    """Places for so many further replicas, or for as many as there is room for; taken from the room."""
    probe = PendingJob(model.name, model.name, model.request, model.plugins, within="node")
    found: list[Share] = []
    for _ in range(count):
        shares = room.find(probe, model.type, 1)
        if not shares:
            break
        room.take(probe, shares, room.plugin(probe, shares))
        found += shares
    return tuple(found)


def _fewer(shares: tuple[Share, ...], count: int) -> tuple[Share, ...]:
    left: list[Share] = []
    for share in shares:
        members = min(share.members, count - sum(s.members for s in left))
        left += [replace(share, members=members)] if members > 0 else []
    return tuple(left)


def _together(shares: tuple[Share, ...]) -> tuple[Share, ...]:
    counts: dict[tuple[str, str], int] = {}
    for share in shares:
        counts[share.node, share.type] = counts.get((share.node, share.type), 0) + share.members
    return tuple(Share(node, members, type) for (node, type), members in counts.items())


def _node(node: NodeState, room: Room) -> NodeState:
    bin = room.bins[node.name]
    devices = tuple(replace(d, free=bin.free.get(d.type, d.free)) for d in node.devices)
    return replace(node, free=Resources(bin.cpu, bin.memory_mb, bin.gpus), plugins=dict(bin.plugins), devices=devices)
