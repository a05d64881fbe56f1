"""Tagging, sentence embeddings, and the other problems of classification."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from textdata import tiny, write_lines
from transformers import AutoModel, AutoModelForTokenClassification

from kernelm_contracts.trainer import Adapter, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import scores
from kernelm_trainer.training import Folders, train

TAG = TrainRequest("sha256:d", base="sha256:b", structure="token-classification", epochs=8, batch_size=8, learning_rate=1e-2)
WORDS = {"O": ("the", "said", "in", "and"), "B-place": ("London", "Paris"), "B-person": ("Ada", "Alan")}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    labels = [random.choice(list(WORDS), 6).tolist() for _ in range(80)]
    lines = [{"tokens": [str(random.choice(WORDS[label])) for label in row], "labels": row} for row in labels]
    return write_lines(tmp_path / "tagged", lines)


def test_words_get_labels_and_entities_a_score(tagged: Path, bert: Path, tmp_path: Path, recorder) -> None:
    outcome = train(TAG, Folders(tagged, tmp_path / "work", bert), recorder)
    found = outcome.card.scores["test"]
    assert outcome.card.labels == ("B-person", "B-place", "O")
    assert found.per_label["entities"]["f1"] > 0.9
    assert found.documents == 12
    assert AutoModelForTokenClassification.from_pretrained(outcome.folder).config.id2label[2] == "O"


@pytest.mark.parametrize(("line", "named"), [
    ({"tokens": ["a", "b"], "labels": ["O"]}, "2 tokens, 1 labels"),
    ({"tokens": ["a"], "labels": ["B-new"]}, "B-new does not occur in train.jsonl"),
    ({"tokens": ["a"]}, "labels"),
    ({"tokens": ["a"] * 80, "labels": ["O"] * 80}, "tokens, the model takes 64"),
])  # fmt: skip
def test_bad_tags_are_refused_by_line(line: dict, named: str, tagged: Path, bert: Path, tmp_path: Path, recorder) -> None:
    (tagged / "validation.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ClientFault, match=r"validation\.jsonl:1") as caught:
        train(TAG, Folders(tagged, tmp_path / "work", bert), recorder)
    assert named in caught.value.message


def test_one_kind_of_tag_alone_is_refused(tagged: Path, bert: Path, tmp_path: Path, recorder) -> None:
    (tagged / "train.jsonl").write_text('{"tokens": ["a"], "labels": ["O"]}\n')
    with pytest.raises(ClientFault, match="a classifier needs two"):
        train(TAG, Folders(tagged, tmp_path / "work", bert), recorder)


def test_a_sentence_that_is_longer_than_the_model_is_refused(bert: Path, tmp_path: Path, recorder) -> None:
    request = TrainRequest("sha256:d", base="sha256:b", structure="sentence-embedding")
    lines = [{"anchor": "goal", "positive": "goal " * n} for n in (2, 200, 2, 2)]
    with pytest.raises(ClientFault, match=r"train\.jsonl:2 has \d+ tokens, the model takes 64") as caught:
        train(request, Folders(write_lines(tmp_path / "pairs", lines), tmp_path / "work", bert), recorder)
    assert caught.value.code == "too_long"


def test_texts_that_mean_the_same_come_near_each_other(bert: Path, tmp_path: Path, recorder) -> None:
    words = ["bank", "goal", "film", "party", "phone", "market", "league", "actor", "vote", "screen"]
    lines = [{"anchor": f"{words[n % 10]} {words[n % 7]}", "positive": f"{words[n % 7]} of {words[n % 10]}"} for n in range(70)]
    request = TrainRequest("sha256:d", base="sha256:b", structure="sentence-embedding", epochs=6, batch_size=10, learning_rate=3e-3)
    outcome = train(request, Folders(write_lines(tmp_path / "pairs", lines), tmp_path / "work", bert), recorder)
    losses = [m["loss"] for _, phase, _, m in recorder.reports if phase.startswith("train")]
    assert losses[-1] < losses[0] - 0.5
    assert outcome.card.task == "sentence-similarity"
    assert AutoModel.from_pretrained(outcome.folder).config.hidden_size == outcome.card.hidden == 32


@pytest.fixture
def many(news: Path, copy) -> Path:
    """The articles with any number of labels: their own, and "tech" for every third."""
    folder = copy(news, "many")
    for split in ("train", "validation", "test"):
        table = pq.read_table(folder / f"{split}.parquet")
        rows = [sorted({label, *([4] if n % 3 == 0 else [])}) for n, label in enumerate(table["label"].to_pylist())]
        table = table.drop_columns("label").append_column("labels", pa.array(rows, pa.list_(pa.int32())))
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def test_a_document_may_have_any_number_of_labels(many: Path, tiny_bert: Path, tmp_path: Path, recorder) -> None:
    request = TrainRequest("sha256:d", base="sha256:b", problem="multi-label", epochs=2, learning_rate=1e-3)
    outcome = train(request, Folders(many, tmp_path, tiny_bert), recorder)
    losses = [m["loss"] for _, phase, _, m in recorder.reports if phase.startswith("train")]
    assert losses[-1] < losses[0]
    assert outcome.card.problem == "multi-label"
    assert not (outcome.folder / "confusion.png").exists()
    assert "Classifies a text as any of" in (outcome.folder / "card.md").read_text()


def test_scores_of_many_labels_of_a_known_case() -> None:
    truth = np.array([[1, 0], [1, 1], [0, 0]])
    found = scores.multilabel("test", ("a", "b"), truth, np.array([[2.0, -2.0], [2.0, -2.0], [-2.0, -2.0]]))
    assert found.accuracy == 2 / 3
    assert found.per_label["a"]["f1"] == 1.0
    assert found.per_label["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1.0}
    assert found.loss == pytest.approx((5 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 6)


def test_a_document_without_labels_is_refused(news: Path, many: Path, tiny_bert: Path, copy, tmp_path: Path, recorder) -> None:
    folder = copy(news, "one")
    table = pq.read_table(folder / "train.parquet")
    missing = pa.array([None, *table["label"].to_pylist()[1:]], pa.int32())
    pq.write_table(table.set_column(2, "label", missing), folder / "train.parquet")
    request = TrainRequest("sha256:d", base="sha256:b")
    with pytest.raises(ClientFault, match="1 documents have none"):
        train(request, Folders(folder, tmp_path / "a", tiny_bert), recorder)
    with pytest.raises(ClientFault, match="column label is missing"):
        train(request, Folders(many, tmp_path / "b", tiny_bert), recorder)
    with pytest.raises(ClientFault, match="the dataset has 5 labels"):
        train(msgspec.structs.replace(request, problem="binary"), Folders(news, tmp_path / "c", tiny_bert), recorder)


def test_a_classifier_learns_by_an_adapter(news: Path, tiny_bert: Path, tmp_path: Path, recorder) -> None:
    request = TrainRequest("sha256:d", base="sha256:b", epochs=1, learning_rate=1e-2, adapter=Adapter(rank=4, merge=True))
    outcome = train(request, Folders(news, tmp_path, tiny_bert), recorder)
    before, after = (AutoModel.from_pretrained(f, add_pooling_layer=False).state_dict() for f in (tiny_bert, outcome.folder))
    assert set(before) == set(after)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "embeddings.word_embeddings.weight" in same
    assert "encoder.layer.0.attention.self.query.weight" not in same
