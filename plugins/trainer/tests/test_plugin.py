"""The handlers, with a context that keeps artifacts in a folder."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from textdata import LLAMA, write_packed

from kernelm.testing.shapes import shape
from kernelm_contracts.trainer import ModelTrained, TrainRequest
from kernelm_sdk.checkpoints import mark
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import Context, Job, JobCancelled, read_manifest
from kernelm_sdk.system import ArtifactName, Resources
from kernelm_trainer.plugin import FORMAT, TrainerPlugin
from kernelm_trainer.settings import TrainerSettings

PACKAGE = Path(__file__).parent.parent / "kernelm_trainer"


class FolderContext(Context):
    def __init__(self, scratch: Path, artifacts: dict[str, Path]) -> None:
        super().__init__(None, "trainer-1", "trainer", read_manifest(PACKAGE / "kernelm-plugin.toml"), scratch)  # type: ignore[arg-type]
        self.artifacts, self.lineage, self.events = artifacts, {}, []
        self.metadata: dict[str, dict[str, Any] | None] = {}

    async def artifact(self, digest: str) -> Path:
        return self.artifacts[digest]

    async def store(self, folder: Path, kind: str, metadata: dict[str, Any] | None = None, **lineage: str) -> str:
        digest = f"sha256:{kind}-{len(self.artifacts)}"
        self.artifacts[digest] = Path(shutil.copytree(folder, self.scratch / digest))
        self.lineage[digest], self.metadata[digest] = lineage, metadata
        return digest

    async def publish(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def context(tmp_path: Path, news: Path, tiny_bert: Path) -> FolderContext:
    return FolderContext(tmp_path, {"sha256:d": news, "sha256:b": tiny_bert})


async def test_a_job_trains_stores_and_tells(context: FolderContext) -> None:
    plugin = TrainerPlugin(context, TrainerSettings(threads=1))
    job = Job(context, "jobs", "j1", 1)
    request = TrainRequest("sha256:d", base="sha256:b", epochs=1)
    trained = await plugin.train(request, job)
    assert trained.test is not None
    assert trained.tokens_per_s > 0
    assert context.lineage[trained.model] == {"job": "j1", "dataset": "sha256:d", "base": "sha256:b"}
    assert context.events == [ModelTrained(model=trained.model, structure="encoder", accuracy=trained.validation.accuracy)]
    described = await plugin.describe(ArtifactName(trained.model), None)
    assert described.scores["validation"] == trained.validation
    assert job.latest.fraction == 1.0
    assert not job.scratch.exists()
    assert context.metadata[job.checkpoint] == {"passing": True}
    second = Job(context, "jobs", "j1", 2, checkpoint=job.checkpoint)
    again = await plugin.train(request, second)
    assert again.validation == trained.validation


@pytest.mark.parametrize(("fields", "state"), [
    ({"epochs": 1}, {"fingerprint": "f", "epoch": 1, "batches": 4}),
    ({"structure": "frozen-linear", "algorithm": "lbfgs"}, {"fingerprint": "f", "rows": 4}),
])
async def test_another_versions_checkpoint_is_left_alone_and_a_broken_one_is_named(
    context: FolderContext, tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], state: dict[str, Any]
) -> None:
    """A job is found by its key after an upgrade, with a checkpoint whose fields this version does not know."""
    plugin = TrainerPlugin(context, TrainerSettings(threads=1))
    request = TrainRequest("sha256:d", base="sha256:b", **fields)
    whole = await plugin.train(request, Job(context, "jobs", "j1", 1))
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "state.json").write_bytes(msgspec.json.encode(state))
    context.artifacts["sha256:old"] = folder
    again = await plugin.train(request, Job(context, "jobs", "j1", 2, checkpoint="sha256:old"))
    assert again.validation == whole.validation
    assert "goes on from format 1: the work begins anew" in caplog.text
    mark(folder, context.manifest, FORMAT)
    with pytest.raises(ClientFault, match=r"state\.json.*unknown field") as caught:
        await plugin.train(request, Job(context, "jobs", "j1", 3, checkpoint="sha256:old"))
    assert caught.value.code == "invalid_checkpoint"


async def test_a_checkpoint_of_another_model_costs_the_progress_and_the_job_says_so(context: FolderContext) -> None:
    """As after the upgrade of a library that makes another model of the same request: the job's own checkpoint does not fit."""
    plugin, notes = TrainerPlugin(context, TrainerSettings(threads=1)), list[str]()
    request = TrainRequest("sha256:d", base="sha256:b", epochs=1)
    before = Job(context, "jobs", "j1", 1)
    await plugin.train(msgspec.structs.replace(request, layers=1), before)
    job = Job(context, "jobs", "j2", 1, checkpoint=before.checkpoint)

    async def report(checkpoint: str, address: str = "", note: str = "", left: str = "") -> None:
        notes.extend([note] if note else [])

    job.report = report
    trained = await plugin.train(request, job)
    assert trained.validation == (await plugin.train(request, Job(context, "jobs", "j3", 1))).validation
    assert [note[:54] for note in notes] == ["the checkpoint is of another request or model (it lack"]
    assert notes[0].endswith("the work begins anew")


def test_the_format_of_checkpoints_goes_with_what_they_hold() -> None:
    """If this fails, raise FORMAT in plugin.py, and put the new pair here."""
    from kernelm_trainer.checkpoint import Position
    from kernelm_trainer.frozen import Embedded

    assert (FORMAT, shape(TrainRequest, Position, Embedded)) == (1, "f4f2bd346d36dd79")


async def test_a_cancelled_job_stores_nothing(context: FolderContext) -> None:
    plugin = TrainerPlugin(context, TrainerSettings(threads=1))
    job = Job(context, "jobs", "j1", 1)
    advance = job.progress

    def cancel_in_training(fraction: float, phase: str = "", message: str = "", **metrics: float) -> None:
        if phase.startswith("train"):
            job.cancelled = "the user said so"
        advance(fraction, phase, message, **metrics)

    job.progress = cancel_in_training  # type: ignore[method-assign]
    with pytest.raises(JobCancelled):
        await plugin.train(TrainRequest("sha256:d", base="sha256:b", epochs=1), job)
    assert set(context.artifacts) == {"sha256:d", "sha256:b"}
    assert not context.events
    assert not job.scratch.exists()


async def test_the_granted_memory_limits_what_is_computed_at_once(context: FolderContext, tmp_path: Path) -> None:
    """The steps stay the same; what is not even enough for one row is refused."""
    wide = LLAMA | {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}
    request = TrainRequest("sha256:packed", structure="causal-lm", architecture=wide, batch_size=64, precision="fp32", max_steps=2,
                           report_test=False)  # fmt: skip
    context.artifacts["sha256:packed"] = write_packed(tmp_path / "packed")
    losses = []
    for granted in (8000, 230):  # MB beside the libraries: 120 for those of the first step, 25 that last, 5 a row
        plugin, job = TrainerPlugin(context, TrainerSettings(threads=1)), Job(context, "jobs", f"j{granted}", 1)
        job.resources = Resources(1.0, granted)
        trained = await plugin.train(request, job)
        losses.append(trained.validation.loss)
    card = await plugin.describe(ArtifactName(trained.model), None)
    assert "in place of 64, since memory is short" in card.notes[0]
    assert "what the job was granted" in card.notes[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    job = Job(context, "jobs", "j3", 1)
    job.resources = Resources(1.0, 100)
    with pytest.raises(ClientFault, match="what the job was granted") as caught:
        await plugin.train(request, job)
    assert caught.value.code == "too_little_memory"
    assert "more resources.memory_mb" in caught.value.remedy


async def test_senseless_requests_are_refused_before_artifacts_are_fetched(context: FolderContext) -> None:
    context.artifacts.clear()
    with pytest.raises(ClientFault, match="algorithm"):
        await TrainerPlugin(context, TrainerSettings()).train(
            TrainRequest("sha256:d", structure="tfidf-linear"), Job(context, "jobs", "j1", 1))  # fmt: skip


async def test_what_trains_gives_way_and_the_instance_does_not(context: FolderContext) -> None:
    seen = set[int]()

    class Noting(Job):
        def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
            super().progress(fraction, phase, message, **metrics)
            if metrics:
                seen.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    nice = min(before + 7, 19)
    request = TrainRequest("sha256:d", base="sha256:b", epochs=1)
    await TrainerPlugin(context, TrainerSettings(threads=1, nice=nice)).train(request, Noting(context, "jobs", "j1", 1))
    assert seen == {nice}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_settings_refuse_unknown_keys() -> None:
    with pytest.raises(msgspec.ValidationError, match="thread"):
        msgspec.convert({"thread": 1}, TrainerSettings)


def test_an_idle_instance_imports_nothing_heavy() -> None:
    heavy = ("torch", "sklearn", "matplotlib", "pyarrow", "numpy")
    code = f"import sys, kernelm_trainer.plugin; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
async def test_a_job_of_several_processes_is_a_job_like_any_other(context: FolderContext) -> None:
    plugin = TrainerPlugin(context, TrainerSettings(threads=1))
    job = Job(context, "jobs", "j1", 1)
    trained = await plugin.train(TrainRequest("sha256:d", base="sha256:b", epochs=1, processes=2), job)
    assert trained.validation.documents == 15
    assert job.checkpoint
    assert context.lineage[job.checkpoint] == {"job": "j1"}
    assert (await plugin.describe(ArtifactName(trained.model), None)).labels
