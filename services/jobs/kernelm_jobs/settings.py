"""Settings of the job table, from `<home>/jobs.toml` where there is one."""

import tomllib
from pathlib import Path

import msgspec

from kernelm_contracts.scheduler import Tenant
from kernelm_contracts.usage import Budget
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Resources


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Units: `_s` in seconds."""

    quotas: dict[str, Resources] = {}  # tenant -> most it may hold at once; a tenant without an entry has no limit
    tenants: tuple[Tenant, ...] = ()  # finer limits: nominal, borrowing, lending, cohorts, weights
    preempt_after_s: float = 60.0  # a job that is to make room and makes no checkpoint for so long is stopped without
    watch_every_s: float = 2.0  # between looks at instances and deadlines
    probe_every_s: float = 5.0  # between questions to an instance whether it still works on its jobs
    deploy_s: float = 300.0  # a pool that has no ready instance by then has failed to deploy
    avoid_s: float = 600.0  # for so long a deployment is not started on a node on which it did not get ready
    round_every_s: float = 10.0  # so often the scheduler is asked though nothing has happened
    load_every_s: float = 1.0  # between looks at the load of deployments that follow it
    load_window_s: float = 5.0  # their load is that of so long
    usage_every_s: float = 10.0  # between two entries of what jobs and deployments hold in the accounts of their tenants
    budgets: tuple[Budget, ...] = ()  # what tenants may use in a day or a month


def read_settings(path: Path) -> Settings:
    """The settings in the file `path`, the defaults if there is none; ClientFault that names file and field."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Settings) if path.exists() else Settings()
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ClientFault("invalid", f"{path}: {error}", "see services/jobs/README.md, 'Settings'") from None
