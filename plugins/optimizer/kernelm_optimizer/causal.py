"""Causal models measured side by side: the same documents, the same tokens, in turns. No kernelm I/O."""

import gc
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import psutil
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from kernelm_contracts.energy import Meter
from kernelm_contracts.optimizer import Change
from kernelm_contracts.server import Measurement
from kernelm_contracts.splits import batches, files
from kernelm_contracts.trainer import Scores
from kernelm_optimizer.integers import load_causal
from kernelm_sdk.errors import ClientFault

DOCUMENTS = 256  # of the validation split, at most
PROMPT, ANSWER = 16, 32  # tokens of what is timed
RESAMPLES = 2000


class Figures(Struct, frozen=True):
    """Of one model."""

    measurement: Measurement
    losses: list[float]  # of each document, nats, summed over its tokens
    tokens: list[int]  # of each document that have a loss


def rows(dataset: Path, split: str, most: int) -> list[torch.Tensor]:
    """Token ids of the split's first `most` documents that have two tokens at least. ClientFault `invalid` where there are none,
    `invalid_dataset` for a dataset without a tokenizer."""
    found: list[torch.Tensor] = []
    for batch in batches(dataset, split, ("input_ids",), packed=bool(files(dataset, split, packed=True)), rows=most):
        found += [torch.tensor(ids) for ids in batch.column(0).to_pylist() if len(ids) > 1]
        if len(found) >= most:
            return found[:most]
    if not found:
        raise _invalid(f"the split {split!r} has no token ids", "prepare it with a tokenizer (data/1)")
    return found


def measured(folders: Mapping[str, Path], dataset: Path, rounds: int) -> dict[str, Figures]:
    """Digest or name -> figures, of the models in `folders`, which are all loaded at a time and take turns. ClientFault `invalid`
    if the dataset's tokens are none of a model's."""
    documents = rows(dataset, "validation", DOCUMENTS)
    models, loaded, memory = {}, {}, {}
    for name, folder in folders.items():
        gc.collect()
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        models[name] = load_causal(folder)
        loaded[name], memory[name] = time.perf_counter() - began, (psutil.Process().memory_info().rss - before) / 2**20
    _check(models, documents)
    costs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in models}
    spent, used, meter = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), Meter()
    for ids in documents:
        for name, model in models.items():
            began = time.perf_counter()
            costs[name].append(_cost(model, ids))
            spent[name] += time.perf_counter() - began
            used[name] += meter.joules()
    laps: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):  # the first one warms up
        for name, model in models.items():
            took = [1000 * lap for lap in _decoded(model, documents[0][:PROMPT])]
            laps[name] += took if turn else []
    return {name: _figures(name, folder, costs[name], laps[name], spent[name], memory[name], loaded[name], used[name])
            for name, folder in folders.items()}  # fmt: skip


def _check(models: Mapping[str, Any], documents: list[torch.Tensor]) -> None:
    highest, longest = max(int(ids.max()) for ids in documents), max(map(len, documents))
    for name, model in models.items():
        if highest >= model.config.vocab_size:
            raise _invalid(f"it has the token {highest}, and {name} knows {model.config.vocab_size}",
                           "prepare the dataset with the model's tokenizer")  # fmt: skip
        most = getattr(model.config, "max_position_embeddings", None) or longest
        if longest > most:
            raise _invalid(f"a document has {longest} tokens, {name} takes {most}", "prepare it with shorter sequences")


def _cost(model: Any, ids: torch.Tensor) -> tuple[float, int, int]:
    """(nats of all tokens but the first, how many these are, how many were the likeliest)."""
    with torch.inference_mode():
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    loss = float(cross_entropy(logits, ids[1:], reduction="sum"))
    return loss, len(ids) - 1, int((logits.argmax(-1) == ids[1:]).sum())


def _decoded(model: Any, prompt: torch.Tensor) -> Iterator[float]:
    """Seconds of each token of an answer, greedily."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        out = model(input_ids=prompt.unsqueeze(0), cache=cache, use_cache=True)
        for _ in range(ANSWER):
            began = time.perf_counter()
            out = model(input_ids=out.logits[:, -1:].argmax(-1), cache=cache, use_cache=True)
            yield time.perf_counter() - began


def _figures(name: str, folder: Path, costs: list[tuple[float, int, int]], laps: list[float], spent_s: float, memory_mb: float,
             load_s: float, used_j: float) -> Figures:  # fmt: skip
    losses, tokens, hits = (list(column) for column in zip(*costs, strict=True))
    total = int(sum(tokens))
    loss = sum(losses) / total
    scores = Scores("validation", len(costs), sum(hits) / total, 0.0, 0.0, loss, tokens=total, perplexity=float(np.exp(loss)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    p99 = quantiles(laps, n=100)[-1]
    measurement = Measurement(name, scores, median(laps), p99, total / spent_s, size, max(memory_mb, 0.0), load_s, used_j / total)
    return Figures(measurement, [float(x) for x in losses], [int(x) for x in tokens])


def _invalid(why: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"compress: dataset: {why}", remedy)


def change(before: Figures, after: Figures, seed: int = 0) -> Change:
    """By how much the mean loss of a token grew, by paired bootstrap over the documents."""
    one, other, tokens = (np.array(x, np.float64) for x in (before.losses, after.losses, before.tokens))
    random = np.random.default_rng(seed)
    drawn = random.integers(0, len(tokens), (RESAMPLES, len(tokens)))
    grown: NDArray[np.float64] = (other - one)[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = (float(x) for x in np.percentile(grown, [2.5, 97.5]))
    difference = float((other - one).sum() / tokens.sum())
    significant = not low <= 0.0 <= high
    was, now = before.measurement.scores.perplexity, after.measurement.scores.perplexity
    text = (f"perplexity {was:.3f} before, {now:.3f} after ({100 * (now / was - 1):+.2f} %); the loss of a token changes by "
            f"{difference:+.4f} nats ({low:+.4f} to {high:+.4f}), {'' if significant else 'not '}significant")  # fmt: skip
    return Change("loss", difference, low, high, significant, text)
