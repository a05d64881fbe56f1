"""The optimization algorithms and their learning rates.

sgd, momentum, rmsprop, adam, adamw, adafactor and muon are torch's. Lion is below, from Chen et al., "Symbolic
Discovery of Optimization Algorithms" (2023), algorithm 2. Each is tested against the rule of its paper.

Adam is often written without the correction of its moments' bias towards zero (m and v themselves in place of m / (1 - beta1^t)
and v / (1 - beta2^t)). Torch's corrects it, as Kingma and Ba's algorithm 1 does; without it the first step would be 3.16 times as
long. Decay is an L2 penalty in sgd, momentum, rmsprop and adam, and decoupled from the gradient in the others.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# Peak of the schedule where the request gives none. AdamW's was measured (README.md), the others are customary values.
LEARNING_RATES = {"sgd": 0.5, "momentum": 0.05, "rmsprop": 5e-5, "adam": 1e-4, "adamw": 1e-4, "adafactor": 1e-3,
                  "lion": 2e-5, "muon": 1e-4}  # fmt: skip
HEADS = ("head.", "lm_head.", "classifier.")  # of our classifiers, and of transformers' models


class Lion(torch.optim.Optimizer):
    """Sign of an interpolation between momentum and gradient; weight decay is decoupled."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum.lerp(p.grad, 1 - beta1).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)
        return loss


def build(algorithm: str, model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers that train `model` together: one, or for "muon" two. Their rates are set by `set_rate`.

    Biases and norms (fewer than two dimensions) do not decay. Muon takes the matrices inside the transformer; embeddings
    and head, which are no maps between hidden spaces, and all vectors go to AdamW, as its author advises.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if algorithm != "muon":
        return [_single(algorithm, _groups([p for _, p in named], weight_decay))]
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = [p for name, p in named if p.ndim == 2 and id(p) not in embeddings and not name.startswith(HEADS)]
    chosen = set(map(id, matrices))
    rest = [p for _, p in named if id(p) not in chosen]
    # "match_rms_adamw" scales the update to AdamW's, so that both take the same learning rate
    muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, _single("adamw", _groups(rest, weight_decay))]


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip


def _single(algorithm: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    match algorithm:
        case "sgd":
            return torch.optim.SGD(groups, lr=1.0, fused=True)
        case "momentum":
            return torch.optim.SGD(groups, lr=1.0, momentum=0.9, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=1.0, alpha=0.99)
        case "adam":
            return torch.optim.Adam(groups, lr=1.0, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=1.0, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=1.0)
        case "lion":
            return Lion(groups, lr=1.0)
    raise ValueError(f"no such algorithm: {algorithm}")


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give all parameters the learning rate `rate`."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
