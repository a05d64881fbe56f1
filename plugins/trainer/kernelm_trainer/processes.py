"""The processes that train one model together, by torch.distributed: data parallel (DDP) or sharded (FSDP2).

Each computes its rows of every batch; gradients are averaged, so that all take the same step. A process alone is the same with one.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load, load_file
from torch import nn

from kernelm_trainer.task import Rows


class Processes:
    """A process among `size`; alone, without torch.distributed, where that is 1."""

    def __init__(self, rank: int = 0, size: int = 1, sharding: str = "ddp", leader: int = 0, first: bool = True) -> None:
        self.rank, self.size, self.sharding, self._leader = rank, size, sharding, leader
        self.grouped = size > 1
        self.leads = rank == leader  # it reads and writes checkpoints, and decides
        self.first = first  # of its instance
        self._sharded: list[Any] = []

    @classmethod
    def of_group(cls, sharding: str, leads: bool) -> "Processes":
        """This process of torch.distributed's group, one of which `leads`."""
        flags = [False] * dist.get_world_size()
        dist.all_gather_object(flags, leads)
        return cls(dist.get_rank(), len(flags), sharding, flags.index(True), os.environ["LOCAL_RANK"] == "0")

    def once(self, work: Callable[[], None]) -> None:
        """Have the first process of each instance do `work`, which the others wait for."""
        if self.first:
            work()
        if self.grouped:
            dist.barrier()

    def spread(self, objective: nn.Module, model: nn.Module) -> nn.Module:
        """Make the module one of all processes; before the optimizers, since sharding replaces the parameters of its `model`."""
        if not self.grouped:
            return objective
        if self.sharding == "ddp":
            return nn.parallel.DistributedDataParallel(objective)
        from torch.distributed.fsdp import fully_shard

        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        # the transformer's layers, each gathered when it is computed; then what is left
        self._sharded = [fully_shard(module) for module in [*(layer for layers in lists for layer in layers), model]]
        return objective

    def gather(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """The whole tensors of a sharded model, by name; None where each process has them anyhow. All have to call it."""
        return {name: self.whole(tensor) for name, tensor in model.state_dict().items()} if self._sharded else None

    def share(self, batch: Rows) -> tuple[Rows, float]:
        """This process's rows, and what their loss counts: one that gets none computes the first row for nothing, since all
        processes take part in every exchange of gradients."""
        mine = batch[self.rank :: self.size]
        return (mine, 1.0) if len(mine) else (batch[:1], 0.0)

    def rounds(self, batch: Rows, micro_batch: int) -> int:
        """How many micro batches the process with the most rows has: all have as many."""
        return ceil(ceil(len(batch) / self.size) / micro_batch)

    def exchange(self, objective: nn.Module, now: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: gradients are exchanged `now`, or kept for the next micro batch."""
        if not self.grouped:
            return nullcontext()
        if isinstance(objective, nn.parallel.DistributedDataParallel):
            return nullcontext() if now else objective.no_sync()
        self._sharded[-1].set_requires_gradient_sync(now)
        return nullcontext()

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes."""
        if not self.grouped:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """One row of each process."""
        if not self.grouped:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(rows, tensor)
        return torch.stack(rows)

    def shared(self, path: Path | None) -> bytes:
        """The bytes of a file that the leader can read; OSError in all if it cannot."""
        if not self.grouped:
            assert path is not None
            return path.read_bytes()
        return self._sent(path).numpy().tobytes()

    def shared_tensors(self, path: Path | None) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file that the leader can read. Alone they lie on the mapped file: copy what lasts."""
        if not self.grouped:
            assert path is not None
            return load_file(path)
        return load(self._sent(path).numpy().tobytes())

    def _sent(self, path: Path | None) -> torch.Tensor:
        content, problem = b"", ""
        if self.leads and path is not None:
            try:
                content = path.read_bytes()
            except OSError as error:
                problem = str(error)
        about = [len(content), problem]
        dist.broadcast_object_list(about, self._leader)
        if about[1]:
            raise OSError(about[1])
        buffer = torch.empty(int(about[0]), dtype=torch.uint8)
        if content:
            buffer = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        dist.broadcast(buffer, self._leader)
        return buffer

    def agreed(self, value: Any) -> Any:
        """The leader's value, in all."""
        if not self.grouped:
            return value
        box = [value]
        dist.broadcast_object_list(box, self._leader)
        return box[0]

    @staticmethod
    def whole(tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that may be sharded, put together."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    @staticmethod
    def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, sharded as `like` is."""
        if not hasattr(like, "full_tensor"):
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


ALONE = Processes()
