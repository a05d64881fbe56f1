"""The hook of `scheduler/1`: a further term of a node's score, as a pure function of an installed distribution (kernelm_sdk.hooks).

    [project.entry-points."kernelm.hooks.scheduler"]
    cheap-power = "my_scores"

It runs in this plugin's process, in every round: what it costs, a round costs. Each term lies between 0 and 1 and counts
`weights.hooks` beside the three of `settings.Weights`; where a job fits at all, quotas and order are none of its business. All
nodes must have the same ones installed, since any instance may answer.
"""

import numpy as np
from numpy.typing import NDArray

from kernelm_sdk.hooks import Hooks, hookspec
from kernelm_sdk.system import Resources

GROUP = "kernelm.hooks.scheduler"
Matrix = NDArray[np.float64]


class Scores:
    """What a distribution implements."""

    @hookspec(firstresult=True)
    def score_nodes(self, tenant: str, request: Resources, nodes: tuple[str, ...], free: Matrix) -> Matrix:
        """For a member of a job of `tenant` that asks for `request`: how good each of `nodes` is, from 0 to 1. `free`: what is left
        of each now, a row a node: cores, MiB, GPUs. Pure: no clock, no files, no memory of earlier calls."""
        raise NotImplementedError


class Scoring:
    """The terms of all that are installed. False if there are none."""

    def __init__(self, hooks: Hooks, weight: float) -> None:
        self._hooks, self._weight = hooks, weight

    def __bool__(self) -> bool:
        return bool(self._hooks)

    @property
    def weight(self) -> float:
        """What all terms count together, at most."""
        return self._weight * len(self._hooks.names)

    def __call__(self, tenant: str, request: Resources, nodes: tuple[str, ...], free: Matrix) -> Matrix:
        """The weighted sum of the terms of each node. A function that raises, or answers anything else, is quarantined."""
        total = np.zeros(len(nodes))
        for name, answer in self._hooks.call("score_nodes", tenant=tenant, request=request, nodes=nodes, free=free.copy()):
            try:
                term = np.asarray(answer, np.float64)
            except (TypeError, ValueError) as error:
                self._hooks.quarantine(name, f"score_nodes answered no numbers: {error}")
                continue
            if term.shape != total.shape or not ((term >= 0) & (term <= 1)).all():  # a NaN fails this too
                what = f"an array of shape {term.shape} for {len(nodes)} nodes, or a number that is not between 0 and 1"
                self._hooks.quarantine(name, f"score_nodes answered {what}")
                continue
            total += self._weight * term
        return total


def installed(weight: float) -> Scoring:
    """Those that are installed here."""
    return Scoring(Hooks(GROUP, Scores), weight)
