"""A linear model on several views of a text gives what scikit-learn gives for them side by side."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifier

from kernelm_contracts.terms import VIEWS
from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import open_model
from kernelm_sdk.errors import ClientFault

CHOSEN = ("words", "stems", "lead", "names")


def write(folder: Path, labels: tuple[str, ...], views: tuple[str, ...], vocabulary: dict[str, int],
          tensors: dict[str, Any]) -> None:  # fmt: skip
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    save_file({name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}, folder / "linear.safetensors")
    card = ModelCard("m", "text-classification", "tfidf-linear", labels, 0, request={"ngrams": 1, "views": views})
    (folder / "model.json").write_bytes(msgspec.json.encode(card))


def test_views_compute_what_scikit_learn_does(train: Any, unseen: Any, tmp_path: Path) -> None:
    vectorizers = {v: TfidfVectorizer(analyzer=partial(VIEWS[v], ngrams=1), sublinear_tf=True, min_df=2, dtype=np.float32)
                   for v in CHOSEN}  # fmt: skip
    blocks = [v.fit_transform(train.texts) for v in vectorizers.values()]
    fitted = RidgeClassifier(alpha=0.2).fit(sparse.hstack(blocks, "csr") / math.sqrt(len(CHOSEN)), train.truth)
    vocabulary: dict[str, int] = {}
    for view, vectorizer in vectorizers.items():
        before = len(vocabulary)
        vocabulary |= {f"{view}:{term}": before + int(column) for term, column in vectorizer.vocabulary_.items()}
    write(tmp_path, tuple(map(str, fitted.classes_)), CHOSEN, vocabulary, {
        "idf": np.concatenate([v.idf_ for v in vectorizers.values()]), "weight": fitted.coef_, "bias": fitted.intercept_})
    texts = [*unseen.texts, "Zzyzx", "a", "Tony Blair"]
    blocks = [v.transform(texts) for v in vectorizers.values()]
    expected = fitted.decision_function(sparse.hstack(blocks, "csr") / math.sqrt(len(CHOSEN)))
    model = open_model(tmp_path)
    np.testing.assert_allclose(model.run([model.tokenize(text) for text in texts]).logits, expected, atol=2e-5)


@pytest.mark.parametrize("views", [(), ("words", "smells")])
def test_a_view_that_nobody_knows_is_refused(views: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path, ("a", "b"), views, {"x": 0}, {"idf": np.ones(1), "weight": np.ones((2, 1)), "bias": np.zeros(2)})
    with pytest.raises(ClientFault, match=r"`request\.views` must be of words, stems, lead, names"):
        open_model(tmp_path)
