"""Compressions of real small models: what is left computes, is smaller, has its figures in its card, and outlives who makes it."""

import json
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from kernelm_contracts.optimizer import CompressRequest, Prune
from kernelm_contracts.trainer import ModelCard, TrainRequest
from kernelm_optimizer import causal, pruning
from kernelm_optimizer.compress import FORMAT, checked
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.integers import load_causal
from kernelm_sdk.errors import ClientFault

RECOVER = TrainRequest("", max_steps=30, epochs=9, learning_rate=2e-3)


@pytest.mark.parametrize(("method", "smaller"), [("int8", 0.3), ("int4", 0.3)])
async def test_integers_are_smaller_and_say_nearly_the_same(here, method, smaller):
    found = await here.compress(method)
    card = read_card(folder := here.artifacts[found.model][1])
    assert card.precision == method
    weights = (folder / "model.safetensors").stat().st_size
    assert weights < smaller * (here.artifacts["sha256:model"][1] / "model.safetensors").stat().st_size
    assert found.before.scores.tokens == found.after.scores.tokens > 0
    assert abs(found.change.difference) < {"int8": 0.01, "int4": 0.2}[method]
    assert found.change.low <= found.change.difference <= found.change.high
    assert found.change.text in card.notes
    assert card.scores["validation"] == found.after.scores
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        one, other = (load_causal(here.artifacts[d][1])(ids).logits.float() for d in ("sha256:model", found.model))
    assert (one.argmax(-1) == other.argmax(-1)).float().mean() > 0.7


async def test_what_is_pruned_recovers(here, real):
    found = await here.compress("prune", prune=Prune(0.34, 0.5, 0.5), train=RECOVER)
    config = json.loads((here.artifacts[found.model][1] / "config.json").read_text())
    assert {name: config[name] for name in real.LLAMA} == real.LLAMA | {
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    assert found.after.bytes < found.before.bytes
    assert found.without.scores.loss > found.after.scores.loss, "it was worse before it was trained again"
    assert found.gain.significant
    assert any("before its recovery" in note for note in read_card(here.artifacts[found.model][1]).notes)


async def test_a_model_of_terms_becomes_integers(here, tfidf):
    here.artifacts["sha256:model"] = ("model", tfidf, {})
    found = await here.compress("int8")
    assert read_card(here.artifacts[found.model][1]).precision == "int8"
    assert found.after.bytes < found.before.bytes
    assert found.change.figure == "accuracy"


def test_what_goes_is_what_does_least(causal_lm, corpus, tmp_path):
    """Units and heads whose weights are nothing: without them the model says the same."""
    whole = AutoModelForCausalLM.from_pretrained(causal_lm)
    for layer in whole.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
        layer.self_attn.o_proj.weight.data[:, 32:] = 0
    whole.save_pretrained(tmp_path / "whole")
    rows = causal.rows(corpus, "train", 4)
    pruning.prune(tmp_path / "whole", tmp_path / "less", read_card(causal_lm), Prune(heads=0.5, width=0.5), rows)
    less, missing = AutoModelForCausalLM.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert not missing["missing_keys"]
    with torch.inference_mode():
        assert torch.allclose(whole(rows[0][None]).logits, less(rows[0][None]).logits, atol=1e-4)
    assert sum(p.numel() for p in less.parameters()) == read_card(tmp_path / "less").parameters


async def test_a_student_is_measured_beside_one_without_a_teacher(here, real):
    small = real.LLAMA | {"hidden_size": 32, "num_hidden_layers": 1}
    found = await here.compress("distill", train=TrainRequest("", architecture=small, max_steps=60, epochs=9, learning_rate=5e-3))
    assert here.trainings == 2
    assert found.gain.difference == pytest.approx(found.after.scores.loss - found.without.scores.loss)
    assert found.after.bytes < found.before.bytes
    assert read_card(here.artifacts[found.model][1]).request["teacher"]["model"] == "sha256:model"


async def test_who_takes_over_makes_nothing_again(here, monkeypatch):
    job = here.job()

    def dies(*_: Any) -> Any:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(causal, "measured", dies)
        with pytest.raises(RuntimeError, match="killed"):
            await here.compress("prune", job, prune=Prune(width=0.5), train=RECOVER)
    assert here.trainings == 1
    assert here.passing == {d for d, (kind, *_) in here.artifacts.items() if kind == "checkpoint"} >= {job.checkpoint}
    monkeypatch.setattr(pruning, "prune", dies)
    found = await here.compress("prune", here.job(2, job.checkpoint), prune=Prune(width=0.5), train=RECOVER)
    assert here.trainings == 1
    assert found.after.bytes < found.before.bytes


async def test_a_checkpoint_of_another_version_is_left_alone_and_a_broken_one_is_named(here):
    other = await here.checkpoint(FORMAT + 1, compression='{"models": ["after"]}')
    assert (await here.compress("int8", here.job(2, other))).after.bytes > 0
    with pytest.raises(ClientFault, match=r"compression\.json") as raised:
        await here.compress("int8", here.job(3, await here.checkpoint(FORMAT, compression='{"models": ')))
    assert raised.value.code == "invalid_checkpoint"


async def test_a_budget_that_is_too_small_is_said(here, monkeypatch):
    async def never(_: Any) -> None:
        return None

    monkeypatch.setattr(here, "train", never)
    with pytest.raises(ClientFault, match="was spent with 40 % of the training done") as raised:
        await here.compress("prune", prune=Prune(width=0.5), train=RECOVER, budget_s=0.01)
    assert raised.value.code == "budget_too_small"
    assert {record.state for record in here.jobs.values()} == {"cancelled"}


@pytest.mark.parametrize(("fields", "words"), [
    ({"method": "int8", "budget_s": 0.0}, "budget_s is 0.0"),
    ({"method": "int8", "budget_s": float("nan")}, "budget_s is nan"),
    ({"method": "int8", "rounds": 0}, "rounds is 0"),
    ({"method": "prune"}, "method 'prune' with prune"),
    ({"method": "prune", "prune": Prune(layers=1.0)}, "prune.layers is 1.0"),
    ({"method": "int8", "prune": Prune(width=0.5)}, "method 'int8' with prune"),
    ({"method": "int4", "train": RECOVER}, "trains nothing"),
    ({"method": "distill"}, "has no train"),
    ({"method": "int4", "activations": "static"}, "method 'int4' with activations 'static'"),
    ({"method": "int8", "model": ""}, "model or dataset is empty"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ClientFault, match=words) as raised:
        checked(CompressRequest(**{"model": "sha256:m", "dataset": "sha256:d", **fields}))
    assert raised.value.code == "invalid"


def test_an_unknown_method_is_refused_by_the_contract():
    with pytest.raises(msgspec.ValidationError, match=r"Invalid enum value 'magic' - at `\$.method`"):
        msgspec.convert({"model": "m", "dataset": "d", "method": "magic"}, CompressRequest)


async def test_models_that_can_t_be_compressed_so_are_refused(here, tfidf, tmp_path):
    with pytest.raises(ClientFault, match="activations of a causal-lm in int8 stay bfloat16"):
        await here.compress("int8", activations="static")
    here.artifacts["sha256:model"] = ("model", tfidf, {})
    with pytest.raises(ClientFault, match="a tfidf-linear is not made smaller by 'int4'") as raised:
        await here.compress("int4")
    assert raised.value.remedy == "take int8"
    (tmp_path / "dataset").mkdir()
    here.artifacts["sha256:corpus"] = ("dataset", tmp_path / "dataset", {})
    with pytest.raises(ClientFault, match="'train' has no documents to show the ranges"):
        await here.compress("int8", activations="static")
    BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
              add_pooling_layer=False).save_pretrained(tmp_path / "bert")  # fmt: skip
    card = ModelCard("b", "text-classification", "encoder", ("a", "b"), 16)
    rows = [torch.arange(8)]
    with pytest.raises(ClientFault, match="can't say that heads are missing"):
        pruning.prune(tmp_path / "bert", tmp_path / "out", card, Prune(heads=0.5), rows)
    pruning.prune(tmp_path / "bert", tmp_path / "less", card, Prune(layers=0.5, width=0.5), rows)
    found, info = BertModel.from_pretrained(tmp_path / "less", add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert (len(found.encoder.layer), found.config.intermediate_size) == (1, 32)


async def test_integers_are_not_made_of_integers(here):
    found = await here.compress("int8")
    here.artifacts["sha256:model"] = here.artifacts[found.model]
    with pytest.raises(ClientFault, match="it is int8 already"):
        await here.compress("int4")
    with pytest.raises(ClientFault, match="can't be pruned"):
        await here.compress("prune", prune=Prune(width=0.5))
