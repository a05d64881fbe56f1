"""Each algorithm against the update rule of its paper, written out in float64, step by step on the same gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from kernelm_trainer.algorithms import build, set_rate

RATE, DECAY, STEPS = 0.05, 0.1, 6
Array = np.ndarray
Rule = Callable[[Array, list[Array]], Array]


class Hidden(nn.Module):
    """One matrix, which Muon takes as a hidden one."""

    def __init__(self, start: Array) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(start, dtype=torch.float32))


def sgd(p: Array, gradients: list[Array]) -> Array:
    """Robbins and Monro, 1951; weight decay as an L2 penalty."""
    for g in gradients:
        p = p - RATE * (g + DECAY * p)
    return p


def momentum(p: Array, gradients: list[Array]) -> Array:
    """Polyak, 1964, as Sutskever et al., 2013, write it with the rate outside: v = 0.9 v + g."""
    v = np.zeros_like(p)
    for g in gradients:
        v = 0.9 * v + g + DECAY * p
        p = p - RATE * v
    return p


def rmsprop(p: Array, gradients: list[Array]) -> Array:
    """Tieleman and Hinton, 2012, lecture 6.5."""
    v = np.zeros_like(p)
    for g in gradients:
        g = g + DECAY * p
        v = 0.99 * v + 0.01 * g**2
        p = p - RATE * g / (np.sqrt(v) + 1e-8)
    return p


def adam(p: Array, gradients: list[Array], decoupled: bool = False, corrected: bool = True) -> Array:
    """Kingma and Ba, 2015, algorithm 1."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        if decoupled:
            p = p - RATE * DECAY * p
        else:
            g = g + DECAY * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        first, second = (m / (1 - 0.9**t), v / (1 - 0.999**t)) if corrected else (m, v)
        p = p - RATE * first / (np.sqrt(second) + 1e-8)
    return p


def adamw(p: Array, gradients: list[Array]) -> Array:
    """Loshchilov and Hutter, 2019, algorithm 2, with the decay multiplied by the rate."""
    return adam(p, gradients, decoupled=True)


def adafactor(p: Array, gradients: list[Array]) -> Array:
    """Shazeer and Stern, 2018, algorithm 4 for a matrix, without momentum: relative step, decay 1 - t^-0.8, clipping at 1."""
    rows, columns = np.zeros((p.shape[0], 1)), np.zeros((1, p.shape[1]))
    for t, g in enumerate(gradients, 1):
        decay = 1 - t**-0.8
        scale = max(1e-3, np.sqrt((p**2).mean())) * min(RATE, 1 / np.sqrt(t))
        p = p - RATE * DECAY * p
        rows = decay * rows + (1 - decay) * (g**2).mean(1, keepdims=True)
        columns = decay * columns + (1 - decay) * (g**2).mean(0, keepdims=True)
        update = g / np.sqrt(rows @ columns / rows.mean())
        p = p - scale * update / max(1.0, np.sqrt((update**2).mean()))
    return p


def lion(p: Array, gradients: list[Array]) -> Array:
    """Chen et al., 2023, algorithm 2."""
    m = np.zeros_like(p)
    for g in gradients:
        p = p - RATE * (np.sign(0.9 * m + 0.1 * g) + DECAY * p)
        m = 0.99 * m + 0.01 * g
    return p


def muon(p: Array, gradients: list[Array]) -> Array:
    """Jordan et al., 2024: Nesterov momentum 0.95, five Newton-Schulz steps; scaled to AdamW's size as Liu et al., 2025, do."""
    m = np.zeros_like(p)
    for g in gradients:
        m = 0.95 * m + g
        x = g + 0.95 * m
        x = x / np.linalg.norm(x)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        p = p - RATE * DECAY * p
        p = p - RATE * 0.2 * np.sqrt(max(p.shape)) * x
    return p


RULES: dict[str, tuple[Rule, float]] = {  # the rule, and how far off, as a share of the way, the steps may end
    "sgd": (sgd, 1e-5), "momentum": (momentum, 1e-5), "rmsprop": (rmsprop, 1e-5), "adam": (adam, 1e-5), "adamw": (adamw, 1e-5),
    "adafactor": (adafactor, 1e-5), "lion": (lion, 1e-5), "muon": (muon, 0.03),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", RULES)
@pytest.mark.parametrize("steps", range(1, STEPS + 1))
def test_an_algorithm_takes_the_steps_of_its_paper(algorithm: str, steps: int) -> None:
    """Muon iterates in bfloat16, so that it is compared more coarsely."""
    random = np.random.default_rng(3)
    start, gradients = random.normal(size=(4, 6)), [random.normal(size=(4, 6)) for _ in range(steps)]
    model = Hidden(start)
    optimizers = [o for o in build(algorithm, model, DECAY) if any(g["params"] for g in o.param_groups)]
    set_rate(optimizers, RATE)
    for g in gradients:
        model.matrix.grad = torch.tensor(g, dtype=torch.float32)
        for optimizer in optimizers:
            optimizer.step()
    rule, tolerance = RULES[algorithm]
    expected = rule(start, gradients)
    assert np.abs(model.matrix.detach().numpy() - expected).max() < tolerance * np.abs(expected - start).max()


def test_adam_corrects_the_bias_of_its_means() -> None:
    """Without the correction the first step would be 3.16 times as long: 0.1 / sqrt(0.001)."""
    start, gradients = np.ones((2, 2)), [np.full((2, 2), 0.5)]
    assert np.allclose((start - adam(start, gradients, corrected=False)) / (start - adam(start, gradients)), 0.1 / np.sqrt(0.001))
