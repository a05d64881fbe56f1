"""What each tenant has used since the gateway started: calls, failures, tokens. In memory, so a restart begins at zero."""

import time

import msgspec


class ModelUsage(msgspec.Struct):
    """Of one deployment, by one tenant."""

    calls: int = 0  # answered or failed, once the key was good
    failed: int = 0
    tokens: int = 0  # read by the model, as it counted them


class Usage(msgspec.Struct):
    """Of one tenant."""

    tenant: str
    since: float  # Unix seconds: the start of this gateway
    calls: int = 0
    failed: int = 0
    tokens: int = 0
    models: dict[str, ModelUsage] = {}


class Meter:
    """Counts."""

    def __init__(self) -> None:
        self._since = time.time()
        self._tenants: dict[str, Usage] = {}

    def of(self, tenant: str) -> Usage:
        """The tenant's account so far."""
        if tenant not in self._tenants:
            self._tenants[tenant] = Usage(tenant, self._since)
        return self._tenants[tenant]

    def count(self, tenant: str, model: str, tokens: int = 0, failed: bool = False) -> None:
        """One call; `model` is "" for calls of the system itself."""
        usage = self.of(tenant)
        entries: list[Usage | ModelUsage] = [usage]
        if model:
            entries.append(usage.models.setdefault(model, ModelUsage()))
        for entry in entries:
            entry.calls += 1
            entry.failed += failed
            entry.tokens += tokens
