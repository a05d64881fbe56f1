"""`kernelm plugin new`: small plugins, good names, nothing overwritten. That they pass every check: tests/conformance."""

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.feature_extraction.text import TfidfVectorizer

from kernelm_cli.scaffold import create
from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.errors import ClientFault

TEXTS = ("The striker scored, and scored again!", "Shares of the bank fell; the bank lost money.", "", "unknown")


def plugin_of(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("made", next(folder.glob("*/plugin.py")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["trainer", "server"])
def test_a_useful_trainer_or_server_has_thirty_lines(kind: str, tmp_path: Path) -> None:
    create(kind, f"my-{kind}", tmp_path / "new")
    code = next((tmp_path / "new").glob("*/plugin.py")).read_text().splitlines()
    assert len(code) <= 30
    assert max(map(len, code)) <= 132


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "int8"])
def test_the_server_answers_as_the_contract_says(scaled: bool, tmp_path: Path) -> None:
    create("server", "my-server", tmp_path / "new")
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(TEXTS)
    weight = np.random.default_rng(0).integers(-100, 100, (3, len(words.idf_)))
    scale, bias = (np.array([0.01, 0.02, 0.03], np.float32) if scaled else np.ones(3, np.float32)), np.arange(3, dtype=np.float32)
    tensors = {"idf": words.idf_.astype(np.float32), "weight": weight.astype(np.int8 if scaled else np.float32), "bias": bias}
    save_file(tensors | ({"scale": scale} if scaled else {}), tmp_path / "linear.safetensors")
    (tmp_path / "vocabulary.json").write_text(json.dumps({term: int(k) for term, k in words.vocabulary_.items()}))
    server = plugin_of(tmp_path / "new").WordServer(None, None)
    server.card = ModelCard("m", "text-classification", "tfidf-linear", ("a", "b", "c"), 0, request={"ngrams": 2})
    server.load(tmp_path)
    logits, tokens = server.answer(TEXTS)
    np.testing.assert_allclose(logits, words.transform(TEXTS) @ (weight * scale[:, None]).T + bias, rtol=1e-5, atol=1e-5)
    assert tokens == 6 + 9 + 0 + 1


def test_it_is_a_distribution_that_announces_itself(tmp_path: Path) -> None:
    create("trainer", "my-trainer", tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["kernelm.plugins"] == {"my-trainer": "my_trainer"}
    assert {"scikit-learn>=1.7", "kernelm-sdk"} <= set(project["dependencies"])
    assert "trainer/1.train" in tomllib.loads((tmp_path / "conformance.toml").read_text())["requests"]


def test_every_method_of_any_contract_is_there(tmp_path: Path) -> None:
    create("artifacts/1", "my-store", tmp_path)
    assert "async def open(self" in next(tmp_path.glob("*/plugin.py")).read_text()


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for kind, name, folder, code in (("data", "My Data", "a", "invalid"), ("data", "2nd", "a", "invalid"),
                                     ("oracle", "mine", "a", "invalid"), ("data", "mine", "full", "already_exists")):  # fmt: skip
        with pytest.raises(ClientFault) as refused:
            create(kind, name, tmp_path / folder)
        assert refused.value.code == code
        assert refused.value.remedy
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "a").exists()
