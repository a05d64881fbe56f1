import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel

from kernelm_sdk.errors import ClientFault
from kernelm_trainer import encoder, pretrained
from kernelm_trainer.batches import padded
from kernelm_trainer.corpus import Corpus, read_corpus


@pytest.fixture(scope="module")
def corpus(news: Path) -> Corpus:
    return read_corpus(news, True, ("train", "validation", "test"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "old/weights.pt", "optimizer.pkl", "last.CKPT"])
def test_a_pickle_is_refused_before_anything_is_loaded(tiny_bert: Path, copy, corpus: Corpus, name: str) -> None:
    folder = copy(tiny_bert)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ClientFault, match="is a pickle") as caught:
        encoder.load(folder, corpus, 0, 0.1)
    assert caught.value.code == "pickle_refused"
    assert name in caught.value.message


@pytest.mark.parametrize("name", pretrained.NEEDED)
def test_an_incomplete_base_is_refused_and_the_file_named(tiny_bert: Path, copy, corpus: Corpus, name: str) -> None:
    folder = copy(tiny_bert)
    (folder / name).unlink()
    with pytest.raises(ClientFault, match=f"{name} is missing") as caught:
        encoder.load(folder, corpus, 0, 0.1)
    assert caught.value.code == "invalid_base"


def _edit_config(**fields: object):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return change


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["instead"] = content["model"]["vocab"].pop("the")
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("damage", "named"), [
    (_drop_tensor, "encoder.layer.1.output.dense.weight"),
    (_cut_weights, "model.safetensors"),
    (_edit_config(model_type="no-such-model"), "config.json"),
    (_edit_config(is_decoder=True), "no encoder"),
    (_edit_config(max_position_embeddings=32), "max_tokens is 48, the base has 32 positions"),
    (_other_tokenizer, "another vocabulary"),
])  # fmt: skip
def test_a_base_that_does_not_fit_is_refused(tiny_bert: Path, copy, corpus: Corpus, damage, named: str) -> None:
    folder = copy(tiny_bert)
    damage(folder)
    with pytest.raises(ClientFault) as caught:
        encoder.load(folder, corpus, 0, 0.1)
    assert named in caught.value.message
    assert caught.value.remedy


def test_the_first_layers_are_kept(tiny_bert: Path, corpus: Corpus) -> None:
    one = encoder.load(tiny_bert, corpus, 1, 0.1)
    assert one.encoder.config.num_hidden_layers == len(one.encoder.encoder.layer) == 1
    stored = load_file(tiny_bert / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert torch.equal(one.encoder.encoder.layer[0].output.dense.weight, stored)
    with pytest.raises(ClientFault, match="layers is 3, the base has 2"):
        encoder.load(tiny_bert, corpus, 3, 0.1)


def test_padding_does_not_change_logits(tiny_bert: Path, corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = encoder.load(tiny_bert, corpus, 0, 0.1).eval()
    short, long = corpus.splits["test"].input_ids[0][:9], corpus.splits["test"].input_ids[1]
    alone = model(*padded([short], 0))
    beside = model(*padded([short, long], 0))
    assert torch.allclose(alone[0], beside[0], atol=1e-6)
    rows = [short, long, short]
    assert np.allclose(encoder.run(model, rows, 2, 0, lambda _: None)[[0, 2]], alone.detach().numpy(), atol=1e-6)


def test_a_written_model_is_rebuilt_from_the_contract_alone(tiny_bert: Path, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = encoder.load(tiny_bert, corpus, 0, 0.1).eval()
    encoder.write(model, tmp_path, corpus, tiny_bert)
    text = "Shares of the company rose after the bank cut its forecast. " * 20
    ids = torch.tensor([Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids])
    assert ids.shape == (1, corpus.card.max_tokens)
    head = load_file(tmp_path / "head.safetensors")
    rebuilt = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        mean = rebuilt(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
        assert torch.allclose(mean @ head["weight"].T + head["bias"], model(ids, torch.ones_like(ids)), atol=1e-6)
    assert rebuilt.config.id2label == dict(enumerate(corpus.labels))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in pretrained.PICKLES]
