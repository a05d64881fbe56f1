import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernelm_contracts.trainer import Keep, TrainRequest
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_trainer import loop
from kernelm_trainer.classify import Classification
from kernelm_trainer.corpus import Corpus, read_corpus
from kernelm_trainer.demand import GRADIENT
from kernelm_trainer.loop import Training

REQUEST = TrainRequest("sha256:d", base="sha256:b", epochs=2, batch_size=16, learning_rate=1e-3, checkpoint_every_s=0.0,
                       precision="fp32")  # fmt: skip


@pytest.fixture(scope="module")
def corpus(news: Path) -> Corpus:
    return read_corpus(news, True, ("train", "validation"))


@pytest.fixture(autouse=True)
def _save_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)


def parameters(tuning: Training) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in tuning.model.named_parameters()}


@pytest.mark.parametrize(("algorithm", "precision"), [*((a, "fp32") for a in GRADIENT), ("adamw", "bf16")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    algorithm: str, precision: str, corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class
) -> None:  # fmt: skip
    request = msgspec.structs.replace(REQUEST, algorithm=algorithm, precision=precision)
    whole = Training(request, Classification(request, corpus, tiny_bert), tmp_path / "a", recorder_class(tmp_path / "none"), None)
    expected = whole.run()
    checkpoint = None
    for stop in (4, 5):  # saves: within the first epoch, which has 7 steps; at the first step of the second
        stopped = recorder_class(tmp_path / f"kept{stop}", stop)
        with pytest.raises(stopped.Stopped):
            Training(request, Classification(request, corpus, tiny_bert), tmp_path / "b", stopped, checkpoint).run()
        checkpoint = stopped.checkpoints[-1]
    assert json.loads((checkpoint / "state.json").read_bytes())["epoch"] == 1
    task = Classification(request, corpus, tiny_bert)
    resumed = Training(request, task, tmp_path / "b", recorder_class(tmp_path / "last"), checkpoint)
    tuned = resumed.run()
    assert tuned.validation == expected.validation
    assert tuned.epoch == expected.epoch
    ours, theirs = parameters(resumed), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = Training(request, Classification(request, corpus, tiny_bert), tmp_path / "c", stopped, None)
    assert any(not torch.equal(p, theirs[name]) for name, p in parameters(start).items())


def test_the_best_epoch_is_kept(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class, monkeypatch) -> None:
    tuning = Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, recorder_class(tmp_path / "kept"), None)
    after_first: dict[str, torch.Tensor] = {}
    evaluate = tuning.evaluate

    def worse_and_worse(split):
        if not after_first:
            after_first.update(parameters(tuning))
        return msgspec.structs.replace(evaluate(split), accuracy=1.0 / (1 + tuning.position.epoch))

    monkeypatch.setattr(tuning, "evaluate", worse_and_worse)
    assert tuning.run().epoch == 1
    assert all(torch.equal(after_first[name], p) for name, p in parameters(tuning).items())


def test_checkpoints_are_safetensors_and_json(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class) -> None:
    recorder = recorder_class(tmp_path / "kept", 2)
    with pytest.raises(recorder.Stopped):
        Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, recorder, None).run()
    assert {p.name for p in recorder.checkpoints[-1].iterdir()} == {"state.json", "tensors.safetensors"}
    assert json.loads((recorder.checkpoints[-1] / "state.json").read_bytes())["step"] == 2


def _of_old_names(folder: Path) -> None:
    """Make the checkpoint one of a library that called the encoder's parts otherwise."""
    tensors = load_file(folder / "tensors.safetensors")
    renamed = {key.replace("model.encoder.", "model.bert."): tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / "tensors.safetensors")
    state = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(state | {"fingerprint": "of the names of then"}))


@pytest.mark.parametrize(("change", "spoil", "differs"), [
    ({"learning_rate": 2e-3}, None, "its fingerprint differs"),
    ({"dataset": "sha256:other"}, None, "its fingerprint differs"),
    ({"layers": 1}, None, "only it has encoder.encoder.layer.1.attention.output.LayerNorm.bias and 15 more"),
    ({}, _of_old_names,
     "it lacks encoder.embeddings.LayerNorm.bias and 36 more; only it has bert.embeddings.LayerNorm.bias and 36 more"),
])
def test_a_checkpoint_that_does_not_fit_costs_the_progress_and_not_the_job(
    change: dict, spoil: Callable[[Path], None] | None, differs: str,
    corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class
) -> None:  # fmt: skip
    stopped = recorder_class(tmp_path / "kept", 2)
    with pytest.raises(stopped.Stopped):
        Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, stopped, None).run()
    if spoil is not None:
        spoil(stopped.checkpoints[-1])
    other = msgspec.structs.replace(REQUEST, **change)
    whole = Training(other, Classification(other, corpus, tiny_bert), tmp_path, recorder_class(tmp_path / "whole"), None)
    expected, seen = whole.run(), recorder_class(tmp_path / "anew")
    again = Training(other, Classification(other, corpus, tiny_bert), tmp_path, seen, stopped.checkpoints[-1])
    assert seen.anew == [f"the checkpoint is of another request or model ({differs}): the work begins anew"]
    assert again.position.steps == 0
    assert again.run().validation == expected.validation
    theirs = parameters(whole)
    assert all(torch.equal(p, theirs[name]) for name, p in parameters(again).items())


def test_half_a_checkpoint_is_refused(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class) -> None:
    recorder = recorder_class(tmp_path / "kept", 1)
    with pytest.raises(recorder.Stopped):
        Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, recorder, None).run()
    path = recorder.checkpoints[0] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ClientFault) as caught:
        Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, recorder, recorder.checkpoints[0])
    assert caught.value.code == "invalid_checkpoint"


def test_checkpoints_are_as_far_apart_as_asked(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class) -> None:
    recorder = recorder_class(tmp_path / "kept")
    request = msgspec.structs.replace(REQUEST, checkpoint_every_s=3600.0)
    Training(request, Classification(request, corpus, tiny_bert), tmp_path, recorder, None).run()
    assert len(recorder.checkpoints) == 2  # one an epoch


def test_checkpoints_last_where_they_were_asked_for(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder_class) -> None:
    recorder = recorder_class(tmp_path / "kept")
    request = msgspec.structs.replace(REQUEST, checkpoint_every_s=3600.0, keep=Keep(every=5))
    Training(request, Classification(request, corpus, tiny_bert), tmp_path, recorder, None).run()
    steps = [json.loads((folder / "state.json").read_bytes())["steps"] for folder in recorder.checkpoints]
    assert steps == [5, 7, 10, 14]
    assert [steps[k] for k in recorder.lasting] == [5, 10]


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder) -> None:
    tuning = Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, recorder, None)
    with torch.no_grad():
        tuning.model.head.bias[0] = float("inf")
    with pytest.raises(PluginFault, match=r"epoch 1, step 1: loss nan.*learning rate") as caught:
        tuning.run()
    assert caught.value.code == "diverged"
    assert "lower learning_rate" in caught.value.remedy
    assert caught.value.details == {"epoch": 1, "step": 1}
    assert not recorder.checkpoints


def test_progress_rises_and_tells_what_one_wants_to_know(corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder) -> None:
    began = time.monotonic()
    Training(REQUEST, Classification(REQUEST, corpus, tiny_bert), tmp_path, recorder, None).run()
    took = time.monotonic() - began
    fractions = [fraction for fraction, *_ in recorder.reports]
    assert fractions == sorted(fractions)
    assert abs(fractions[-1] - 1) < 1e-9
    phases = list(dict.fromkeys(phase for _, phase, *_ in recorder.reports))
    assert phases == ["train epoch 1/2", "evaluate", "train epoch 2/2"]
    steps = [metrics for _, phase, _, metrics in recorder.reports if phase.startswith("train")]
    assert len(steps) == 14
    assert all({"loss", "learning_rate", "tokens_per_s", "left_s", "step", "gradient_norm"} <= set(m) for m in steps)
    assert all(0 <= m["left_s"] < 100 * took for m in steps)
    assert steps[-1]["left_s"] < steps[0]["left_s"]


def test_the_speed_counts_what_is_told_and_not_what_is_evaluated(
    corpus: Corpus, tiny_bert: Path, tmp_path: Path, recorder, monkeypatch
) -> None:  # fmt: skip
    now = 0.0

    def told(fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        nonlocal now
        now += 1.0 if phase.startswith("train") else 100.0

    monkeypatch.setattr(recorder, "progress", told)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    request = msgspec.structs.replace(REQUEST, checkpoint_every_s=1e9)
    tuning = Training(request, Classification(request, corpus, tiny_bert), tmp_path, recorder, None)
    tuning.run()
    assert tuning.position.train_s == 12  # of 14 steps, 7 an epoch: before the first nothing was told, and before the eighth looked
