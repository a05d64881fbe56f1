import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from kernelm_optimizer.folder import read_card
from kernelm_optimizer.quantize import export, load_classifier, quantize
from kernelm_sdk.errors import ClientFault


def test_tfidf_keeps_its_form_and_its_answers(real, tfidf, tmp_path):
    made = quantize(tfidf, tmp_path / "int8")
    texts, labels = real.news(80)
    before, after = real.tfidf_logits(tfidf, texts), real.tfidf_logits(tmp_path / "int8", texts)
    tensors, original = load_file(tmp_path / "int8" / "linear.safetensors"), load_file(tfidf / "linear.safetensors")
    assert tensors["weight"].dtype == np.int8
    assert tensors["scale"].shape == (len(real.LABELS),)
    error = np.abs(tensors["weight"] * tensors["scale"][:, None] - original["weight"])
    assert (error <= tensors["scale"][:, None] * 0.5001).all()  # half a level
    assert (before.argmax(1) == labels).mean() > 0.9
    assert abs((after.argmax(1) == labels).mean() - (before.argmax(1) == labels).mean()) <= 0.005
    assert made.bytes_after < 0.6 * made.bytes_before
    card = read_card(tmp_path / "int8")
    assert (card.precision, card.format, card.scores) == ("int8", "safetensors", {})
    assert card.labels == real.LABELS


def test_a_label_without_weights_does_not_divide_by_zero(tfidf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tfidf, source)
    tensors = load_file(source / "linear.safetensors")
    tensors["weight"][2] = 0
    save_file(tensors, source / "linear.safetensors")
    quantize(source, tmp_path / "int8", reduce_range=True)
    made = load_file(tmp_path / "int8" / "linear.safetensors")
    assert np.isfinite(made["scale"]).all()
    assert not made["weight"][2].any()
    assert np.abs(made["weight"].astype(int)).max() == 63


@pytest.fixture(scope="module")
def int8(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    quantize(encoder, folder)
    return folder


def run(path: Path, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits", "embeddings"], {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 512), (5, 33)])
def test_the_int8_graph_takes_any_shape_and_stays_close(real, encoder, int8, batch, tokens):
    ids = np.random.default_rng(1).integers(1000, 20000, (batch, tokens))
    mask = np.ones_like(ids)
    mask[batch // 2, tokens // 2 + 1:] = 0
    logits, embeddings = run(int8 / "model.onnx", ids, mask)
    with torch.inference_mode():
        expected = [t.numpy() for t in load_classifier(encoder)(torch.from_numpy(ids), torch.from_numpy(mask))]
    assert logits.shape == (batch, len(real.LABELS))
    assert np.abs(logits - expected[0]).max() < 0.1 * np.abs(expected[0]).max()
    cosine = (embeddings * expected[1]).sum(1) / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(expected[1], axis=1)
    assert cosine.min() > 0.99


def test_the_folder_holds_what_the_server_needs_and_nothing_of_the_old_weights(encoder, int8):
    assert {p.name for p in int8.iterdir()} == {"model.json", "model.onnx", "config.json", "tokenizer.json"}
    made = read_card(int8)
    assert made == msgspec.structs.replace(read_card(encoder), precision="int8", format="onnx")


def test_the_graph_is_int8_and_free_of_paths(int8):
    body = (int8 / "model.onnx").read_bytes()
    operators = {node.op_type for node in onnx.load_from_string(body).graph.node}
    assert "MatMulInteger" in operators
    assert b"site-packages" not in body
    assert str(Path.cwd()).encode() not in body
    linear = [i for i in onnx.load_from_string(body).graph.initializer if len(i.dims) == 2]
    assert {i.data_type for i in linear if i.dims[0] * i.dims[1] > 10_000} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


@pytest.fixture(scope="module")
def static(real, encoder, tmp_path_factory) -> Path:
    """With ranges of activations that 16 articles have shown."""
    folder = tmp_path_factory.mktemp("static") / "model"
    quantize(encoder, folder, texts=real.news(8)[0][::3])
    return folder


def test_static_ranges_make_an_answer_independent_of_its_neighbours(real, encoder, int8, static):
    tokenizer = Tokenizer.from_file(str(real.MINILM / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    encoded = tokenizer.encode_batch([*real.news(10)[0][8::10], "one " * 70])  # the last is unlike the others
    ids, mask = (np.array([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    with torch.inference_mode():
        expected = load_classifier(encoder)(torch.from_numpy(ids), torch.from_numpy(mask))[0].numpy()
    moved = {}
    for name, folder in (("dynamic", int8), ("static", static)):
        together = run(folder / "model.onnx", ids, mask)[0]
        alone = np.concatenate([run(folder / "model.onnx", ids[i : i + 1], mask[i : i + 1])[0] for i in range(len(ids))])
        moved[name] = np.abs(together - alone).max()
        assert np.abs(alone - expected)[:-1].max() < 0.1 * np.abs(expected).max()
    assert moved["static"] < 0.1 * moved["dynamic"]
    assert read_card(static) == read_card(int8)


def test_padding_does_not_change_the_exported_fp32_graph(encoder, tmp_path):
    onnx.save(export(load_classifier(encoder)), tmp_path / "fp32.onnx")
    ids = np.random.default_rng(2).integers(1000, 20000, (1, 20))
    alone = run(tmp_path / "fp32.onnx", ids, np.ones_like(ids))
    padded = run(tmp_path / "fp32.onnx", np.pad(ids, ((0, 0), (0, 30))), np.pad(np.ones_like(ids), ((0, 0), (0, 30))))
    for a, b in zip(alone, padded, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(encoder, int8, tmp_path):
    quantize(encoder, tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (int8 / "model.onnx").read_bytes()


def test_what_is_no_model_or_int8_already_is_refused(encoder, int8, tmp_path):
    with pytest.raises(ClientFault, match=r"model.json: .*No such file"):
        quantize(tmp_path, tmp_path / "out")
    with pytest.raises(ClientFault, match="it is int8 onnx already"):
        quantize(int8, tmp_path / "out")
    (tmp_path / "model.json").write_text('{"name": 3}')
    with pytest.raises(ClientFault, match="Expected `str`, got `int`"):
        quantize(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranges_are_of_what_has_them_and_only_classifiers_of_texts_become_int8(real, tfidf, encoder, tmp_path):
    with pytest.raises(ClientFault, match="no activations with ranges") as raised:
        quantize(tfidf, tmp_path / "out", texts=["a text"])
    assert raised.value.code == "invalid_model"
    shutil.copytree(encoder, tmp_path / "entities")
    card = msgspec.structs.replace(read_card(encoder), task="token-classification")
    (tmp_path / "entities" / "model.json").write_bytes(msgspec.json.encode(card))
    with pytest.raises(ClientFault, match="its task is token-classification"):
        quantize(tmp_path / "entities", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(real: SimpleNamespace, encoder: Path, tmp_path: Path, name: str) -> Path:
    source = tmp_path / "broken"
    shutil.copytree(encoder, source)
    path = source / name
    if name == "model.json":
        path.write_bytes(real.card("encoder").replace(b'"sports",', b""))
        return source
    if name == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 7}))  # the weights have 6
        return source
    path.unlink()
    return source


@pytest.mark.parametrize(("name", "message"), [
    ("model.json", "head.safetensors has 5 rows, model.json 4 labels"),
    ("config.json", r"model.safetensors has no tensor 'encoder.layer.6"),
    ("model.safetensors", "model.safetensors is missing"),
    ("head.safetensors", r"head.safetensors: "),
])
def test_a_broken_encoder_is_refused_by_name(real, encoder, tmp_path, name, message):
    with pytest.raises(ClientFault, match=message) as raised:
        quantize(broken(real, encoder, tmp_path, name), tmp_path / "out")
    assert raised.value.code == "invalid_model"


@pytest.mark.slow
def test_all_of_minilm_keeps_its_accuracy_on_news(real, tmp_path):
    """At most 0.5 points on 250 articles, with a head that was fitted to other 250."""
    from sklearn.linear_model import LogisticRegression

    real.write_encoder(tmp_path / "fp32", layers=6)
    tokenizer = Tokenizer.from_file(str(real.MINILM / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.no_padding()
    texts, labels = real.news(100)
    rows = [np.array([e.ids]) for e in tokenizer.encode_batch(texts)]
    classifier = load_classifier(tmp_path / "fp32")
    with torch.inference_mode():
        before = np.concatenate([classifier(t, torch.ones_like(t))[1].numpy() for t in map(torch.from_numpy, rows)])
    train = np.arange(len(labels)) % 2 == 0
    head = LogisticRegression(max_iter=1000).fit(before[train], labels[train])
    save_file({"weight": np.ascontiguousarray(head.coef_, np.float32), "bias": head.intercept_.astype(np.float32)},
              tmp_path / "fp32" / "head.safetensors")
    made = quantize(tmp_path / "fp32", tmp_path / "int8")
    session = onnxruntime.InferenceSession(tmp_path / "int8" / "model.onnx", providers=["CPUExecutionProvider"])
    after = np.concatenate([session.run(["logits"], {"input_ids": r, "attention_mask": np.ones_like(r)})[0] for r in rows])
    accuracy = (head.predict(before[~train]) == labels[~train]).mean()
    assert accuracy > 0.93
    assert (after.argmax(1) == labels)[~train].mean() >= accuracy - 0.005
    assert made.bytes_after < 0.3 * made.bytes_before
