"""Linear classifiers with probabilities: logits = weight @ x + bias, calibrated by one temperature.

"liblinear" is a linear SVM, one class against the rest with squared hinge loss (Fan et al., "LIBLINEAR", 2008); "lbfgs" is
multinomial logistic regression; "ridge" is least squares on +1 and -1, one class against the rest. The temperature is the one
with the least cross-entropy on scores of held-out folds of the train split (Guo et al., "On Calibration of Modern Neural
Networks", 2017, section 4.2), and is divided into weight and bias, so that the validation and the test split stay untouched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from kernelm_sdk.errors import ClientFault, PluginFault

FOLDS = 5
ITERATIONS = 10_000


@dataclass(frozen=True)
class Linear:
    """logits [documents, labels] = x @ weight.T + bias."""

    weight: NDArray[np.float32]  # [labels, features]
    bias: NDArray[np.float32]  # [labels]
    temperature: float = 1.0  # that weight and bias were divided by

    def logits(self, x: Any) -> NDArray[np.float32]:
        """`x` is [documents, features], dense or sparse."""
        return np.asarray(x @ self.weight.T + self.bias, np.float32)


def fit(x: Any, y: NDArray[np.int64], labels: tuple[str, ...], algorithm: str, regularization: float, seed: int,
        step_done: Callable[[int, int], None]) -> Linear:  # fmt: skip
    """Fit and calibrate on `x` [documents, features] (dense or sparse) and `y` [documents].

    `regularization` is C, the inverse strength. `step_done(done, of)` is told the fits. ClientFault if a label has
    fewer than two documents; PluginFault "not_converged".
    """
    counts = np.bincount(y, minlength=len(labels))
    if counts.min() < 2:
        raise ClientFault("invalid_dataset", f"dataset: train.parquet column label: {labels[int(counts.argmin())]} has "
                          f"{counts.min()} document, the calibration needs two", "add documents of this class")  # fmt: skip
    folds = list(StratifiedKFold(min(FOLDS, int(counts.min())), shuffle=True, random_state=seed).split(np.zeros(len(y)), y))
    held_out = np.empty((len(y), len(labels)), np.float32)
    with threadpool_limits(1):  # vectors this short lose more by waiting for a second thread than it computes
        for done, (inside, outside) in enumerate(folds):
            step_done(done, len(folds) + 1)
            held_out[outside] = _fit_once(x[inside], y[inside], algorithm, regularization, seed).logits(x[outside])
        step_done(len(folds), len(folds) + 1)
        raw = _fit_once(x, y, algorithm, regularization, seed)
    temperature = _temperature(held_out, y)
    return Linear((raw.weight / temperature).astype(np.float32), (raw.bias / temperature).astype(np.float32), temperature)


def _fit_once(x: Any, y: NDArray[np.int64], algorithm: str, regularization: float, seed: int) -> Linear:
    if algorithm == "liblinear":
        estimator = LinearSVC(C=regularization, max_iter=ITERATIONS, random_state=seed)
    elif algorithm == "ridge":
        estimator = RidgeClassifier(alpha=1 / regularization, max_iter=ITERATIONS, solver="sparse_cg")
    else:
        estimator = LogisticRegression(C=regularization, max_iter=ITERATIONS)
    estimator.fit(x, y)
    if algorithm != "ridge" and np.max(estimator.n_iter_) >= ITERATIONS:
        raise PluginFault("not_converged", f'algorithm "{algorithm}" did not converge in {ITERATIONS} iterations',
                          "lower regularization or take the other algorithm")  # fmt: skip
    weight, bias = np.atleast_2d(estimator.coef_), np.atleast_1d(estimator.intercept_)
    if len(weight) == 1:  # two classes have one score s: its softmax form is (-s/2, s/2)
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Linear(weight.astype(np.float32), bias.astype(np.float32))


def _temperature(logits: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    wide = logits.astype(np.float64)

    def cross_entropy(log_temperature: float) -> float:
        scaled = wide / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]))

    return float(np.exp(minimize_scalar(cross_entropy, bounds=(np.log(1e-3), np.log(1e3)), method="bounded").x))
