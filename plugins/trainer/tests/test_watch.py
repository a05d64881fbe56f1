"""What is foreseen, what goes wrong on the way, and that nothing is lost by it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from textdata import LLAMA, write_packed

from kernelm_contracts.trainer import Keep, ModelCard, Privacy, TrainRequest
from kernelm_sdk.errors import ClientFault, KernelFault, PluginFault
from kernelm_trainer import checkpoint, compiling, loop, memory
from kernelm_trainer.classify import Classification
from kernelm_trainer.corpus import read_corpus
from kernelm_trainer.language import Causal
from kernelm_trainer.loop import Training
from kernelm_trainer.private import Private
from kernelm_trainer.training import Folders, train

REQUEST = TrainRequest("sha256:d", structure="causal-lm", architecture=LLAMA, epochs=1, batch_size=8, learning_rate=3e-3,
                       precision="fp32", report_test=False)  # fmt: skip
NEWS = TrainRequest("sha256:d", base="sha256:b", epochs=2, batch_size=16, learning_rate=1e-2, precision="fp32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


def test_a_loss_that_explodes_stops_with_a_diagnosis(corpus: Path, tmp_path: Path, recorder) -> None:
    request = msgspec.structs.replace(REQUEST, algorithm="sgd", learning_rate=10.0, max_grad_norm=1e6, warmup=0.0,
                                      schedule="constant")  # fmt: skip
    what = r"diverged in epoch 1, step \d+: (mean loss .* after|loss ).*learning rate 10,"
    with pytest.raises(PluginFault, match=what) as caught:
        train(request, Folders(corpus, tmp_path), recorder)
    assert caught.value.code == "diverged"
    assert caught.value.details["epoch"] == 1
    with pytest.raises(ClientFault, match=r"learning_rate is 1000000000\.0"):
        train(msgspec.structs.replace(REQUEST, learning_rate=1e9), Folders(corpus, tmp_path), recorder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KernelFault("disk_full", "the store has no space")])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    error: Exception, corpus: Path, tmp_path: Path, recorder, monkeypatch
) -> None:  # fmt: skip
    class Full(type(recorder)):  # type: ignore[misc]
        failures = 2

        def save(self, folder: Path, lasting: bool = False) -> None:
            if self.failures:
                self.failures -= 1
                raise error
            super().save(folder, lasting)

    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    request = msgspec.structs.replace(REQUEST, checkpoint_every_s=0.0, max_steps=6)
    whole = train(request, Folders(corpus, tmp_path / "a"), type(recorder)(tmp_path / "kept"))
    seen = Full(tmp_path / "full")
    outcome = train(request, Folders(corpus, tmp_path / "b"), seen)
    assert outcome.card.scores == whole.card.scores
    assert len(seen.checkpoints) == 4
    assert sum("no checkpoint after step" in note for note in outcome.card.notes) == 2
    assert "space" in outcome.card.notes[0]
    resumed = train(request, Folders(corpus, tmp_path / "c", checkpoint=seen.checkpoints[0]), recorder)
    assert resumed.card.scores == whole.card.scores


FULL = """
import pathlib, resource, sys
import msgspec, torch
from kernelm_contracts.trainer import TrainRequest
from kernelm_trainer.training import Folders, train
class Kept:
    def progress(self, *a, **m): ...
    def save(self, folder, lasting): sys.exit("a checkpoint larger than the limit was written")
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
request = msgspec.json.decode(sys.argv[3], type=TrainRequest)
outcome = train(request, Folders(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])), Kept())
sys.stdout.buffer.write(msgspec.json.encode(outcome.card))
"""


def test_a_disk_that_has_no_room_for_a_checkpoint_costs_no_more(corpus: Path, tmp_path: Path, recorder) -> None:
    """A real limit of the operating system, between the sizes of a model and of its checkpoint."""
    request = msgspec.structs.replace(REQUEST, max_steps=6, keep=Keep(every=2))
    free = train(request, Folders(corpus, tmp_path / "free"), recorder)
    sizes = [path.stat().st_size for path in (free.folder / "model.safetensors", recorder.checkpoints[0] / checkpoint.TENSORS)]
    assert sizes[0] < 300_000 < sizes[1]
    arguments = [str(corpus), str(tmp_path / "full"), msgspec.json.encode(request).decode(), "300000"]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, check=False)
    assert not done.returncode, done.stderr
    card = msgspec.json.decode(done.stdout, type=ModelCard)
    assert len(recorder.checkpoints) == 3
    assert [note[:26] for note in card.notes] == [f"no checkpoint after step {n}" for n in (2, 4, 6)]
    assert "File too large" in card.notes[0]
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["ids", "model"]
    assert card.scores["validation"].loss == free.card.scores["validation"].loss


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    snapshot = checkpoint.Snapshot({"model.a": torch.ones(3)}, b"{}")
    checkpoint.write(tmp_path / "c", snapshot)
    before = (tmp_path / "c" / "tensors.safetensors").read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path / "c", checkpoint.Snapshot({"model.a": torch.zeros(3)}, b"{}"))
    assert (tmp_path / "c" / "tensors.safetensors").read_bytes() == before


READ = """
import sys, psutil, torch, pathlib
from kernelm_contracts.trainer import TrainRequest
from kernelm_trainer import checkpoint
model = torch.nn.Linear(4096, 4096)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model(torch.ones(1, 4096)).sum().backward()
optimizer.step()
model.zero_grad()
position = checkpoint.Position("f")
best = {name: p.detach() for name, p in model.named_parameters()}
checkpoint.write(pathlib.Path(sys.argv[1]), checkpoint.take(position, model, [optimizer], best))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = psutil.Process().memory_info().rss
checkpoint.read(pathlib.Path(sys.argv[1]), "f", model, [optimizer])
peak = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print((peak - before) / 2**20)
"""


def test_a_checkpoint_is_read_without_a_copy_of_its_file(tmp_path: Path) -> None:
    """256 MB: pages of the mapped file, and copies of the moments and the best; not the bytes beside."""
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "c")], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.9 * 256


def test_the_best_parameters_of_a_snapshot_are_not_copied() -> None:
    model, best = torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)}
    taken = checkpoint.take(checkpoint.Position("f"), model, [], best)
    assert taken.tensors["best.weight"].data_ptr() == best["weight"].data_ptr()
    assert taken.tensors["model.weight"].data_ptr() != model.weight.data_ptr()


class Columns(torch.nn.Module):
    """An objective whose second input is a row's as a whole, and as wide as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(5))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, ids: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(t.shape[1] for t in (ids, whole)))
        return (ids.float().sum() * self.weight * whole.float()).sum()


def test_the_task_says_which_of_its_inputs_may_be_cut() -> None:
    """As the memory of a row is measured on shorter ones; of a problem with one label a text, too."""
    model = Columns()
    task = SimpleNamespace(lengths=[30, 96], objective=model, per_token=(True, False),
                           inputs=lambda rows: (torch.ones(len(rows), 96), torch.ones(len(rows), 5)))  # fmt: skip
    training: Any = SimpleNamespace(task=task, model=model, request=REQUEST, bf16=False)
    once, row = memory._kept(training)
    assert model.seen == [(32, 5), (64, 5), (96, 5)]
    assert (once > 0, row >= 0) == (True, True)


@pytest.mark.parametrize("structure", ["causal-lm", "encoder", "multi-label"])
def test_what_a_task_says_of_its_inputs_holds(structure: str, corpus: Path, news: Path, tiny_bert: Path, tmp_path: Path) -> None:
    if structure == "causal-lm":
        task: Any = Causal(REQUEST, corpus, None, ("train",), tmp_path / "x")
    else:
        request = msgspec.structs.replace(NEWS, problem="multi-label" if structure == "multi-label" else "multi-class")
        documents = read_corpus(news, True, ("train",))
        if structure == "multi-label":
            labels = np.eye(len(documents.labels), dtype=np.int64)[documents.splits["train"].labels]
            documents.splits["train"] = dataclasses.replace(documents.splits["train"], labels=labels)
        task = Classification(request, documents, tiny_bert)
    given = task.inputs(np.arange(3))
    longest = max(task.lengths[:3])
    assert [t.ndim == 2 and t.shape[1] == longest for t in given] == list(task.per_token)


def test_short_memory_makes_smaller_micro_batches_and_the_same_model(corpus: Path, tmp_path: Path, recorder) -> None:
    training = Training(REQUEST, Causal(REQUEST, corpus, None, ("train", "validation"), tmp_path / "x"), tmp_path, recorder, None)
    fixed, row = memory.estimate(training)
    request = msgspec.structs.replace(REQUEST, max_steps=5)
    plenty = train(request, Folders(corpus, tmp_path / "a"), recorder)
    short = train(request, Folders(corpus, tmp_path / "b"), recorder, memory_mb=(fixed + 3 * row) / memory.MARGIN)
    assert not plenty.card.notes
    assert "micro_batch is 2 in place of 8, since memory is short" in short.card.notes[0]
    assert short.card.notes[0] in (short.folder / "card.md").read_text()
    assert short.card.scores["validation"].loss == pytest.approx(plenty.card.scores["validation"].loss, rel=1e-5)
    with pytest.raises(ClientFault, match="one row at a time needs") as caught:
        train(request, Folders(corpus, tmp_path / "c"), recorder, memory_mb=fixed / 2)
    assert caught.value.code == "too_little_memory"


PEAK = """
import json, sys, torch, pathlib
sys.path.insert(0, sys.argv[3])
from kernelm_contracts.trainer import TrainRequest
from kernelm_trainer import memory
from kernelm_trainer.language import Causal
from kernelm_trainer.loop import Training
torch.set_num_threads(1)
class Quiet:
    def progress(self, *a, **m): ...
    def save(self, folder, lasting): ...
request = TrainRequest("sha256:d", structure="causal-lm", architecture=json.loads(sys.argv[4]), epochs=1, precision=sys.argv[6],
                       batch_size=int(sys.argv[5]), micro_batch=int(sys.argv[5]), report_test=False, max_steps=3)
work = pathlib.Path(sys.argv[2])
import psutil
before = psutil.Process().memory_info().rss
training = Training(request, Causal(request, pathlib.Path(sys.argv[1]), None, ("train", "validation"), work), work, Quiet(), None)
fixed, row = memory.estimate(training)
training.run()
# not ru_maxrss: that is handed on from who started this process, which may have been larger
peak = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print(json.dumps([fixed + row * int(sys.argv[5]), (peak - before) / 2**20]))
"""


@pytest.mark.parametrize(("change", "batch", "length", "precision"), [
    ({"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048}, 4, 32, "fp32"),
    ({"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048}, 16, 32, "bf16"),
    ({"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704}, 64, 32, "fp32"),
    ({"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "attention_dropout": 0.1}, 4, 512, "fp32"),
])  # fmt: skip
def test_the_memory_is_foreseen(change: dict, batch: int, length: int, precision: str, tmp_path: Path) -> None:
    """Of what parameters, their copies in bfloat16, activations, and scores of attention make large."""
    corpus, model = write_packed(tmp_path / "corpus", length), LLAMA | {"max_position_embeddings": length} | change
    arguments = [str(corpus), str(tmp_path), str(Path(__file__).parent), json.dumps(model), str(batch), precision]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    foreseen, taken = json.loads(done.stdout.splitlines()[-1])
    assert 0.65 * taken < foreseen < 1.5 * taken, (foreseen, taken)


def test_compiling_is_chosen_by_measurement(corpus: Path, tmp_path: Path, recorder_class, monkeypatch) -> None:
    request = msgspec.structs.replace(REQUEST, compile="auto", max_steps=3)
    took = iter([2.0, 1.0])
    monkeypatch.setattr(compiling, "_seconds", lambda *_: next(took))
    task = Causal(request, corpus, None, ("train", "validation"), tmp_path / "a")
    training = Training(request, task, tmp_path, recorder_class(tmp_path / "a"), None)
    assert not training.position.compiled
    assert training.position.notes == ("not compiled: all 3 steps take about 6 s",)
    monkeypatch.setattr(compiling, "WORTH_S", 1.0)
    took = iter([2.0, 1.0])
    chosen = Training(request, task, tmp_path, recorder_class(tmp_path / "b"), None)
    assert chosen.position.compiled
    assert chosen.position.notes == ("compiled: a step took 1.00 s compiled, 2.00 s not",)


def test_privacy_spends_its_budget_and_learns(news: Path, tiny_bert: Path, tmp_path: Path, recorder) -> None:
    request = msgspec.structs.replace(NEWS, privacy=Privacy(epsilon=8.0, delta=1e-3), epochs=3, report_test=False)
    outcome = train(request, Folders(news, tmp_path, tiny_bert), recorder)
    assert 6.0 < outcome.card.epsilon <= 8.0
    assert outcome.card.delta == 1e-3
    assert "Differential privacy: epsilon" in (outcome.folder / "card.md").read_text()
    stricter = msgspec.structs.replace(request, privacy=Privacy(epsilon=1.0, delta=1e-3))
    corpus = read_corpus(news, True, ("train", "validation"))
    noise = [Private(r, Classification(r, corpus, tiny_bert), 21)._noise for r in (request, stricter)]
    assert noise[1] > 2 * noise[0]


def test_a_private_training_resumes_bit_for_bit(news: Path, tiny_bert: Path, tmp_path: Path, recorder_class, monkeypatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    corpus = read_corpus(news, True, ("train", "validation"))
    request = msgspec.structs.replace(NEWS, privacy=Privacy(delta=1e-3), checkpoint_every_s=0.0, micro_batch=8, max_steps=6)
    whole = Training(request, Classification(request, corpus, tiny_bert), tmp_path / "a", recorder_class(tmp_path / "n"), None)
    whole.run()
    stopped = recorder_class(tmp_path / "kept", 3)
    with pytest.raises(stopped.Stopped):
        Training(request, Classification(request, corpus, tiny_bert), tmp_path / "b", stopped, None).run()
    resumed = Training(request, Classification(request, corpus, tiny_bert), tmp_path / "b", recorder_class(tmp_path / "m"),
                       stopped.checkpoints[-1])  # fmt: skip
    resumed.run()
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.model.named_parameters())


@pytest.mark.parametrize(("change", "named"), [
    ({"batch_size": 500}, "batch_size is 500, there are 105 examples"),
    ({"privacy": Privacy(delta=0.05)}, "privacy.delta is 0.05"),
])  # fmt: skip
def test_privacy_that_means_nothing_is_refused(
    change: dict, named: str, news: Path, tiny_bert: Path, tmp_path: Path, recorder
) -> None:  # fmt: skip
    request = msgspec.structs.replace(NEWS, **{"privacy": Privacy(delta=1e-3), **change})
    with pytest.raises(ClientFault, match=named):
        train(request, Folders(news, tmp_path, tiny_bert), recorder)
