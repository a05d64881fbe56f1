"""How much memory a training will take, before it begins."""

from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from kernelm_sdk.errors import ClientFault
from kernelm_trainer.checkpoint import trained
from kernelm_trainer.encoder import autocast

if TYPE_CHECKING:
    from kernelm_trainer.loop import Training

STATES = {"sgd": 0, "momentum": 1, "rmsprop": 1, "adam": 2, "adamw": 2, "adafactor": 0, "lion": 1, "muon": 2}  # floats a parameter
MB = 2**20
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container: cgroup v2, v1
MARGIN = 0.9  # of what is there may be used
LIBRARIES = 120  # MB that torch and transformers take once the first step is done, beside all tensors
PROBED = 64  # tokens of a row, and twice and three times as many, are enough to know what the longest takes


def choose(training: "Training", limit_mb: float) -> None:
    """Write into the position how many rows are computed at once: what was asked for, or the most that fit into memory, which is
    `limit_mb` (0: not limited), or what is free where that is less. ClientFault "too_little_memory" if not even one row does."""
    request, here = training.request, training.position
    most = ceil(request.batch_size / training.processes.size)
    size = min(request.micro_batch or most, most)
    if request.micro_batch or training.private or request.sharding == "fsdp":
        here.micro_batch = size
        return
    there = free() / request.processes
    limit, what = (limit_mb, "what the job was granted") if 0 < limit_mb < there else (there, "free")
    limit *= MARGIN
    fixed, row = estimate(training)
    while fixed + size * row > limit and size > 1:
        size = -(-size // 2)
    if fixed + size * row > limit:
        raise ClientFault("too_little_memory",
                          f"train request: one row at a time needs {fixed + row:.0f} MB, {limit:.0f} MB are {what}",
                          f"give the stage {ceil((fixed + row - limit) / MARGIN)} more resources.memory_mb, or the request "
                          "a shorter block, gradient_checkpointing or an adapter")  # fmt: skip
    here.micro_batch = training.processes.agreed(size)
    if here.micro_batch < most:
        here.notes += (f"micro_batch is {here.micro_batch} in place of {most}, since memory is short: about "
                       f"{fixed + most * row:.0f} MB would be needed, {limit:.0f} MB are {what}",)  # fmt: skip


def free() -> float:
    """MB that this process can still take: of the machine, and of the container that it is in."""
    own, left = psutil.Process().memory_info().rss, float(psutil.virtual_memory().available)
    for name in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            left = min(left, int(Path(name).read_text()) - own)
    return left / MB


def left(granted_mb: float) -> float:
    """MB that this process can still take of what was granted to it, 1 at least; 0 (not known) of 0."""
    return max(granted_mb - psutil.Process().memory_info().rss / MB, 1.0) if granted_mb else 0.0


def estimate(training: "Training") -> tuple[float, float]:
    """(MB that parameters take with all that is kept of them, MB that each row of the longest takes while it is computed).

    Parameters in float32, their gradients and the optimizer's states; the best parameters and, while a checkpoint is written,
    a copy of all but those. What autograd keeps for the backward pass of a row is measured on short ones of three lengths: a part
    that is there once (parameters in bfloat16, for autocast), one that grows with the tokens, and one with their square (scores of
    attention that is not fused: with dropout, say).
    """
    own = sum(p.numel() * 4 for p in trained(training.model).values())
    still = sum(p.numel() * 4 for p in training.model.parameters()) - own
    lasting = own * (1 + STATES[training.request.algorithm])  # parameters and states
    once, row = _kept(training)
    return LIBRARIES + (still + 2 * own + 2 * lasting) / MB + once, row


def _kept(training: "Training") -> tuple[float, float]:
    """(MB that autograd keeps however many rows there are, MB for each of the longest)."""
    lengths = np.asarray(training.task.lengths)
    inputs = training.task.inputs(lengths.argsort()[-1:])
    cut = list(zip(inputs, training.task.per_token, strict=True))
    longest = max((t.shape[1] for t, per_token in cut if per_token), default=1)
    step = max(1, min(PROBED, longest // 3))
    training.task.objective.train()
    one, two, three = (_kept_of(training, [t[:, : ceil(t.shape[1] * k * step / longest)] if per_token else t
                                           for t, per_token in cut]) for k in (1, 2, 3))  # fmt: skip
    square = max(0.0, (one - 2 * two + three) / 2)  # of `step` tokens
    linear = max(0.0, two - one - 3 * square)
    times = longest / step
    return max(0.0, one - linear - square) / MB, (linear * times + square * times**2) / MB


def _kept_of(training: "Training", inputs: list[torch.Tensor]) -> int:
    """Bytes."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in training.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(training.bf16):
        loss = training.task.objective(*inputs)
    torch.set_rng_state(state)
    del loss
    return sum(kept.values())
