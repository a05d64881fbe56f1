"""What one kind of training differs in from another: model, data, loss, evaluation, files. The loop is the same for all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kernelm_contracts.trainer import Scores

Rows = NDArray[np.int64]  # indices into the train split
Tensors = dict[str, torch.Tensor] | None
Done = Callable[[int], None]  # is told the tokens of each batch


class Task(Protocol):
    """A model with its data. Torch's generator is seeded when it is made, since new parameters are drawn."""

    model: nn.Module  # whose parameters are trained, as far as they require gradients
    objective: nn.Module  # holds the model; `objective(*inputs)` is the loss summed over the rows' units, a float32 scalar
    lengths: Sequence[int]  # tokens of each row of the train split
    per_token: tuple[bool, ...]  # of each tensor of `inputs`, whether it has a column a token (of a text, or of one of two)
    notes: list[str]  # for the card: what was decided about the data

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        """The tensors of a batch."""

    def units(self, rows: Rows) -> int:
        """What the loss of these rows is a mean over: documents, or tokens that have a loss."""

    def tokens(self, split: str) -> int:
        """How many tokens the split has, which is how much work its evaluation is; 0 for a split that is not there."""

    def evaluate(self, split: str, done: Done) -> Scores:
        """Scores on a split, in float32 as the model will be served."""

    def rank(self, scores: Scores) -> tuple[float, ...]:
        """The larger, the better."""

    def write(self, folder: Path, tensors: Tensors = None) -> None:
        """Write the model's files as `trainer/1` says; `tensors` are its state, where the model holds only a part of it."""
