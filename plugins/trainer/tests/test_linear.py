import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import make_classification

from kernelm_sdk.errors import ClientFault
from kernelm_trainer import linear


@pytest.mark.parametrize("algorithm", ["liblinear", "lbfgs", "ridge"])
@pytest.mark.parametrize("classes", [2, 4])
def test_probabilities_are_calibrated(algorithm: str, classes: int) -> None:
    x, y = make_classification(4000, 20, n_informative=8, n_classes=classes, class_sep=0.7, flip_y=0.1, random_state=0)
    fits: list[tuple[int, int]] = []
    labels = tuple("abcd"[:classes])
    model = linear.fit(x[:2000], y[:2000], labels, algorithm, 1.0, 0, lambda *step: fits.append(step))
    assert model.weight.shape == (classes, 20)
    assert fits == [(i, 6) for i in range(6)]
    probability = softmax(model.logits(x[2000:]), axis=1)
    confidence, right = probability.max(1), probability.argmax(1) == y[2000:]
    assert right.mean() > 1.3 / classes
    assert abs(confidence.mean() - right.mean()) < 0.04
    for low in (0.4, 0.6, 0.8):  # calibrated within bands, too
        band = (confidence >= low) & (confidence < low + 0.2)
        if band.sum() > 200:
            assert abs(confidence[band].mean() - right[band].mean()) < 0.1


def test_a_label_with_one_document_is_refused_by_name() -> None:
    with pytest.raises(ClientFault, match="rare has 1 document"):
        linear.fit(np.eye(5), np.array([0, 0, 0, 0, 1]), ("common", "rare"), "lbfgs", 1.0, 0, lambda *_: None)
