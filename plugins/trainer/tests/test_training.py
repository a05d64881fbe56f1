import json
import math
import re
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import card, frozen
from kernelm_trainer.corpus import read_corpus
from kernelm_trainer.training import Folders, train

ALWAYS = {"model.json", "evaluation.json", "confusion.png", "card.md"}
ENCODER = {"config.json", "model.safetensors", "head.safetensors", "tokenizer.json", "tokenizer_config.json"}
TFIDF = TrainRequest("sha256:d", structure="tfidf-linear", algorithm="liblinear")
FROZEN = TrainRequest("sha256:d", base="sha256:b", structure="frozen-linear", algorithm="lbfgs", checkpoint_every_s=0.0)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def logits_by_the_contract(folder: Path, text: str) -> np.ndarray:
    """From the docstring of `kernelm_contracts.trainer`, without scikit-learn."""
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    ngrams = json.loads((folder / "model.json").read_text())["request"]["ngrams"]
    tensors = load_file(folder / "linear.safetensors")
    tokens = re.findall(r"(?u)\b\w\w+\b", text.lower())
    terms = [" ".join(tokens[i : i + n]) for n in range(1, ngrams + 1) for i in range(len(tokens) - n + 1)]
    x = np.zeros(len(vocabulary), np.float32)
    for term, count in Counter(t for t in terms if t in vocabulary).items():
        x[vocabulary[term]] = (1 + math.log(count)) * tensors["idf"][vocabulary[term]]
    return tensors["weight"] @ (x / (np.linalg.norm(x) or 1)) + tensors["bias"]


@pytest.mark.parametrize(("algorithm", "ngrams"), [("liblinear", 2), ("lbfgs", 1)])
def test_tfidf_is_good_and_rebuilt_from_the_contract_alone(
    algorithm: str, ngrams: int, news: Path, tmp_path: Path, recorder
) -> None:  # fmt: skip
    request = msgspec.structs.replace(TFIDF, algorithm=algorithm, ngrams=ngrams)
    outcome = train(request, Folders(news, tmp_path), recorder)
    assert names(outcome.folder) == ALWAYS | {"vocabulary.json", "linear.safetensors"}
    test = read_corpus(news, False, ("train", "test")).splits["test"]
    logits = np.stack([logits_by_the_contract(outcome.folder, text) for text in test.texts])
    scores = outcome.card.scores["test"]
    assert np.mean(logits.argmax(1) == test.labels) == scores.accuracy
    assert scores.accuracy > 0.8
    wide = logits.astype(np.float64)
    loss = np.mean(np.log(np.exp(wide).sum(1)) - wide[np.arange(len(wide)), test.labels])
    assert abs(loss - scores.loss) < 1e-5
    assert np.allclose(logits_by_the_contract(outcome.folder, ""), load_file(outcome.folder / "linear.safetensors")["bias"])


def test_what_speaks_against_the_dataset_is_on_the_card(news: Path, tmp_path: Path, recorder) -> None:
    outcome = train(msgspec.structs.replace(TFIDF, require_private_clean="warn"), Folders(news, tmp_path), recorder)
    assert outcome.card.warnings == ("nobody looked for private data in the dataset",)
    assert "**Warning:** nobody looked" in (outcome.folder / "card.md").read_text()
    assert "require_private_clean" not in outcome.card.request
    with pytest.raises(ClientFault, match="nobody looked"):
        train(msgspec.structs.replace(TFIDF, require_private_clean="refuse"), Folders(news, tmp_path / "other"), recorder)


def test_card_and_evaluation_say_the_same(news: Path, tmp_path: Path, recorder) -> None:
    outcome = train(TFIDF, Folders(news, tmp_path), recorder)
    assert card.read(outcome.folder) == outcome.card
    evaluation = msgspec.json.decode((outcome.folder / "evaluation.json").read_bytes(), type=dict[str, Scores])
    assert evaluation == outcome.card.scores
    text = (outcome.folder / "card.md").read_text()
    assert f"{evaluation['test'].accuracy:.4f}" in text
    assert np.sum(evaluation["test"].confusion) == evaluation["test"].documents == 30
    assert outcome.card.parameters == 5 * (len(json.loads((outcome.folder / "vocabulary.json").read_text())) + 1)


def test_a_search_never_opens_the_test_split(news: Path, copy, tmp_path: Path, recorder) -> None:
    folder = copy(news)
    (folder / "test.parquet").unlink()
    outcome = train(msgspec.structs.replace(TFIDF, report_test=False), Folders(folder, tmp_path), recorder)
    assert set(outcome.card.scores) == {"validation"}
    with pytest.raises(ClientFault, match=r"test\.parquet is missing"):
        train(TFIDF, Folders(folder, tmp_path), recorder)


def test_an_encoder_folder_is_complete(news: Path, tiny_bert: Path, tmp_path: Path, recorder) -> None:
    request = TrainRequest("sha256:d", base="sha256:b", epochs=1, layers=1)
    outcome = train(request, Folders(news, tmp_path, tiny_bert), recorder)
    assert names(outcome.folder) == ALWAYS | ENCODER
    assert outcome.card.hidden == 32
    assert outcome.card.request["best_epoch"] == 1
    assert set(outcome.card.scores) == {"validation", "test"}
    assert json.loads((outcome.folder / "config.json").read_text())["num_hidden_layers"] == 1
    assert outcome.tokens_per_s > 0
    assert list(dict.fromkeys(r[1] for r in recorder.reports)) == ["load", "train epoch 1/1", "evaluate", "write"]


def test_a_frozen_encoder_resumes_to_the_same_model(
    news: Path, tiny_bert: Path, tmp_path: Path, recorder_class, monkeypatch
) -> None:  # fmt: skip
    monkeypatch.setattr(frozen, "CHUNK", 32)
    whole = train(FROZEN, Folders(news, tmp_path / "a", tiny_bert), recorder_class(tmp_path / "none"))
    stopped = recorder_class(tmp_path / "kept", 2)
    with pytest.raises(stopped.Stopped):
        train(FROZEN, Folders(news, tmp_path / "b", tiny_bert), stopped)
    again = recorder_class(tmp_path / "again")
    resumed = train(FROZEN, Folders(news, tmp_path / "c", tiny_bert, stopped.checkpoints[-1]), again)
    assert names(resumed.folder) == ALWAYS | ENCODER
    assert len(again.checkpoints) == 3  # 150 documents are 5 chunks; 2 were done
    assert resumed.card.scores == whole.card.scores
    ours, theirs = (load_file(o.folder / "head.safetensors") for o in (resumed, whole))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    base, kept = (load_file(f / "model.safetensors") for f in (tiny_bert, whole.folder))
    assert all(np.array_equal(base[key], kept[key]) for key in base)
    other = msgspec.structs.replace(FROZEN, seed=1)
    anew = recorder_class(tmp_path / "anew")
    train(other, Folders(news, tmp_path / "d", tiny_bert, stopped.checkpoints[-1]), anew)
    assert anew.anew == ["the checkpoint is of another request or model (its fingerprint differs): the work begins anew"]
    assert len(anew.checkpoints) == 5
    state = json.loads((stopped.checkpoints[-1] / "state.json").read_bytes())
    (stopped.checkpoints[-1] / "state.json").write_text(json.dumps(state | {"documents": state["documents"] + 1}))
    with pytest.raises(ClientFault, match=r"embeddings \(64, 32\) of 65 documents") as caught:
        train(FROZEN, Folders(news, tmp_path / "e", tiny_bert, stopped.checkpoints[-1]), again)
    assert caught.value.code == "invalid_checkpoint"


def test_a_folder_without_a_card_is_no_model(news: Path) -> None:
    with pytest.raises(ClientFault, match=r"model\.json is missing"):
        card.read(news)
