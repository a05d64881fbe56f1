"""The three implementations, against an independent computation of the same thing, and against bad artifacts."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelm_encoder.model import Model, Output, open_model
from kernelm_sdk.errors import ClientFault

LONG = "The market fell sharply. " * 400  # 10,000 characters


def answer(model: Model, texts: list[str]) -> Output:
    return model.run([model.tokenize(text) for text in texts])


def accuracy(model: Model, news: Any) -> float:
    return float((answer(model, news.texts).logits.argmax(axis=1) == np.array(news.truth)).mean())


@pytest.fixture
def copy(tmp_path: Path) -> Any:
    """A copy of a model's folder to spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "model"))


def edit_card(folder: Path, **fields: Any) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_tfidf_computes_what_scikit_learn_does(tfidf: Any, unseen: Any) -> None:
    folder, vectorizer, classifier = tfidf
    texts = [*unseen.texts, "Zzyzx", "a", "ΑΘΗΝΑ naïve don't — 3G/4G"]
    expected = classifier.decision_function(vectorizer.transform(texts))
    np.testing.assert_allclose(answer(open_model(folder), texts).logits, expected, atol=2e-5)


def test_tfidf_int8_is_exact_in_its_weights_and_smaller(tfidf: Any, tfidf_int8: Path, unseen: Any) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(tfidf_int8 / "linear.safetensors")
    weight = tensors["weight"] * tensors["scale"][:, None]
    full, small = open_model(tfidf[0]), open_model(tfidf_int8)
    expected = tfidf[1].transform(unseen.texts) @ weight.T + tensors["bias"]
    np.testing.assert_allclose(answer(small, unseen.texts).logits, expected, atol=2e-5)
    assert small.size < full.size
    assert accuracy(small, unseen) >= accuracy(full, unseen) - 0.02 >= 0.8


def test_encoder_computes_what_sentence_transformers_does(encoder: Path, unseen: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(encoder), max_seq_length=64)
    oracle = SentenceTransformer(modules=[transformer, Pooling(384, "mean")], device="cpu")
    texts = [*unseen.texts[:9], "Short.", LONG]  # of different lengths: padding must not count
    expected = oracle.encode(texts)
    model = open_model(encoder)
    output = answer(model, texts)
    np.testing.assert_allclose(output.embeddings, expected, atol=1e-4)
    head = load_file(encoder / "head.safetensors")
    np.testing.assert_allclose(output.logits, expected @ head["weight"].T + head["bias"], atol=1e-3)
    assert accuracy(model, unseen) >= 0.8


def test_bf16_stays_close(encoder: Path, unseen: Any, copy: Any) -> None:
    half = open_model(edit_card(copy(encoder), precision="bf16"))
    expected = answer(open_model(encoder), unseen.texts[:20])
    logits = answer(half, unseen.texts[:20]).logits
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected.logits).max() < 0.5


def test_onnx_agrees_with_torch_and_int8_with_both(encoder: Path, onnx: Path, onnx_int8: Path, unseen: Any) -> None:
    texts = [*unseen.texts[:9], "Short.", LONG]
    graph, quantized = open_model(onnx), open_model(onnx_int8)
    np.testing.assert_allclose(answer(graph, texts).logits, answer(open_model(encoder), texts).logits, atol=1e-3)
    assert not graph.embeds
    assert answer(graph, texts).embeddings is None
    assert accuracy(quantized, unseen) >= 0.75
    assert quantized.size < 0.5 * graph.size


def test_a_graph_with_an_output_for_embeddings_can_embed(encoder: Path, onnx: Path, copy: Any, unseen: Any) -> None:
    import onnx as graphs

    folder = copy(onnx)
    graph = graphs.load(folder / "model.onnx")
    head = next(node for node in graph.graph.node if "logits" in node.output)
    graph.graph.node.append(graphs.helper.make_node("Identity", [head.input[0]], ["embeddings"]))
    shape = ["batch", 384]
    graph.graph.output.append(graphs.helper.make_tensor_value_info("embeddings", graphs.TensorProto.FLOAT, shape))
    graphs.save(graph, folder / "model.onnx")
    model = open_model(folder)
    assert model.embeds
    expected = answer(open_model(encoder), unseen.texts[:5]).embeddings
    np.testing.assert_allclose(answer(model, unseen.texts[:5]).embeddings, expected, atol=1e-4)


def test_texts_are_cut_at_max_tokens(encoder: Path, tfidf: Any) -> None:
    model = open_model(encoder)
    assert model.tokenize(LONG).tokens == 64
    assert model.tokenize("Short.").tokens == 4  # [CLS] short . [SEP]
    assert open_model(tfidf[0]).tokenize(LONG).tokens == 1600  # words: this structure has no limit


@pytest.mark.parametrize(("fixture", "absent"), [
    ("tfidf_int8", {"torch", "transformers", "onnxruntime", "sklearn", "scipy", "tokenizers"}),
    ("onnx_int8", {"torch", "transformers", "sklearn", "scipy"}),
])  # fmt: skip
def test_a_process_loads_only_what_its_model_needs(fixture: str, absent: set[str], request: Any) -> None:
    folder = request.getfixturevalue(fixture)
    code = ("import sys, kernelm_encoder.plugin; from pathlib import Path; from kernelm_encoder.model import open_model; "
            "open_model(Path(sys.argv[1])); print(*sys.modules)")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert "kernelm_encoder.model" in (loaded := set(result.stdout.split()))
    assert not absent & loaded


def test_an_idle_process_has_no_library_of_arrays() -> None:
    code = "import sys, kernelm_encoder.plugin, kernelm_encoder.measuring; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kernelm_encoder.plugin" in (loaded := set(result.stdout.split()))
    assert not {"torch", "transformers", "onnxruntime", "sklearn", "numpy", "pyarrow", "tokenizers"} & loaded


class Bomb:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "extra.dat"])
def test_pickles_are_refused_by_name_and_by_content(name: str, tfidf: Any, copy: Any, tmp_path: Path) -> None:
    folder, trace = copy(tfidf[0]), tmp_path / "exploded"
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ClientFault, match=name) as caught:
        open_model(folder)
    assert caught.value.code == "unsafe_file"
    assert not trace.exists()


def test_a_zipped_pickle_is_refused(tfidf: Any, copy: Any) -> None:
    folder = copy(tfidf[0])
    with zipfile.ZipFile(folder / "weights.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    with pytest.raises(ClientFault, match=r"weights\.zip"):
        open_model(folder)


def test_a_safetensors_header_of_640_bytes_is_no_pickle(tfidf: Any, copy: Any) -> None:
    from safetensors.numpy import load_file, save_file

    folder = copy(tfidf[0])
    path = folder / "linear.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {"a": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, {"a": "x" * (640 - length)})
    assert path.read_bytes()[:9] == b"\x80\x02\0\0\0\0\0\0{"
    assert open_model(folder).size > 0


def refused(folder: Path) -> str:
    with pytest.raises(ClientFault) as caught:
        open_model(folder)
    assert caught.value.code == "invalid_model"
    assert caught.value.remedy
    return caught.value.message


def test_a_bad_card_is_refused(tfidf: Any, copy: Any) -> None:
    folder = copy(tfidf[0])
    assert "structure" in refused(edit_card(folder, structure="decoder"))
    assert "labels" in refused(edit_card(folder, structure="tfidf-linear", labels=["a", "a"]))
    assert "ngrams" in refused(edit_card(folder, labels=["a", "b", "c", "d", "e"], request={}))
    (folder / "model.json").write_text("{")
    assert "model.json" in refused(folder)
    (folder / "model.json").unlink()
    assert "model.json" in refused(folder)


def test_labels_that_do_not_fit_the_weights_are_refused(tfidf: Any, encoder: Path, onnx: Path, tmp_path: Path) -> None:
    for source, name in ((tfidf[0], "linear.safetensors"), (encoder, "head.safetensors"), (onnx, "model.onnx")):
        folder = Path(shutil.copytree(source, tmp_path / name))
        assert name in refused(edit_card(folder, labels=["one", "two"]))


def test_missing_and_truncated_weights_are_refused(tfidf: Any, encoder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tfidf[0], tmp_path / "tfidf"))
    tensors = load_file(folder / "linear.safetensors")
    save_file({"weight": tensors["weight"], "bias": tensors["bias"]}, folder / "linear.safetensors")
    assert "`idf` is missing" in refused(folder)
    (folder / "linear.safetensors").write_bytes((tfidf[0] / "linear.safetensors").read_bytes()[:1000])
    assert "linear.safetensors" in refused(folder)

    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layer.1" in name)
    save_file({name: array for name, array in tensors.items() if name != lost}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    assert lost in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(folder)


def test_broken_parts_of_encoders_are_refused(encoder: Path, onnx: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    assert "512" in refused(edit_card(folder, max_tokens=513))
    assert "precision" in refused(edit_card(folder, max_tokens=64, precision="int8"))
    edit_card(folder, precision="fp32")
    (folder / "head.safetensors").unlink()
    assert "head.safetensors" in refused(folder)
    folder = Path(shutil.copytree(onnx, tmp_path / "onnx"))
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(folder)
    (folder / "model.onnx").write_bytes(b"\x08\x07not a graph")
    assert "model.onnx" in refused(folder)


def test_a_vocabulary_with_a_gap_is_refused(tfidf: Any, copy: Any) -> None:
    folder = copy(tfidf[0])
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary[next(iter(vocabulary))] = len(vocabulary)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    assert "vocabulary.json" in refused(folder)
