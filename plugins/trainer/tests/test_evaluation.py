from pathlib import Path

import numpy as np
from PIL import Image

from kernelm_contracts.texts import score
from kernelm_trainer.evaluation import draw


def test_scores_of_a_known_case() -> None:
    truth = np.array([0, 0, 0, 1])
    logits = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    scores = score("test", ("a", "b"), truth, logits)
    assert scores.accuracy == 0.75
    assert scores.macro_recall == (2 / 3 + 1) / 2
    assert abs(scores.macro_f1 - (0.8 + 2 / 3) / 2) < 1e-12
    assert scores.confusion == ((2, 1), (0, 1))
    assert scores.per_label["b"] == {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1.0}
    assert abs(scores.loss - (3 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 4) < 1e-12


def test_a_label_without_documents_does_not_count() -> None:
    scores = score("test", ("a", "b", "c"), np.array([0, 1]), np.eye(3)[:2])
    assert (scores.accuracy, scores.macro_recall, scores.macro_f1) == (1.0, 1.0, 1.0)
    assert scores.per_label["c"]["support"] == 0


def test_the_picture_shows_right_in_blue_and_wrong_in_orange(tmp_path: Path) -> None:
    truth = np.array([0, 0, 1, 1])
    scores = score("test", ("a", "b"), truth, np.eye(2)[[0, 1, 1, 1]])
    draw([scores], ("a", "b"), "two labels", tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    assert pixels.shape[0] > 300
    red, blue = pixels[..., 0], pixels[..., 2]
    assert (blue - red > 60).mean() > 0.1
    assert (red - blue > 60).mean() > 0.05
