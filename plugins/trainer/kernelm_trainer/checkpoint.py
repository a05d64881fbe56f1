"""Checkpoints of a fine-tuning: all that decides what comes next, as safetensors and JSON.

tensors.safetensors holds the parameters ("model.<name>"), the optimizers' tensors ("optimizer.<name>.<key>"), torch's
generator ("rng", uint8) and the parameters of the best epoch so far ("best.<name>"). state.json is a `Position`. With
the same number of threads on the same kind of processor, training goes on bit for bit as if it had not stopped.
"""

import hashlib
import shutil
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import ClientFault

Tensors = dict[str, torch.Tensor]


class Position(Struct, forbid_unknown_fields=True):
    """Where a fine-tuning stands."""

    fingerprint: str  # of request and model: of what this is a checkpoint
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in this epoch
    loss_sum: float = 0.0  # over the steps of this epoch, nats
    tokens: int = 0  # trained on, all epochs
    train_s: float = 0.0  # spent in steps
    elapsed_s: float = 0.0  # spent in all, by all attempts
    best: Scores | None = None  # validation scores of the best epoch
    best_epoch: int = 0
    numbers: dict[str, dict[str, float]] = {}  # parameter -> optimizer state that is no tensor


def fingerprint(request: TrainRequest, model: nn.Module) -> str:
    """SHA-256 (hex) of the request, with its digests, and of the model's parameters' names and shapes."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return hashlib.sha256(msgspec.json.encode([request, shapes], order="deterministic")).hexdigest()


def write(folder: Path, position: Position, model: nn.Module, optimizers: list[torch.optim.Optimizer], best: Tensors) -> None:
    """Write a checkpoint to `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"best.{name}": p for name, p in best.items()}
    tensors["rng"] = torch.get_rng_state()
    position.numbers = {}
    for name, state in _states(model, optimizers):
        tensors |= {f"optimizer.{name}.{key}": v for key, v in state.items() if isinstance(v, torch.Tensor)}
        position.numbers[name] = {key: v for key, v in state.items() if isinstance(v, int | float)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "tensors.safetensors")
    (folder / "state.json").write_bytes(msgspec.json.encode(position))


def read(folder: Path, expected: str, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[Position, Tensors]:
    """Put the checkpoint in `folder` into `model`, `optimizers` and torch's generator; its position and best parameters.

    ClientFault "checkpoint_mismatch" if its fingerprint is not `expected`: it belongs to another request or model;
    "invalid_checkpoint" if it is not whole. Then nothing was changed.
    """
    try:
        position = msgspec.json.decode((folder / "state.json").read_bytes(), type=Position)
        if position.fingerprint != expected:
            raise ClientFault("checkpoint_mismatch", "checkpoint: state.json: the fingerprint is of another request or model",
                              "submit a new job; a job's request and trainer must stay the same")  # fmt: skip
        tensors = load_file(folder / "tensors.safetensors")
        parameters = {name: tensors[f"model.{name}"] for name, _ in model.named_parameters()}
        generator = tensors["rng"]
    except (OSError, msgspec.DecodeError, SafetensorError, KeyError) as error:
        raise ClientFault("invalid_checkpoint", f"checkpoint: not whole: {error!r}", "submit a new job") from None
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(parameters[name])
    for optimizer in optimizers:
        _restore(optimizer, model, tensors, position.numbers)
    # clones: off the mapped file, to torch's alignment
    torch.set_rng_state(generator.clone())
    return position, {k.removeprefix("best."): v.clone() for k, v in tensors.items() if k.startswith("best.")}


def _restore(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors, numbers: dict[str, dict[str, float]]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
        if id(p) in held and (state or numbers.get(name)):
            optimizer.state[p] = {**state, **numbers.get(name, {})}


def _states(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[tuple[str, dict[str, object]]]:
    return [(name, optimizer.state[p]) for name, p in model.named_parameters() for optimizer in optimizers
            if p in optimizer.state]  # fmt: skip
