"""Whether torch.compile pays, by measurement."""

import os
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from kernelm_sdk.errors import PluginFault
from kernelm_trainer.encoder import autocast

if TYPE_CHECKING:
    from kernelm_trainer.loop import Training

WORTH_S = 300.0  # a training that takes less, uncompiled, is not worth the half minute that compiling takes
TIMES = 3


def choose(training: "Training") -> None:
    """Write into the position whether the objective is compiled, and why; a resumed training does as the first attempt did."""
    wish, here = training.request.compile, training.position
    compiler = os.environ.get("CXX", "g++")
    if wish != "off" and shutil.which(compiler) is None:
        if wish == "on":
            raise PluginFault("no_compiler", f"train request: compile needs {compiler}, which is not installed here",
                              'install a C++ compiler, or set compile to "auto" or "off"')  # fmt: skip
        here.notes += (f"not compiled: {compiler} is not installed",)
        return
    here.compiled = wish == "on"
    if wish != "auto" or training.private or training.processes.grouped:
        return
    state = torch.get_rng_state()
    eager = _seconds(training, training.objective)
    if eager * training.steps > WORTH_S:
        compiled = _seconds(training, torch.compile(training.objective))
        here.compiled = compiled < eager
        chosen = "compiled" if here.compiled else "not compiled"
        here.notes += (f"{chosen}: a step took {compiled:.2f} s compiled, {eager:.2f} s not",)
    else:
        here.notes += (f"not compiled: all {training.steps} steps take about {eager * training.steps:.0f} s",)
    torch.set_rng_state(state)


def _seconds(training: "Training", objective: nn.Module) -> float:
    """The least time that forward and backward of the first rows take; parameters and gradients stay as they were."""
    rows = np.arange(min(training.position.micro_batch, len(training.task.lengths)))
    micros = -(-training.request.batch_size // training.position.micro_batch)
    took = []
    for _ in range(TIMES):
        began = time.monotonic()
        with autocast(training.bf16):
            loss = objective(*training.task.inputs(rows))
        loss.backward()
        took.append(time.monotonic() - began)
    training.model.zero_grad()
    return min(took[1:]) * micros
