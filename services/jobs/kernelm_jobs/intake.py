"""Taking in a job: its request is checked, its content key computed, and a result of the same content reused."""

import logging
import re
import secrets
import time
from typing import Any

import msgspec

from kernelm_contracts.deployments import DEPLOY, DeployRequest
from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deployment import already_serves, check, request_of, result_of
from kernelm_jobs.rounds import plugins_for, version_of
from kernelm_jobs.runs import check_resources, content_key, digests_in, normalized, signature
from kernelm_jobs.states import FINAL, step
from kernelm_jobs.table import Table
from kernelm_jobs.usage import Accounts
from kernelm_sdk import tracing
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, invalid
from kernelm_sdk.system import ArtifactName, Artifacts, Progress, SystemState

log = logging.getLogger("kernelm.jobs")
PATIENCE_S = 10.0


class Result(msgspec.Struct, frozen=True):
    """The record in KV `results` under a content key: the job whose record holds the result."""

    job: str


class Intake:
    """Makes records of specifications."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, accounts: Accounts) -> None:
        self._bus, self._table, self._cluster, self._accounts = bus, table, cluster, accounts
        self._results = bus.bucket("results", Result)

    async def submit(self, spec: JobSpec) -> JobRecord:
        """A new job; the one under way if its twin was submitted before by the same parent, for instance by an earlier
        attempt of it."""
        spec = self._inherit(self._checked(spec))
        if not spec.parent:  # what is under way is brought to its end
            self._accounts.require(spec.tenant)
        system = await self._cluster.system(PATIENCE_S)
        key = self._key(spec, system)
        for job in self._table.jobs.with_key(key):
            same = (job.spec.tenant, job.spec.parent, job.spec.run) == (spec.tenant, spec.parent, spec.run)
            if same and job.state not in FINAL:
                return job
        slug = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:40] or "job"
        while True:
            record = await self._record(f"{slug}-{secrets.token_hex(3)}", spec, key, system, tracing.parent())
            if await self._table.create(record):
                return record

    async def submit_stage(self, spec: JobSpec, id: str, trace: str = "") -> JobRecord:
        """The job `id` of a run's stage; that which was created before a crash of this service, if it was."""
        if (existing := self._table.jobs.get(id)) is not None:
            if existing.spec.run != spec.run:
                raise ClientFault("already_exists", f"there is a job {id} that belongs to no stage", "give the stage another name")
            return existing
        spec = self._checked(spec)
        system = await self._cluster.system(PATIENCE_S)
        await self._table.create(await self._record(id, spec, self._key(spec, system), system, trace))
        return self._table.jobs.need(id)

    def _checked(self, spec: JobSpec) -> JobSpec:
        """`spec` with every default of its request filled in."""
        check_resources(spec.resources, f"job {spec.name!r}")
        if spec.attempts < 1:
            raise ClientFault("invalid", f"job {spec.name!r}: `attempts` is {spec.attempts}, and must be at least 1")
        if min(spec.most, spec.gang) < 1 or (spec.gang > 1 and (spec.most > 1 or spec.uses == DEPLOY)):
            raise ClientFault("invalid", f"job {spec.name!r}: `most` is {spec.most} and `gang` {spec.gang}",
                              "both are at least 1; a gang does not grow, and a deployment has `instances`")  # fmt: skip
        try:
            request = normalized(spec.request, signature(spec.uses)[0])
            if spec.uses == DEPLOY:
                check(msgspec.convert(request, DeployRequest))
        except ValueError as error:  # ValidationError is one
            raise invalid(f"job {spec.name!r}, request of {spec.uses}", error, "correct the request") from None
        return msgspec.structs.replace(spec, request=request)

    def _inherit(self, spec: JobSpec) -> JobSpec:
        """A child belongs to its parent's run and is on its parent's account."""
        if not spec.parent:
            return msgspec.structs.replace(spec, run="")
        parent = self._table.jobs.need(spec.parent)
        if parent.state in FINAL:
            raise ClientFault("conflict", f"job {spec.name!r}: its parent {parent.id} is {parent.state}", "its work is not wanted")
        return msgspec.structs.replace(spec, run=parent.spec.run, tenant=parent.spec.tenant)

    def _key(self, spec: JobSpec, system: SystemState) -> str:
        if spec.uses == DEPLOY:
            return content_key(spec.uses, spec.request["plugin"], "", spec.request)
        installed = {name: m.contracts for name, m in self._cluster.manifests(system).items()}
        plugin = next(iter(plugins_for(spec.uses.rpartition(".")[0], spec.plugin, system, installed)), "")
        return content_key(spec.uses, plugin, version_of(plugin, system), spec.request)

    async def _record(self, id: str, spec: JobSpec, key: str, system: SystemState, trace: str) -> JobRecord:
        now = time.time()
        record = JobRecord(id, spec, key, step("", "submit"), submitted=now, trace=trace)
        found = self._served(spec, system) if spec.uses == DEPLOY else await self._result(key)
        if found is None:
            return record
        result, why = found
        return msgspec.structs.replace(record, state=step("", "reuse"), result=result, reused=True, finished=now, why=why,
                                       progress=Progress(1.0, "reused"))  # fmt: skip

    def _served(self, spec: JobSpec, system: SystemState) -> tuple[dict[str, Any], str] | None:
        request = msgspec.convert(spec.request, DeployRequest)
        deployment = self._table.deployments.get(request.name)
        job = self._table.jobs.get(deployment.job) if deployment else None
        if deployment is None or not already_serves(request, deployment, request_of(job) if job else None, system):
            return None
        return result_of(deployment), f"{request.name} serves this model already, as generation {deployment.generation}"

    async def _result(self, key: str) -> tuple[dict[str, Any], str] | None:
        """The result of a finished job of the same content, if all artifacts that it names are still in the store."""
        stored, _ = await self._results.get(key)
        job = self._table.jobs.get(stored.job) if stored else None
        if job is None or job.state != "done":
            return None
        for digest in digests_in(job.result):
            try:
                await self._bus.call(Artifacts.describe, ArtifactName(digest), timeout_s=10.0, patience_s=PATIENCE_S)
            except ClientFault as fault:
                log.warning("the result of %s is not reused: %s", job.id, fault.message)
                return None
        return job.result, f"same content as {job.id}"

    async def keep(self, job: JobRecord) -> None:
        """Make the result of a finished job findable by its content."""
        await self._results.put(job.key, Result(job.id), -1, patience_s=30.0)
