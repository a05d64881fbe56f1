"""Handlers of `optimizer/1`."""

from kernelm_contracts.optimizer import Compressed, CompressRequest, Optimized, Optimizer, OptimizeRequest
from kernelm_optimizer.auto import completed
from kernelm_optimizer.compress import Compression
from kernelm_optimizer.hooks import GROUP, Samplers, extended
from kernelm_optimizer.plan import checked
from kernelm_optimizer.searching import Searching
from kernelm_optimizer.settings import Settings
from kernelm_sdk.hooks import Hooks
from kernelm_sdk.plugin import Job, Plugin


class OptimizerPlugin(Plugin, Optimizer):
    """Searches, compresses, and proves it."""

    Settings = Settings

    async def optimize(self, request: OptimizeRequest, job: Job) -> Optimized:
        """See `Optimizer.optimize`. ClientFault `invalid` or `budget_too_small`, PluginFault `nothing_measured`."""
        request = extended(completed(request), Hooks(GROUP, Samplers))
        candidates = checked(request)
        return await Searching(self, request, candidates, job).run()

    async def compress(self, request: CompressRequest, job: Job) -> Compressed:
        """See `Optimizer.compress`."""
        return await Compression(self, request, job).run()
