"""Scores with what makes them worth trusting: calibration, and intervals by bootstrap over the documents."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import bootstrap

from kernelm_contracts.texts import log_softmax, score
from kernelm_contracts.trainer import Interval, Scores

RESAMPLES = 1000
BINS = 15  # of confidence
Floats = NDArray[np.floating]


def interval(statistic: Callable[..., float], *columns: NDArray[Any]) -> Interval:
    """Where `statistic` of the rows lies in 95% of the resamples (Efron, 1979; percentiles)."""
    if len(columns[0]) < 2:
        value = float(statistic(*columns))
        return Interval(value, value)
    found = bootstrap(columns, statistic, n_resamples=RESAMPLES, paired=True, vectorized=False, method="percentile",
                      rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error: |share that is right - mean confidence| in bins of equal width, weighted by their size (Guo et
    al., "On Calibration of Modern Neural Networks", 2017, section 2)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right.astype(float) - confidence, BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def classifier(split: str, labels: Sequence[str], truth: NDArray[np.int64], logits: Floats) -> Scores:
    """Scores of a classifier with one label a document, as `kernelm_contracts.texts.score`, with calibration and intervals."""
    predicted, confidence = logits.argmax(1), np.exp(log_softmax(logits.astype(np.float64))).max(1)
    right = predicted == truth

    def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
        support, found = np.bincount(truth, minlength=len(labels)), np.bincount(predicted, minlength=len(labels))
        hits = np.bincount(truth[truth == predicted], minlength=len(labels))
        return float((2 * hits / np.maximum(support + found, 1))[support > 0].mean())

    intervals = {"accuracy": interval(np.mean, right), "macro_f1": interval(macro_f1, truth, predicted)}
    return msgspec.structs.replace(score(split, labels, truth, logits), intervals=intervals,
                                   calibration=calibration_error(confidence, right))  # fmt: skip


def multilabel(split: str, labels: Sequence[str], truth: NDArray[np.int64], logits: Floats) -> Scores:
    """Scores of a classifier with any number of labels a document: `truth` is 0 or 1, [documents, labels]. Accuracy counts the
    documents whose labels are all right; the loss is binary cross-entropy, a label's mean."""
    predicted, wide = (logits > 0).astype(np.int64), logits.astype(np.float64)
    hits, support, found = (predicted & truth).sum(0), truth.sum(0), predicted.sum(0)
    precision, recall, f1 = (hits / np.maximum(of, 1) for of in (found, support, (support + found) / 2))
    present, right = support > 0, (predicted == truth).all(1)
    per_label = {label: {"precision": float(precision[k]), "recall": float(recall[k]), "f1": float(f1[k]),
                         "support": float(support[k])} for k, label in enumerate(labels)}  # fmt: skip
    loss = np.mean(np.logaddexp(0.0, wide) - truth * wide)
    sure = np.maximum(expit(wide), expit(-wide))
    return Scores(split, len(truth), float(right.mean()), float(recall[present].mean()) if present.any() else 0.0,
                  float(f1[present].mean()) if present.any() else 0.0, float(loss), per_label,
                  calibration=calibration_error(sure.ravel(), (predicted == truth).ravel()),
                  intervals={"accuracy": interval(np.mean, right)})  # fmt: skip


def language(split: str, losses: Floats, hits: NDArray[np.int64], counts: NDArray[np.int64]) -> Scores:
    """Scores of a language model: of each row the summed loss (nats), the tokens that were the likeliest, the tokens."""
    total = int(counts.sum())
    loss = float(losses.sum() / total)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
        intervals = {"perplexity": interval(lambda a, b: np.exp(a.sum() / b.sum()), losses, counts),
                     "accuracy": interval(lambda a, b: a.sum() / b.sum(), hits, counts)}  # fmt: skip
    return Scores(split, len(losses), float(hits.sum() / total), 0.0, 0.0, loss, tokens=total, perplexity=perplexity,
                  intervals=intervals)  # fmt: skip
