"""Checkpoints that were only to last until the next one (`Job.save(passing=True)`) go when that one is on record."""

import logging

from kernelm_contracts.jobs import JobRecord
from kernelm_jobs.records import JobRecords
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts

PATIENCE_S = 60.0  # with a store that is being restarted
log = logging.getLogger("kernelm.jobs")


class Passing:
    """Erases them. Plugins have no right to erase: what goes is a checkpoint that the job itself has made and said so of, and
    that no job goes on from."""

    def __init__(self, bus: Bus, jobs: JobRecords) -> None:
        self._bus, self._jobs = bus, jobs

    async def forget(self, job: JobRecord, digest: str) -> None:
        """Erase the checkpoint `digest` of a job that has a later one; and the one before it, if a crash has left that."""
        while digest and not any(twin.checkpoint == digest for twin in self._jobs.with_key(job.key)):
            try:
                found: Artifact = await self._bus.call(Artifacts.describe, ArtifactName(digest), patience_s=PATIENCE_S)
                if found.kind != "checkpoint" or found.lineage.get("job") != job.id or not found.metadata.get("passing"):
                    return
                await self._bus.call(Artifacts.erase, ArtifactName(digest), timeout_s=60.0, patience_s=PATIENCE_S)
            except Fault as fault:
                if fault.code != "not_found":  # of the one before the last that is what should be
                    log.warning("checkpoint %s of job %s stays in the store: %s", digest, job.id, fault)
                return
            digest = found.lineage.get("before", "")
