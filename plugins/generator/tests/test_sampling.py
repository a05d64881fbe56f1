"""Tokens are drawn with the frequencies that the settings ask for."""

from collections import Counter

import pytest
import torch

from kernelm_generator import sampling
from kernelm_generator.sampling import Chooser, Sampling, choose

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
PROBABILITIES = torch.softmax(LOGITS[0], 0).tolist()


def shares(settings: Sampling, draws: int = 4000) -> list[float]:
    chooser = Chooser(settings._replace(seed=1))
    counts = Counter(choose(LOGITS.clone(), [chooser])[0] for _ in range(draws))
    return [counts[k] / draws for k in range(4)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (Sampling(temperature=1.0), PROBABILITIES),
        (Sampling(temperature=0.5), torch.softmax(LOGITS[0] * 2, 0).tolist()),
        (Sampling(temperature=1.0, top_k=2), [0.731, 0.269, 0.0, 0.0]),
        (Sampling(temperature=1.0, top_p=0.7), [0.731, 0.269, 0.0, 0.0]),
        (Sampling(temperature=1.0, top_p=0.6), [1.0, 0.0, 0.0, 0.0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.9), [0.731, 0.269, 0.0, 0.0]),  # of the three likeliest two have 0.91
        (Sampling(temperature=1e-9), [1.0, 0.0, 0.0, 0.0]),
        (Sampling(temperature=0.0), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_frequencies_are_right(settings: Sampling, wanted: list[float]) -> None:
    assert shares(settings) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("likeliest", [1, 2, 3])
def test_a_nucleus_beyond_the_tokens_sorted_first_is_found(likeliest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
    assert shares(Sampling(temperature=1.0, top_p=0.95)) == pytest.approx([0.665, 0.245, 0.09, 0.0], abs=0.03)


def test_penalties_grow_with_what_was_said() -> None:
    chooser = Chooser(Sampling(presence_penalty=0.6, frequency_penalty=0.5))
    assert [choose(LOGITS.clone(), [chooser])[0] for _ in range(5)] == [0, 1, 0, 0, 2]


def test_rows_of_all_kinds_are_chosen_together() -> None:
    warm = Sampling(temperature=1.0, seed=2)
    kinds = [Sampling(), warm, warm._replace(top_k=1), Sampling(presence_penalty=2.0)]
    logits = LOGITS.repeat(4, 1)
    first = choose(logits.clone(), [Chooser(kind) for kind in kinds])
    assert first[0] == first[2] == first[3] == 0
    assert first[1] == choose(LOGITS.clone(), [Chooser(kinds[1])])[0]
