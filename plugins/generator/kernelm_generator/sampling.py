"""The next token of each row: penalties, temperature, `top_k`, `top_p`, and one random number a step from the row's own seed.

An answer with a seed draws the same numbers whatever else is in its batch. Nucleus sampling: Holtzman et al. 2020, "The
Curious Case of Neural Text Degeneration"; penalties: OpenAI's API reference, "Create chat completion".
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

LIKELIEST = 1024  # tokens that are sorted first; all of them only where those are not probable enough together
COLDEST = 1e-5  # temperature below which nothing but the likeliest token is left anyway


class Sampling(NamedTuple):
    """How a call wants its tokens chosen."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


class Chooser:
    """The state of one answer's sampling."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.counts = sampling, Counter[int]()
        self.random = random.Random(sampling.seed)

    @property
    def penalizes(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    @property
    def cuts(self) -> bool:
        return self.sampling.top_k > 0 or self.sampling.top_p < 1


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row of `logits` [rows, vocabulary]; counts it for the penalties."""
    logits = logits.float()
    for row, chooser in enumerate(choosers):
        if chooser.penalizes and chooser.counts:
            logits[row] = _penalized(logits[row], chooser)
    tokens: list[int] = logits.argmax(-1).tolist()
    for cut in (False, True):
        rows = [k for k, c in enumerate(choosers) if c.sampling.temperature >= COLDEST and c.cuts == cut]
        if rows:
            drawn = (_draw_cut if cut else _draw)(logits[rows], [choosers[k] for k in rows])
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    for token, chooser in zip(tokens, choosers, strict=True):
        if chooser.penalizes:
            chooser.counts[token] += 1
    return tokens


def _penalized(logits: torch.Tensor, chooser: Chooser) -> torch.Tensor:
    ids = torch.tensor(list(chooser.counts), device=logits.device)
    times = torch.tensor(list(chooser.counts.values()), device=logits.device, dtype=logits.dtype)
    return logits.index_add(0, ids, -(chooser.sampling.presence_penalty + chooser.sampling.frequency_penalty * times))


def _probabilities(logits: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    temperatures = torch.tensor([c.sampling.temperature for c in choosers], device=logits.device)
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperatures.unsqueeze(1), -1)


def _draw(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """From the whole vocabulary, without sorting it."""
    drawn: list[int] = _at_random(_probabilities(logits, choosers), choosers).tolist()
    return drawn


def _draw_cut(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """From the `top_k` likeliest, and of these from the likeliest that together have `top_p`."""
    whole = _probabilities(logits, choosers)
    size = whole.shape[1]
    wanted = [c.sampling.top_k or size for c in choosers]
    p = torch.tensor([c.sampling.top_p for c in choosers], device=logits.device).unsqueeze(1)
    k = torch.tensor(wanted, device=logits.device).unsqueeze(1)
    values, ids = whole.topk(min(max([LIKELIEST, *(w for w in wanted if w < size)]), size))
    if ((k == size) & (values.sum(-1, keepdim=True) < p)).any():
        values, ids = whole.sort(-1, descending=True)
    places = torch.arange(values.shape[1], device=logits.device)
    kept = torch.where(places < k, values, 0.0)
    total = torch.where(k == size, 1.0, kept.sum(-1, keepdim=True))  # what lies beyond the sorted ones counts, if k allows it
    before = kept.cumsum(-1) - kept
    kept = torch.where((before < p * total) | (places == 0), kept, 0.0)
    drawn: list[int] = ids.gather(1, _at_random(kept, choosers).unsqueeze(1)).squeeze(1).tolist()
    return drawn


def _at_random(weights: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """For each row the place that its next random number falls on; `weights` need not sum to 1."""
    cumulative = weights.double().cumsum(-1)
    at = torch.tensor([[c.random.random()] for c in choosers], dtype=torch.float64, device=weights.device)
    return torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True).squeeze(1).clamp(max=weights.shape[1] - 1)
