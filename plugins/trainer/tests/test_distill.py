"""Students that learn from a teacher's logits: the loss by its formula, what they become, and teachers that can't teach."""

import json
from pathlib import Path

import pytest
import textdata
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kernelm_contracts.trainer import Teacher, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer.demand import check_request
from kernelm_trainer.distill import Lessons
from kernelm_trainer.packed import read_packed
from kernelm_trainer.training import Folders, train
from kernelm_trainer.workers import silent

SMALL = textdata.LLAMA | {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}


def test_the_loss_is_that_of_hinton_vinyals_and_dean():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7)
    p, q = ((logits / 3.0).softmax(-1) for logits in (teacher, student))
    expected = 0.25 * 2.0 + 0.75 * 9.0 * float((p * (p.log() - q.log())).sum())
    found = Lessons(nn.Linear(1, 1), Teacher("", 0.75, 3.0)).mixed(torch.tensor(2.0), student, teacher)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> dict[str, Path]:
    """A corpus, a teacher, and a small student with it and without."""
    torch.set_num_threads(1)  # this is made before the fixture that sees to it for each test
    folder = tmp_path_factory.mktemp("distill")
    made = {"corpus": textdata.write_packed(folder / "corpus")}
    common = {"structure": "causal-lm", "epochs": 4, "max_steps": 120, "learning_rate": 5e-3}
    teacher = TrainRequest("sha256:data", architecture=textdata.LLAMA, **common)
    alone = TrainRequest("sha256:data", architecture=SMALL, **common)
    with_teacher = TrainRequest("sha256:data", architecture=SMALL, **common, teacher=Teacher("sha256:teacher", 1.0, 1.0))
    for name, request in (("teacher", teacher), ("alone", alone), ("taught", with_teacher)):
        folders = Folders(made["corpus"], folder / name, teacher=made.get("teacher") if request.teacher else None)
        folders.work.mkdir()
        made[name] = train(request, folders, silent()).folder
    return made


def test_a_taught_student_comes_nearer_to_its_teacher(taught, tmp_path):
    rows = read_packed(taught["corpus"], "validation", 0, tmp_path)
    ids = torch.stack([torch.from_numpy(rows.row(i)) for i in range(8)])
    logits = {}
    for name in ("teacher", "alone", "taught"):
        model = AutoModelForCausalLM.from_pretrained(taught[name])
        with torch.inference_mode():
            logits[name] = model(ids).logits.log_softmax(-1)
    apart = {name: float((logits["teacher"].exp() * (logits["teacher"] - logits[name])).sum(-1).mean()) for name in logits}
    assert apart["taught"] < 0.9 * apart["alone"]
    card = json.loads((taught["taught"] / "model.json").read_text())
    assert card["request"]["teacher"] == {"model": "sha256:teacher", "weight": 1.0, "temperature": 1.0}
    assert card["parameters"] == json.loads((taught["alone"] / "model.json").read_text())["parameters"]


@pytest.mark.parametrize(("change", "words"), [
    ({"precision": "int8"}, "it is int8 causal-lm"),
    ({"structure": "encoder", "labels": ["a"]}, "it is fp32 encoder"),
    ({"adapter": True}, "the student causal-lm"),
    (None, "another vocabulary"),
])
def test_who_can_t_teach_is_refused(taught, copy, recorder, tmp_path, change, words):
    folder = copy(taught["teacher"])
    if change is None:
        textdata.bpe(folder, 300)
    else:
        card = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(card | change))
    request = TrainRequest("sha256:data", structure="causal-lm", architecture=SMALL, teacher=Teacher("sha256:teacher"))
    with pytest.raises(ClientFault, match=words) as raised:
        train(request, Folders(taught["corpus"], tmp_path / "work", teacher=folder), recorder)
    assert raised.value.code == "invalid_teacher"


@pytest.mark.parametrize("fields", [
    {"structure": "tfidf-linear", "algorithm": "lbfgs"}, {"structure": "seq2seq-lm", "base": "sha256:b"},
    {"base": "sha256:b", "problem": "multi-label"}, {"base": "sha256:b", "teacher": Teacher("sha256:t", weight=0.0)}])
def test_a_teacher_where_none_is_of_use_is_refused(fields):
    with pytest.raises(ClientFault, match="teacher"):
        check_request(TrainRequest("sha256:data", **{"teacher": Teacher("sha256:t"), **fields}))
