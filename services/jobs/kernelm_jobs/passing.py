"""Checkpoints that were only to last until the next one (`Job.save(passing=True)`) go when that one is on record, or the result."""

import logging

from msgspec.structs import replace

from kernelm_contracts.jobs import JobRecord
from kernelm_jobs.records import JobRecords
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts

PATIENCE_S = 60.0  # with a store that is being restarted
log = logging.getLogger("kernelm.jobs")


class Passing:
    """Erases them. Plugins have no right to erase: what goes is a checkpoint that the job itself has made and said so of, and
    that no job of the same content has on its record."""

    def __init__(self, bus: Bus, jobs: JobRecords) -> None:
        self._bus, self._jobs = bus, jobs

    async def forget(self, job: JobRecord, digest: str) -> None:
        """Erase the checkpoint `digest` of a job that has a later one; and the one before it, if a crash has left that."""
        while digest:
            try:
                found = await self._passing(job, digest)
                if found is None or any(twin.checkpoint == digest for twin in self._jobs.with_key(job.key)):
                    return
                await self._bus.call(Artifacts.erase, ArtifactName(digest), timeout_s=60.0, patience_s=PATIENCE_S)
            except Fault as fault:
                _say(job, digest, fault)
                return
            digest = found.lineage.get("before", "")

    async def end(self, job: JobRecord) -> None:
        """Erase the last one of a job that is done: who wants the same gets its result. It goes from the record first, for
        nobody is to be sent to one that is erased; a crash in between leaves it in the store."""
        digest = job.checkpoint
        try:
            if not digest or await self._passing(job, digest) is None:
                return
            await self._jobs.update(job.id, lambda now: replace(now, checkpoint="") if now.checkpoint == digest else now)
        except Fault as fault:
            _say(job, digest, fault)
            return
        await self.forget(job, digest)

    async def _passing(self, job: JobRecord, digest: str) -> Artifact | None:
        """The artifact, if it is a passing checkpoint that the job itself has made."""
        found: Artifact = await self._bus.call(Artifacts.describe, ArtifactName(digest), patience_s=PATIENCE_S)
        own = found.kind == "checkpoint" and found.lineage.get("job") == job.id
        return found if own and found.metadata.get("passing") else None


def _say(job: JobRecord, digest: str, fault: Fault) -> None:
    if fault.code != "not_found":  # of the one before the last that is what should be
        log.warning("checkpoint %s of job %s stays in the store: %s", digest, job.id, fault)
