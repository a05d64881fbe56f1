"""What Prometheus reads at `GET /metrics`: this gateway's calls, and at each reading how the system is and what tenants used.

Names and buckets of calls are those of OpenTelemetry's semantic conventions for generative models ("Generative AI metrics"), in
Prometheus' spelling. A model that does not exist is never a label, so that nobody can make series by asking for nonsense.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kernelm_contracts.jobs import JobList, JobQuery, Jobs
from kernelm_contracts.usage import UsageQuery, UsageReport
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel, SystemState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(float(4**k) for k in range(14))
WELL = ("intact", "in force")  # what the kernel says of a check that is passed
STATES = ("queued", "placed", "running")  # of jobs that are not over
UNKNOWN = "unknown_model"
ANSWER_S = 5.0


class Metrics:
    """`bus`: what has `call`."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus
        self.registry = CollectorRegistry()
        of = ("gen_ai_operation_name", "gen_ai_request_model")
        self._duration = Histogram("gen_ai_client_operation_duration_seconds", "Of a call, from its arrival to its end.",
                                   (*of, "error_type"), buckets=SECONDS, registry=self.registry)  # fmt: skip
        self._first = Histogram("gen_ai_client_operation_time_to_first_chunk_seconds", "Of a stream, to its first frame.", of,
                                buckets=SECONDS, registry=self.registry)  # fmt: skip
        self._tokens = Histogram("gen_ai_client_token_usage", "Tokens of a call.", (*of, "gen_ai_token_type"), buckets=TOKENS,
                                 registry=self.registry)  # fmt: skip
        self._copies = Counter("kernelm_shadow_calls", "Copies of calls that a shadow was to answer.",
                               ("model", "shadow", "outcome"), registry=self.registry)  # fmt: skip
        self._series: dict[tuple[int, tuple[str, ...]], Histogram] = {}
        self._under_way = Gauge("kernelm_gateway_calls_under_way", "Calls that have come and are not over.", registry=self.registry)

    def copied(self, model: str, shadow: str, outcome: str) -> None:
        """A copy of a call has ended as a field of `kernelm_contracts.jobs.Copies` says."""
        self._copies.labels(model, shadow, outcome).inc()

    def began(self) -> None:
        """A call has come."""
        self._under_way.inc()

    def ended(self, method: str, model: str, seconds: float, outcome: str, tokens: tuple[int, int] = (0, 0),
              first_s: float = 0.0) -> None:  # fmt: skip
        """It is over; `outcome` is "ok", "left", or the code of the fault. `model` "" for calls of the system itself."""
        self._under_way.dec()
        if not model or outcome == UNKNOWN:
            return
        self._observe(self._duration, (method, model, "" if outcome in ("ok", "left") else outcome), seconds)
        for kind, count in zip(("input", "output"), tokens, strict=True):
            if count:
                self._observe(self._tokens, (method, model, kind), count)
        if first_s:
            self._observe(self._first, (method, model), first_s)

    def _observe(self, histogram: Histogram, labels: tuple[str, ...], value: float) -> None:
        """The library looks labels up under a lock, at a cost that is seen in each call: so they are kept."""
        series = self._series.get((id(histogram), labels))
        if series is None:
            series = self._series[id(histogram), labels] = histogram.labels(*labels)
        series.observe(value)

    async def text(self) -> bytes:
        """All of it, as Prometheus reads it. What does not answer is left out, and `kernelm_up` says so."""
        registry = CollectorRegistry()
        registry.register(_Now(*await asyncio.gather(self._state(), self._jobs(), self._usage())))
        return generate_latest(self.registry) + generate_latest(registry)

    async def _state(self) -> SystemState | None:
        return await self._ask(Kernel.state, Empty())

    async def _jobs(self) -> dict[str, int]:
        lists: list[JobList | None] = await asyncio.gather(*(self._ask(Jobs.find, JobQuery(s, limit=0)) for s in STATES))
        return {state: found.total for state, found in zip(STATES, lists, strict=True) if found is not None}

    async def _usage(self) -> UsageReport | None:
        return await self._ask(Jobs.usage, UsageQuery())

    async def _ask(self, method: Any, request: Any) -> Any:
        try:
            return await self._bus.call(method, request, timeout_s=ANSWER_S)
        except Fault:
            return None


class _Now:
    """The system as it is, as a collector of Prometheus' client library."""

    def __init__(self, state: SystemState | None, jobs: dict[str, int], usage: UsageReport | None) -> None:
        self._state, self._jobs, self._usage = state, jobs, usage

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("kernelm_up", "1 for a part of the system that answers.", labels=["part"])
        up.add_metric(["kernel"], float(self._state is not None))
        up.add_metric(["jobs"], float(self._usage is not None))
        yield up
        if self._state is not None:
            yield from _of_state(self._state)
        jobs = GaugeMetricFamily("kernelm_jobs", "Jobs that are not over.", labels=["state"])
        for name, count in self._jobs.items():
            jobs.add_metric([name], count)
        yield jobs
        if self._usage is not None:
            yield from _of_usage(self._usage)


def _of_state(state: SystemState) -> Iterable[Metric]:
    instances = GaugeMetricFamily("kernelm_instances", "Instances by pool and state.", labels=["pool", "state"])
    counts: dict[tuple[str, str], int] = {}
    for instance in state.instances:
        counts[instance.pool, instance.state] = counts.get((instance.pool, instance.state), 0) + 1
    for (pool, name), count in counts.items():
        instances.add_metric([pool, name], count)
    yield instances
    wanted = GaugeMetricFamily("kernelm_instances_wanted", "Instances that a pool is to have.", labels=["pool"])
    for spec in state.pools:
        if not spec.parked:
            wanted.add_metric([spec.pool], spec.instances)
    yield wanted
    generations = GaugeMetricFamily("kernelm_model_generation", "Of each deployment.", labels=["model"])
    for route in state.routes:
        if route.kind == "model":
            generations.add_metric([route.name], route.generation)
    yield generations
    health = GaugeMetricFamily("kernelm_health", "1 for a check of the kernel that is passed, else 0.", labels=["check"])
    for name, verdict in state.health.items():
        health.add_metric([name], float(verdict in WELL))
    yield health


def _of_usage(usage: UsageReport) -> Iterable[Metric]:
    """Of this month: counters begin again with each, as Prometheus expects of one that is reset."""
    tokens = CounterMetricFamily("kernelm_tenant_tokens", "Tokens this month.", labels=["tenant", "model", "token_type"])
    calls = CounterMetricFamily("kernelm_tenant_calls", "Calls this month.", labels=["tenant", "model"])
    cores = CounterMetricFamily("kernelm_tenant_core_seconds", "Core seconds held this month.", labels=["tenant", "held_by"])
    devices = CounterMetricFamily("kernelm_tenant_accelerator_seconds", "Accelerator seconds held this month.",
                                  labels=["tenant", "held_by"])  # fmt: skip
    families = {family.name: family for family in (tokens, calls, cores, devices)}
    sums: dict[tuple[str, tuple[str, ...]], float] = {}

    def add(family: CounterMetricFamily, labels: tuple[str, ...], amount: float) -> None:
        sums[family.name, labels] = sums.get((family.name, labels), 0.0) + amount

    for day in usage.days:
        for model, used in day.usage.calls.items():
            add(calls, (day.tenant, model), used.calls)
            add(tokens, (day.tenant, model, "input"), used.input_tokens)
            add(tokens, (day.tenant, model, "output"), used.output_tokens)
        for kind, held in day.usage.held.items():
            add(cores, (day.tenant, kind), held.cpu_s)
            add(devices, (day.tenant, kind), held.gpu_s)
    for (name, labels), amount in sums.items():
        families[name].add_metric(labels, amount)
    yield from families.values()
    spent = GaugeMetricFamily("kernelm_budget_spent", "1 for a limit of a budget that is reached.",
                              labels=["tenant", "period", "limit"])  # fmt: skip
    for state in usage.budgets:
        for limit in ("tokens", "cpu_s", "gpu_s"):
            if getattr(state.budget, limit):
                spent.add_metric([state.budget.tenant, state.budget.period, limit], float(limit in state.spent))
    yield spent
