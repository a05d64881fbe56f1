"""Jobs that change while they run, as pure functions: more or fewer cores, another node. What was decided is on record (`target`,
`heir`) and holds its resources from then on; it takes place at the job's next checkpoint, or is called off when none comes."""

import time
from collections.abc import Callable

from msgspec import structs

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.scheduler import Decision, Share
from kernelm_jobs.elastic import is_elastic
from kernelm_jobs.holdings import shares_of, size
from kernelm_jobs.rounds import Crews, choose
from kernelm_jobs.states import HOLDING, advance

Change = Callable[[JobRecord], JobRecord]


def growth(job: JobRecord, decision: Decision) -> tuple[Share, ...]:
    """What the job would hold beyond what it holds now."""
    has = {share.node: share.members for share in shares_of(job)}
    more = ((share, share.members - has.get(share.node, 0)) for share in decision.allocation)
    return tuple(structs.replace(share, members=count) for share, count in more if count > 0)


def retargeted(job: JobRecord, decision: Decision, crews: Crews) -> tuple[Change | str, str]:
    """The change that puts a resize or a migration on record, or why it can't be carried out; and the instance that is the heir."""
    if len(decision.allocation) != 1:
        return f"{decision.action}: its members are one instance's, which is on one node", ""
    share = decision.allocation[0]
    if job.gang:
        return f"{decision.action}: a gang can't be moved in part, and would have to meet anew as a whole: preempt it", ""
    if share.members != size(shares_of(job)) and not is_elastic(job):
        return f"{decision.action}: it can use its resources once, not {share.members} times", ""
    heir = job.instance
    if share.node != job.node:
        worker = choose(share.node, decision.plugin, job.spec.uses.rpartition(".")[0], crews)
        if worker is None:
            return f"{decision.action}: no instance on {share.node} is free for it", ""
        heir = worker.instance

    def change(now: JobRecord) -> JobRecord:
        if now.state != "running" or now.epoch != job.epoch or now.stopping:
            return now
        return structs.replace(now, target=decision.allocation, heir=heir, stopping=time.time(), why=decision.reason)

    return change, heir


def moved(now: JobRecord) -> JobRecord:
    """The job with its new owner, to whom it is to be handed over."""
    return advance(now, "move", node=now.target[0].node, instance=now.heir, allocation=now.target, epoch=now.epoch + 1)


def called_off(now: JobRecord) -> JobRecord:
    """The job goes on as it was: to move it without a checkpoint would cost all that it has done."""
    if now.state not in HOLDING or not now.target:
        return now
    return structs.replace(now, target=(), heir="", stopping=0.0, why=f"stays as it is: no checkpoint came. It was: {now.why}")
