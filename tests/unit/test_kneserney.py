"""The rival of `make bench-language`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def kneserney() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "texts" / "kneserney.py"
    spec = importlib.util.spec_from_file_location("kneserney", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kneserney"] = module
    spec.loader.exec_module(module)
    return module


def test_probabilities_of_a_stream_that_was_computed_by_hand(kneserney: ModuleType) -> None:
    """a b a b b: bigrams ab 2, ba 1, bb 1; after different tokens stand a 1, b 2. No count is 3: discounts are 0.5, 1, 1.5.

    p(a) = (1 - 0.5 + 1.5/3) / 3 = 1/3, p(b) = (2 - 1 + 1.5/3) / 3 = 1/2, p(c) = (1.5/3) / 3 = 1/6
    p(b|a) = (2 - 1 + 1 p(b)) / 2 = 3/4, p(b|b) = (1 - 0.5 + 1 p(b)) / 2 = 1/2, p(a|b) = (1 - 0.5 + 1 p(a)) / 2 = 5/12
    p(c|b) = 1 p(c) / 2 = 1/12, p(a|c) = p(a), since nothing was seen after c
    """
    a, b, c = 0, 1, 2
    model = kneserney.KneserNey(np.array([a, b, a, b, b]), 3, 2)
    found = model.probabilities(np.array([a, b, b, a, b, c, a]))
    assert found == pytest.approx([1 / 3, 3 / 4, 1 / 2, 5 / 12, 3 / 4, 1 / 12, 1 / 3])


def test_discounts_are_those_of_the_paper(kneserney: ModuleType) -> None:
    counts = np.array([1.0] * 4 + [2.0] * 2 + [3.0, 4.0, 9.0])  # y = 4 / (4 + 2 x 2)
    assert kneserney._discounts(counts) == pytest.approx((1 - 2 * 0.5 * 2 / 4, 2 - 3 * 0.5 * 1 / 2, 3 - 4 * 0.5 * 1 / 1))
    assert kneserney._discounts(np.array([1.0, 2.0])) == kneserney.FALLBACK


def test_probabilities_of_all_tokens_sum_to_one_after_any_context(kneserney: ModuleType) -> None:
    random = np.random.default_rng(0)
    text = np.minimum(random.geometric(0.3, 3000), 11) - 1  # Zipf-like; token 11 never occurs
    model = kneserney.KneserNey(text, 12)
    for context in (text[100:104], text[:2], np.array([10, 10, 10, 10]), np.array([11]), random.integers(0, 12, 4)):
        assert sum(model.probabilities(np.append(context, token))[-1] for token in range(12)) == pytest.approx(1.0)


def test_longer_contexts_help_where_text_repeats(kneserney: ModuleType) -> None:
    text = np.tile([0, 1, 2, 0, 1, 3, 0, 2, 3], 200)
    first, last = (kneserney.KneserNey(text, 4, order).probabilities(text)[10:].mean() for order in (1, 5))
    assert first < 0.4
    assert last > 0.9
