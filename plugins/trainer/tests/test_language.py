import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from textdata import LLAMA, tiny, write_lines, write_packed
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kernelm_contracts.trainer import Adapter, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import loop, packed
from kernelm_trainer.chats import NO_LOSS, encode
from kernelm_trainer.language import Causal
from kernelm_trainer.lines import Chat, Turn
from kernelm_trainer.loop import Training
from kernelm_trainer.training import Folders, train

SCRATCH = TrainRequest("sha256:d", structure="causal-lm", architecture=LLAMA, epochs=1, batch_size=8, learning_rate=3e-3,
                       precision="fp32", schedule="cosine")  # fmt: skip
CHATS = TrainRequest("sha256:d", base="sha256:b", structure="causal-lm", epochs=2, batch_size=4, learning_rate=3e-3,
                     precision="fp32")  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = [(f"say {n % 7}", f"{n % 7}!") for n in range(40)]
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said]
    return write_lines(tmp_path_factory.mktemp("chats"), lines)


def causal(request: TrainRequest, folder: Path, base: Path | None, work: Path) -> Causal:
    return Causal(request, folder, base, ("train", "validation"), work)


def test_a_language_model_from_scratch_learns_and_is_a_hugging_face_folder(corpus: Path, tmp_path: Path, recorder) -> None:
    outcome = train(SCRATCH, Folders(corpus, tmp_path), recorder)
    scores = outcome.card.scores["validation"]
    losses = [m["loss"] for _, phase, _, m in recorder.reports if phase.startswith("train")]
    assert abs(losses[0] - math.log(512)) < 0.5
    assert scores.loss < losses[0] - 0.5
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert scores.intervals["perplexity"].low < scores.perplexity < scores.intervals["perplexity"].high
    assert outcome.card.task == "text-generation"
    assert {p.name for p in outcome.folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "model.json",
        "evaluation.json", "card.md"}  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(outcome.folder), AutoTokenizer.from_pretrained(outcome.folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = packed.read_packed(corpus, "test", 0, tmp_path / "again")
    total = count = 0.0
    for i in range(len(rows)):  # the contract's perplexity, by transformers' own loss
        ids = torch.from_numpy(rows.row(i))[None]
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert outcome.card.scores["test"].loss == pytest.approx(total / count, rel=1e-5)
    assert outcome.card.scores["test"].tokens == count


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"micro_batch": 3}, {"gradient_checkpointing": True},
                                    {"evaluate_every": 5, "max_steps": 17}])  # fmt: skip
def test_a_language_model_resumes_bit_for_bit(change: dict, corpus: Path, tmp_path: Path, recorder_class, monkeypatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    request = msgspec.structs.replace(SCRATCH, checkpoint_every_s=0.0, **{"max_steps": 12, **change})
    whole = Training(request, causal(request, corpus, None, tmp_path / "a"), tmp_path / "a", recorder_class(tmp_path / "n"), None)
    expected = whole.run()
    stopped = recorder_class(tmp_path / "kept", 7)
    with pytest.raises(stopped.Stopped):
        Training(request, causal(request, corpus, None, tmp_path / "b"), tmp_path / "b", stopped, None).run()
    resumed = Training(request, causal(request, corpus, None, tmp_path / "c"), tmp_path / "c", recorder_class(tmp_path / "m"),
                       stopped.checkpoints[-1])  # fmt: skip
    assert resumed.run().validation == expected.validation
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.model.named_parameters())


def test_accumulated_gradients_are_those_of_the_whole_batch(corpus: Path, tmp_path: Path, recorder) -> None:
    found = []
    for size in (8, 3):
        request = msgspec.structs.replace(SCRATCH, micro_batch=size, max_steps=1)
        training = Training(request, causal(request, corpus, None, tmp_path / str(size)), tmp_path, recorder, None)
        found.append((*training.gradients(training.batches()[0]), [p.grad.clone() for p in training.model.parameters()]))
    (loss, norm, gradients), (other_loss, other_norm, others) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert norm == pytest.approx(other_norm, rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))


def test_a_trained_model_is_gone_on_with(corpus: Path, tmp_path: Path, recorder) -> None:
    first = train(msgspec.structs.replace(SCRATCH, report_test=False), Folders(corpus, tmp_path / "a"), recorder)
    request = msgspec.structs.replace(SCRATCH, base="sha256:b", architecture={}, learning_rate=1e-3, report_test=False)
    second = train(request, Folders(corpus, tmp_path / "b", first.folder), recorder)
    assert second.card.scores["validation"].loss < first.card.scores["validation"].loss


def test_chats_have_a_loss_on_the_answers_alone(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    turns = [("system", "be short"), ("user", "one?"), ("assistant", "two"), ("user", "and"), ("assistant", "three")]
    chat = Chat(tuple(Turn(*turn) for turn in turns))
    ids, labels = encode(chat, tokenizer, "here")
    assert tokenizer.decode(ids) == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert tokenizer.decode(ids[labels != NO_LOSS]) == "two<|im_end|>\nthree<|im_end|>\n"


def test_a_template_of_the_base_is_used_and_kept(llama: Path, copy, chats: Path, tmp_path: Path, recorder) -> None:
    base = copy(llama)
    template = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    outcome = train(CHATS, Folders(chats, tmp_path, base), recorder)
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder)
    assert tokenizer.chat_template == template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[user]x[end]"
    losses = [m["loss"] for _, phase, _, m in recorder.reports if phase.startswith("train")]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_learns_and_answers_on_top_of_its_base(merge: bool, llama: Path, chats: Path, tmp_path: Path, recorder) -> None:
    request = msgspec.structs.replace(CHATS, adapter=Adapter(rank=4, merge=merge), learning_rate=1e-2)
    outcome = train(request, Folders(chats, tmp_path, llama), recorder)
    losses = [m["loss"] for _, phase, _, m in recorder.reports if phase.startswith("train")]
    assert losses[-1] < losses[0]
    assert outcome.card.adapter is not merge
    said = AutoTokenizer.from_pretrained(outcome.folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert said == "<|im_start|>user\nx<|endoftext|>\n"
    names = {p.name for p in outcome.folder.iterdir()}
    base = load_file(llama / "model.safetensors")
    if merge:
        model = AutoModelForCausalLM.from_pretrained(outcome.folder)
        assert "adapter_config.json" not in names
    else:
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "model.json"} <= names
        assert "model.safetensors" not in names
        assert outcome.card.base == json.loads((outcome.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), outcome.folder).merge_and_unload()
    moved = model.state_dict()
    assert not torch.equal(moved["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(moved["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_pairs_of_texts_train_a_sequence_to_sequence_model(tmp_path: Path, recorder) -> None:
    base = tiny(tmp_path / "base", "t5")
    words = ["bank", "goal", "film", "party", "phone"]
    lines = [{"source": f"{words[n % 5]} {words[n % 3]}", "target": f"{words[n % 3]} {words[n % 5]}"} for n in range(60)]
    request = TrainRequest("sha256:d", base="sha256:b", structure="seq2seq-lm", epochs=6, batch_size=8, learning_rate=1e-2)
    outcome = train(request, Folders(write_lines(tmp_path / "pairs", lines), tmp_path / "work", base), recorder)
    losses = [m["loss"] for _, phase, _, m in recorder.reports if phase.startswith("train")]
    assert outcome.card.scores["validation"].loss < losses[0] - 1
    assert outcome.card.task == "text2text-generation"
    assert AutoModelForSeq2SeqLM.from_pretrained(outcome.folder).config.model_type == "t5"


def test_packed_sequences_are_read_across_files_and_cut(corpus: Path, tmp_path: Path) -> None:
    rows = packed.read_packed(corpus, "train", 0, tmp_path / "a")
    cut = packed.read_packed(corpus, "train", 10, tmp_path / "b")
    assert packed.longest(rows) == 32
    assert packed.longest(cut) == 10
    assert np.concatenate([cut.row(i) for i in range(4)]).tolist() == rows.row(0).tolist()
    first = Tokenizer.from_file(str(corpus / "tokenizer.json")).decode(rows.row(0).tolist())
    assert len(first.split()) > 5


def _remove(name: str):
    return lambda folder: [path.unlink() for path in folder.glob(name)]


@pytest.mark.parametrize(("damage", "change", "named"), [
    (_remove("packed/validation/*"), {}, "packed/validation"),
    (_remove("tokenizer.json"), {}, "tokenizer.json"),
    (lambda f: (f / "packed/train/00000.parquet").write_bytes(b"PAR1"), {}, "packed/train/00000.parquet"),
    (None, {"architecture": LLAMA | {"max_position_embeddings": 16}}, "has 32 tokens, the model takes 16"),
    (None, {"architecture": LLAMA | {"model_type": "no-such"}}, "architecture"),
    (None, {"architecture": LLAMA | {"vocab_size": 100}}, "vocab_size is 100, the tokenizer has 512"),
])  # fmt: skip
def test_corpora_and_architectures_that_do_not_fit_are_refused(
    damage, change: dict, named: str, corpus: Path, copy, tmp_path: Path, recorder
) -> None:  # fmt: skip
    folder = copy(corpus)
    if damage:
        damage(folder)
    with pytest.raises(ClientFault) as caught:
        train(msgspec.structs.replace(SCRATCH, **change), Folders(folder, tmp_path / "work"), recorder)
    assert named in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(("line", "named"), [
    ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the role assistant"),
    ('{"messages": 3}', "messages"),
    ("{", "train.jsonl:1"),
    ('{"messages": [{"role": "assistant", "content": "' + "long " * 200 + '"}]}', "tokens, the model takes 64"),
    ("", "has no lines"),
])  # fmt: skip
def test_bad_lines_are_refused_by_file_and_number(
    line: str, named: str, llama: Path, chats: Path, copy, tmp_path: Path, recorder
) -> None:  # fmt: skip
    folder = copy(chats)
    (folder / "train.jsonl").write_text(line + "\n")
    with pytest.raises(ClientFault) as caught:
        train(CHATS, Folders(folder, tmp_path / "work", llama), recorder)
    assert named in caught.value.message
    assert "train.jsonl" in caught.value.message
