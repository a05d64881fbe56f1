"""Several views of a text, as `trainer/1` and kernelm_contracts.terms define them."""

import json
import math
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from kernelm_contracts.terms import VIEWS, terms
from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer.corpus import read_corpus
from kernelm_trainer.training import Folders, train

REQUEST = TrainRequest("sha256:d", structure="tfidf-linear", algorithm="ridge", regularization=5.0, ngrams=1)
TEXT = "Tony Blair said he is running. The Prime Minister runs"


def test_a_term_says_which_view_it_is_of_where_there_are_several():
    assert terms(TEXT, ("words",), 2)[0][:2] == ["tony", "blair"]
    assert "tony blair" in terms(TEXT, ("words",), 2)[0]
    found = terms(TEXT, ("stems", "names", "lead"), 1)
    assert found[0] == [f"stems:{t}" for t in ("tony", "blair", "said", "he", "is", "runn", "the", "prime", "minister", "runs")]
    assert found[1] == ["names:Tony Blair", "names:The Prime Minister"]
    assert found[2] == [f"lead:{t}" for t in VIEWS["words"](TEXT, 1)]


def by_the_contract(folder: Path, text: str, views: tuple[str, ...]) -> np.ndarray:
    tensors, vocabulary = load_file(folder / "linear.safetensors"), json.loads((folder / "vocabulary.json").read_text())
    x = np.zeros(len(vocabulary))
    for found in terms(text, views, 1):
        of_view = np.zeros(len(vocabulary))
        for term, count in Counter(t for t in found if t in vocabulary).items():
            of_view[vocabulary[term]] = (1 + math.log(count)) * tensors["idf"][vocabulary[term]]
        x += of_view / (np.linalg.norm(of_view) or 1) / math.sqrt(len(views))
    return tensors["weight"] @ x + tensors["bias"]


@pytest.mark.parametrize("views", [("words", "stems", "lead", "names"), ("names",)])
def test_views_are_good_together_and_rebuilt_from_the_contract_alone(views, news: Path, tmp_path: Path, recorder) -> None:
    request = msgspec.structs.replace(REQUEST, views=views, max_share=0.5)
    outcome = train(request, Folders(news, tmp_path), recorder)
    test = read_corpus(news, False, ("train", "test")).splits["test"]
    logits = np.stack([by_the_contract(outcome.folder, text, views) for text in test.texts])
    scores = outcome.card.scores["test"]
    assert np.mean(logits.argmax(1) == test.labels) == pytest.approx(scores.accuracy)
    assert scores.accuracy > (0.8 if len(views) > 1 else 0.5)
    assert tuple(outcome.card.request["views"]) == views
    train_texts = read_corpus(news, False, ("train",)).splits["train"].texts
    counts = Counter(word for text in train_texts for word in set(VIEWS["words"](text, 1)))
    frequent = [word for word, count in counts.items() if count > len(train_texts) / 2]
    vocabulary = json.loads((outcome.folder / "vocabulary.json").read_text())
    assert frequent
    assert not any(f"words:{t}" in vocabulary for t in frequent)


@pytest.mark.parametrize(("change", "words"), [
    ({"views": ()}, "views are none"),
    ({"views": ("words", "words")}, "views are words, words"),
    ({"max_share": 0.0}, "max_share is 0.0"),
    ({"structure": "frozen-linear", "base": "sha256:b", "views": ("names",)}, "has no use for views"),
])  # fmt: skip
def test_views_that_make_no_sense_are_refused(change, words, news: Path, tmp_path: Path, recorder) -> None:
    with pytest.raises(ClientFault, match=words):
        train(msgspec.structs.replace(REQUEST, **{"ngrams": 2, **change}), Folders(news, tmp_path), recorder)
