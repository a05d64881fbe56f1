"""The hook of `optimizer/1`: a sampler that adds candidates to a search, as a function of an installed distribution
(kernelm_sdk.hooks). It runs in this plugin's process, and what it names is trained, measured and reported like the rest.

    [project.entry-points."kernelm.hooks.optimizer"]
    small-rates = "my_samplers"
"""

import msgspec

from kernelm_contracts.optimizer import Candidate, OptimizeRequest
from kernelm_optimizer.plan import checked
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.hooks import Hooks, hookspec

GROUP = "kernelm.hooks.optimizer"


class Samplers:
    """What a distribution implements."""

    @hookspec(firstresult=True)
    def candidates(self, request: OptimizeRequest) -> list[Candidate] | None:
        """Further candidates for a search, each with `train` or `model`; their names are put behind the sampler's own. The same for
        the same request: a search that is resumed asks again, and looks its candidates up by their names."""
        raise NotImplementedError


def extended(request: OptimizeRequest, hooks: Hooks) -> OptimizeRequest:
    """The request with what the samplers add. One that raises, or whose candidates make no sense, is quarantined."""
    for name, sampled in hooks.call("candidates", request=request):
        try:
            added = tuple(_named(name, candidate) for candidate in sampled or ())
            more = msgspec.structs.replace(request, candidates=(*request.candidates, *added))
            checked(more)
        except (TypeError, ClientFault) as error:
            hooks.quarantine(name, f"candidates answered what can't be searched: {error}")
            continue
        request = more
    return request


def _named(sampler: str, candidate: object) -> Candidate:
    if not isinstance(candidate, Candidate):
        raise TypeError(f"{candidate!r} is no Candidate")
    return msgspec.structs.replace(candidate, name=f"{sampler}-{candidate.name}")
