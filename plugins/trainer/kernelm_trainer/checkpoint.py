"""Checkpoints of a training: all that decides what comes next, as safetensors and JSON.

tensors.safetensors holds the trained parameters ("model.<name>"), the optimizers' tensors ("optimizer.<name>.<key>"), the state
of torch's generator in each process ("rng", [processes, bytes] uint8) and the best parameters so far ("best.<name>"). state.json
is a `Position`. With the same number of threads and processes on the same kind of processor, training goes on bit for bit as if
it had not stopped.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_trainer.processes import ALONE, Processes

Tensors = dict[str, torch.Tensor]
TENSORS, STATE = "tensors.safetensors", "state.json"


class Position(Struct, forbid_unknown_fields=True):
    """Where a training stands."""

    fingerprint: str  # of request and model: of what this is a checkpoint
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in this epoch
    steps: int = 0  # finished in all
    tokens: int = 0  # trained on, all epochs
    evaluated: int = 0  # tokens of evaluation
    timed_tokens: int = 0  # of them, those of steps whose time counts
    train_s: float = 0.0  # spent in those steps
    elapsed_s: float = 0.0  # spent in all, by all attempts
    best: Scores | None = None  # validation scores of the best parameters
    best_epoch: int = 0
    numbers: dict[str, dict[str, float]] = {}  # parameter -> optimizer state that is no tensor
    micro_batch: int = 0  # rows computed at once; what was chosen at the start holds to the end
    compiled: bool = False
    first_loss: float = 0.0  # mean of the first steps, nats
    recent_loss: float = 0.0  # exponential mean
    notes: tuple[str, ...] = ()


class Misfit(Exception):
    """A checkpoint is whole, and not of the request and model as they are now; the message says in what. As a job is given those of
    its own content only, that is a matter of what has changed around it, and costs the progress, not the job."""


class Snapshot(NamedTuple):
    """A checkpoint in memory, that the training does not change any more."""

    tensors: Tensors
    state: bytes


def fingerprint(request: TrainRequest, model: nn.Module) -> str:
    """SHA-256 (hex) of the request, with its digests, and of the model's parameters' names and shapes."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return hashlib.sha256(msgspec.json.encode([request, shapes], order="deterministic")).hexdigest()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def take(position: Position, model: nn.Module, optimizers: list[torch.optim.Optimizer], best: Tensors,
         processes: Processes = ALONE) -> Snapshot:  # fmt: skip
    """Copy all that a checkpoint holds. All processes have to call it; sharded tensors are put together."""
    parameters, position.numbers = trained(model), {}
    found: dict[str, Any] = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        state = next((o.state[p] for o in optimizers if p in o.state), {})
        found |= {f"optimizer.{name}.{key}": v for key, v in state.items() if isinstance(v, torch.Tensor)}
        position.numbers[name] = {key: v for key, v in state.items() if isinstance(v, int | float)}
    tensors = {key: processes.whole(tensor).clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}
    # nobody writes into these: the loop puts others in their place
    tensors |= {f"best.{name}": processes.whole(tensor).contiguous() for name, tensor in best.items()}
    tensors["rng"] = processes.gathered(torch.get_rng_state())
    return Snapshot(tensors, msgspec.json.encode(position))


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint to `folder`, which appears when it is whole, on disk and was read back. OSError if there is no room."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_file(snapshot.tensors, part / TENSORS)
    except SafetensorError as error:  # what it says of an error of the operating system
        shutil.rmtree(part)
        raise OSError(f"{folder.name}/{TENSORS}: {error}") from None
    (part / STATE).write_bytes(snapshot.state)
    with safe_open(part / TENSORS, "pt") as file:  # checks the header against the file's length
        if set(file.keys()) != set(snapshot.tensors):
            raise OSError(f"{folder.name}/{TENSORS} lacks tensors that were just written")
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def read(folder: Path | None, expected: str, model: nn.Module, optimizers: list[torch.optim.Optimizer],
         processes: Processes = ALONE) -> tuple[Position, Tensors]:  # fmt: skip
    """Put the checkpoint in `folder` (of the leading process, which hands it to the others) into `model`, `optimizers` and torch's
    generator; its position and best parameters.

    Misfit, in all processes, if its fingerprint is not `expected`; ClientFault "invalid_checkpoint" if it is not whole. Then
    nothing was changed.
    """
    try:
        position = msgspec.json.decode(processes.shared(folder and folder / STATE), type=Position)
        if position.fingerprint != expected:
            raise misfit(processes.agreed(_differences(folder / TENSORS, model) if folder and processes.leads else ""))
        tensors = processes.shared_tensors(folder and folder / TENSORS)
        parameters = {name: tensors[f"model.{name}"] for name in trained(model)}
        generators = tensors["rng"]
    except (OSError, msgspec.DecodeError, SafetensorError, KeyError) as error:
        raise invalid_checkpoint(f"{STATE}, {TENSORS}", error) from None
    with torch.no_grad():
        for name, p in trained(model).items():
            p.copy_(processes.part(parameters[name], p))
    for optimizer in optimizers:
        _restore(optimizer, model, tensors, position.numbers, processes)
    if len(generators) == processes.size:
        torch.set_rng_state(generators[processes.rank].clone())
    else:  # another number of processes: there is no state of each, so draw new ones that follow from the step
        torch.manual_seed(position.steps * processes.size + processes.rank)
    parts = trained(model)
    best = {k.removeprefix("best."): v.clone() for k, v in tensors.items() if k.startswith("best.")}
    return position, {name: processes.part(tensor, parts[name]) for name, tensor in best.items()}


def misfit(differences: str = "") -> Misfit:
    """That a fingerprint is another one; `differences` between its model and the present one, where they are known."""
    differences = differences or "its fingerprint differs"
    return Misfit(f"the checkpoint is of another request or model ({differences}): the work begins anew")


def _differences(path: Path, model: nn.Module) -> str:
    """Between the trained parameters in the file `path` and those of `model`, by names and shapes; "" if none can be seen."""
    try:
        with safe_open(path, "pt") as file:
            keys = [key for key in set(file.keys()) if key.startswith("model.")]
            of_file = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError):
        return ""
    here = {f"model.{name}": tuple(p.shape) for name, p in trained(model).items()}
    kinds = {"it lacks": here.keys() - of_file.keys(), "only it has": of_file.keys() - here.keys(),
             "of other shapes are": {key for key in here.keys() & of_file.keys() if here[key] != of_file[key]}}  # fmt: skip
    return "; ".join(f"{kind} {_some(names)}" for kind, names in kinds.items() if names)


def _some(keys: set[str]) -> str:
    first, *others = sorted(key.removeprefix("model.") for key in keys)
    return first + (f" and {len(others)} more" if others else "")


def _restore(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors, numbers: dict[str, dict[str, float]],
             processes: Processes) -> None:  # fmt: skip
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained(model).items():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
        if id(p) in held and (state or numbers.get(name)):
            optimizer.state[p] = {**{k: processes.part(v, p) if v.shape == p.shape else v for k, v in state.items()},
                                  **numbers.get(name, {})}  # fmt: skip
