"""`scheduler/1`: what is decided can be carried out, for every pending job, the same for the same state, and for all in the end."""

import random
from collections import Counter, defaultdict
from typing import Any

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.results import Failed
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, NodeState, PendingJob, PlacedJob, Share
from kernelm_sdk.system import Resources

checks = Checks()
STATES, ROUNDS, ROUND_S = 25, 400, 60.0
PLUGINS = ("a", "b")
NOW = 1_000_000.0


def state_of(chance: random.Random, quotas: bool = False) -> ClusterState:
    """A cluster of a few nodes, some of it in use, and more jobs than fit."""
    nodes, placed = [], []
    for n in range(chance.randint(1, 4)):
        capacity = Resources(float(chance.randint(2, 16)), chance.choice((4096, 16384)), chance.choice((0, 0, 2)))
        slots = {p: chance.randint(0, 3) for p in PLUGINS if chance.random() < 0.8}
        free = capacity
        if chance.random() < 0.6:
            used = Resources(1.0, 1024, 0)
            free = Resources(capacity.cpu - 1.0, capacity.memory_mb - 1024, capacity.gpus)
            placed.append(PlacedJob(f"placed-{n}", f"node-{n}", used, tenant=chance.choice(("x", "y")), started=NOW - 60))
        nodes.append(NodeState(f"node-{n}", capacity, free, slots))
    pending = []
    for n in range(chance.randint(1, 12)):
        request = Resources(chance.choice((0.5, 1.0, 2.0, 4.0)), chance.choice((256, 2048, 6000)), chance.choice((0, 0, 0, 1)))
        able = tuple(chance.sample(PLUGINS, chance.randint(1, 2)))
        pending.append(PendingJob(f"job-{n}", f"stage-{n}", request, able, chance.randint(0, 2), chance.choice(("x", "y")),
                                  NOW - chance.randint(0, 3600), members=chance.choice((1, 1, 1, 1, 2, 3))))  # fmt: skip
    most = {"x": Resources(float(chance.randint(1, 6)), 8192, 1)} if quotas else {}
    return ClusterState(chance.randint(1, 10**6), NOW, tuple(nodes), tuple(pending), tuple(placed), most)


async def decide(case: Case, state: ClusterState) -> tuple[Decisions, str]:
    """(decisions, the exchange for people)."""
    exchange = await case.call("scheduler/1", "decide", msgspec.to_builtins(state))
    if not exchange.answered:
        raise Failed("`decide` is not answered", exchange.text)
    try:
        return msgspec.json.decode(exchange.replies[-1].body, type=Decisions), exchange.text
    except msgspec.DecodeError as error:
        raise Failed(f"the reply is no Decisions: {error}", exchange.text) from None


def states(case: Case, what: str, quotas: bool = False) -> list[ClusterState]:
    """The same in each run."""
    chance = case.chance(what)
    return [state_of(chance, quotas) for _ in range(STATES)]


def shares(job: PendingJob, decision: Decision) -> tuple[Share, ...]:
    """Where its members go."""
    return decision.allocation or (Share(decision.node, job.members),)


def placements(state: ClusterState, decisions: Decisions) -> list[tuple[PendingJob, Decision]]:
    """The pending jobs that are placed."""
    jobs = {j.id: j for j in state.pending}
    return [(jobs[d.job], d) for d in decisions.decisions if d.action == "place" and d.job in jobs]


@checks.add(
    "scheduler.every-job",
    "decides on every pending job once, and on the state that it was given",
    "one of place, wait (with the reason) and reject for each; `version` is the state's",
)
async def every_job(case: Case) -> None:
    for state in states(case, "every"):
        decisions, text = await decide(case, state)
        if decisions.version != state.version:
            raise Failed(f"`version` is {decisions.version}, and the state's {state.version}", text)
        count = Counter(d.job for d in decisions.decisions if d.action in ("place", "wait", "reject"))
        for job in state.pending:
            if count[job.id] == 0:
                raise Failed(f"no decision on {job.id}", text)
        for decision in decisions.decisions:
            if decision.action not in ("place", "wait", "reject", *state.actions):
                raise Failed(f"{decision.action!r} of {decision.job} can't be carried out: `actions` is {state.actions}", text)
            if decision.job not in count or decision.job not in {j.id for j in state.pending}:
                raise Failed(f"a decision on {decision.job!r}, which is not pending", text)
            if decision.action != "place" and not decision.reason:
                raise Failed(f"{decision.action} {decision.job} without a reason", text)


@checks.add(
    "scheduler.assignment",
    "places each job once, whole, on nodes that are there, with a plugin that they have",
    "a gang starts with all of its members or waits; `plugin` is one of the job's, with an instance on each node",
)
async def assignment(case: Case) -> None:
    for state in states(case, "assignment"):
        decisions, text = await decide(case, state)
        nodes, seen = {n.name: n for n in state.nodes}, set[str]()
        for job, decision in placements(state, decisions):
            if job.id in seen:
                raise Failed(f"{job.id} is placed twice", text)
            seen.add(job.id)
            given = shares(job, decision)
            if missing := [s.node for s in given if s.node not in nodes]:
                raise Failed(f"{job.id} is placed on {missing[0]!r}, which is no node", text)
            if not job.members <= sum(s.members for s in given) <= max(job.most, job.members):
                raise Failed(f"{job.id} gets {sum(s.members for s in given)} members, and runs with {job.members}", text)
            if decision.plugin not in job.plugins or any(decision.plugin not in nodes[s.node].plugins for s in given):
                raise Failed(f"{job.id} is placed with plugin {decision.plugin!r}, which it or the node does not have", text)


@checks.add(
    "scheduler.room",
    "gives nothing away twice: what it places fits into what is free",
    "take what a placement uses from what is free before the next one: cores, memory, accelerators, slots of the plugin",
)
async def room(case: Case) -> None:
    for state in states(case, "room"):
        decisions, text = await decide(case, state)
        used, slots = defaultdict[str, list[float]](lambda: [0.0, 0.0, 0.0]), Counter[tuple[str, str]]()
        for job, decision in placements(state, decisions):
            for share in shares(job, decision):
                for k, amount in enumerate((job.request.cpu, job.request.memory_mb, job.request.gpus)):
                    used[share.node][k] += share.members * amount
                slots[share.node, decision.plugin] += share.members
        for node in state.nodes:
            free = (node.free.cpu, node.free.memory_mb, node.free.gpus)
            for name, taken, there in zip(("cores", "MB", "accelerators"), used[node.name], free, strict=True):
                if taken > there + 1e-6:
                    raise Failed(f"{taken:g} {name} are placed on {node.name}, which has {there:g} free", text)
            for plugin in PLUGINS:
                if slots[node.name, plugin] > node.plugins.get(plugin, 0):
                    raise Failed(f"{slots[node.name, plugin]} members with {plugin} on {node.name}, which takes "
                                 f"{node.plugins.get(plugin, 0)} more", text)  # fmt: skip


@checks.add("scheduler.quotas", "keeps a tenant within its quota", "count what its placed jobs hold, and each new placement")
async def quotas(case: Case) -> None:
    for state in states(case, "quotas", quotas=True):
        decisions, text = await decide(case, state)
        held = defaultdict[str, float](float)
        for placed in state.placed:
            held[placed.tenant] += placed.request.cpu
        for job, decision in placements(state, decisions):
            held[job.tenant] += job.request.cpu * sum(s.members for s in shares(job, decision))
        for tenant, most in state.quotas.items():
            before = sum(p.request.cpu for p in state.placed if p.tenant == tenant)
            if held[tenant] > max(most.cpu, before) + 1e-6:
                raise Failed(f"tenant {tenant!r} holds {held[tenant]:g} cores after this, and may hold {most.cpu:g}", text)


@checks.add(
    "scheduler.deterministic",
    "decides the same for the same state, whatever it was asked before",
    "no random numbers, no clock (`now` is in the state), no order of a set, no state between two calls",
)
async def deterministic(case: Case) -> None:
    given = states(case, "deterministic")[:10]
    first = [(await decide(case, state))[0] for state in given]
    for state, before in reversed(list(zip(given, first, strict=True))):
        again, text = await decide(case, state)
        if again.decisions != before.decisions:
            one = next((a, b) for a, b in zip(before.decisions, again.decisions, strict=False) if a != b)
            raise Failed(f"the same state twice: first {one[0]}, then {one[1]}", text)


@checks.add(
    "scheduler.starvation",
    "places a large job in the end, though small ones keep coming",
    "let a job that has waited long keep others out of the room that it needs",
)
async def starvation(case: Case) -> None:
    now, running, waiting = NOW, [f"small-{n}" for n in range(4)], list[tuple[str, float]]()
    began, one = now, Resources(1.0, 256, 0)
    large = PendingJob("large", "large", Resources(4.0, 1024, 0), ("a",), submitted=now)
    for turn in range(ROUNDS):
        now += ROUND_S
        if running:
            running.pop(0)  # each small job runs for four rounds
        waiting.append((f"small-{turn + 4}", now))
        state = ClusterState(turn + 1, now, (NodeState("node", Resources(4.0, 8192, 0), Resources(
            4.0 - len(running), 8192 - 256 * len(running), 0), {"a": 16}),), (large, *(
                PendingJob(name, "small", one, ("a",), submitted=since, estimate_s=4 * ROUND_S) for name, since in waiting)),
            tuple(PlacedJob(name, "node", one, started=now - (4 - n) * ROUND_S, estimate_s=(n + 1) * ROUND_S)
                  for n, name in enumerate(running)))  # fmt: skip
        decisions, text = await decide(case, state)
        for job, _ in placements(state, decisions):
            if job.id == "large":
                return
            running.append(job.id)
        waiting = [(name, since) for name, since in waiting if name not in running]
    raise Failed(f"a job of 4 cores waits for {(now - began) / 3600:.1f} hours, and jobs of 1 core pass it all the time", text)


async def prepare(case: Case) -> None:
    """A sample, where the author gives none."""
    state: dict[str, Any] = msgspec.to_builtins(state_of(case.chance("sample")))
    case.requests.setdefault("scheduler/1.decide", state)
