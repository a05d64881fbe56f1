"""Differential privacy by Opacus: examples are drawn by chance, their gradients scaled down to a norm, and the sum gets noise.

Abadi et al., "Deep Learning with Differential Privacy", 2016, algorithm 1; the budget is counted by Renyi differential privacy.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer.task import Task

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer


class Private:
    """Turns a training into a private one. Embeddings stay as they are: their gradients have no row an example."""

    def __init__(self, request: TrainRequest, task: Task, steps: int) -> None:
        from opacus import GradSampleModule
        from opacus.accountants.utils import get_noise_multiplier

        assert request.privacy is not None
        self._asked, self._size, rows = request.privacy, request.batch_size, len(task.lengths)
        self._rate = request.batch_size / rows
        if request.batch_size > rows:
            raise ClientFault("invalid", f"train request: batch_size is {request.batch_size}, there are {rows} examples",
                              "privacy needs a batch that is a part of them")  # fmt: skip
        if self._asked.delta * rows >= 1:
            raise ClientFault("invalid", f"train request: privacy.delta is {self._asked.delta:g}, there are {rows} examples",
                              f"give less than {1 / rows:.2g}, or the budget means nothing")  # fmt: skip
        try:
            self._noise = get_noise_multiplier(target_epsilon=self._asked.epsilon, target_delta=self._asked.delta,
                                               sample_rate=self._rate, steps=steps)  # fmt: skip
        except ValueError as error:
            raise ClientFault("invalid", f"train request: privacy.epsilon {self._asked.epsilon:g}: {error}",
                              "give a larger epsilon or fewer epochs") from None  # fmt: skip
        for module in task.model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
        task.notes.append("privacy: the embeddings were left as they are")
        self.objective = GradSampleModule(task.objective, batch_first=True, loss_reduction="sum")
        self._optimizer: DPOptimizer | None = None

    def attach(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """The optimizer that clips, adds noise and takes the step."""
        from opacus.optimizers import DPOptimizer

        (only,) = optimizers
        self._optimizer = DPOptimizer(only, noise_multiplier=self._noise, max_grad_norm=self._asked.max_grad_norm,
                                      expected_batch_size=self._size)  # fmt: skip
        return [self._optimizer]

    def keep(self) -> None:
        """Add the clipped gradients of a micro batch, to which others will come before the step."""
        assert self._optimizer is not None
        self._optimizer.signal_skip_step(do_skip=True)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def epsilon(self, steps: int) -> float:
        """What was spent of the budget after so many steps."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self._noise, self._rate, steps)]
        return float(accountant.get_epsilon(self._asked.delta))
