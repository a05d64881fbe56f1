"""What the bases refuse, asked of the plugins that `kernelm plugin new` writes, through a real broker and store."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernelm.testing.conformance import Stand, read
from kernelm.testing.conformance.jobs import finished
from kernelm.testing.conformance.results import Failed
from kernelm_cli.scaffold import create
from kernelm_contracts.bases import CHECKPOINT
from kernelm_contracts.conformance.server import write_model
from kernelm_contracts.conformance.trainer import write_dataset
from kernelm_sdk.checkpoints import FILE, Mark
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.system import ArtifactName, Artifacts


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with Stand() as stand:
        yield stand


async def test_a_trainer_takes_what_it_can_do_and_goes_on_where_it_stopped(stand: Stand, tmp_path: Path) -> None:
    create("trainer", "my-trainer", tmp_path / "plugin")
    (tmp_path / "dataset").mkdir()
    write_dataset(tmp_path / "dataset")
    dataset = await stand.store(tmp_path / "dataset", "dataset")
    instance = await stand.start(read(tmp_path / "plugin"), {})
    await instance.ready()
    good = {"dataset": dataset, "structure": "tfidf-linear", "algorithm": "sgd", "epochs": 3, "checkpoint_every_s": 0.0}

    async def train(checkpoint: str = "", **change: Any) -> Any:
        attempt = await stand.driver.hand(instance.wire, "trainer/1", "train", good | change, checkpoint=checkpoint)
        await finished(attempt)
        return attempt

    for change, code, words in (
        ({"structure": "encoder"}, "invalid", "`structure` is 'encoder', and my-trainer trains tfidf-linear"),
        ({"algorithm": "lbfgs"}, "invalid", "`algorithm` is 'lbfgs', and my-trainer trains sgd"),
        ({"epochs": 0}, "invalid", "`epochs` is 0"),
        ({"dataset": await stand.store(tmp_path / "plugin", "dataset")}, "invalid_dataset", "dataset.json"),
        ({"require_private_clean": "refuse"}, "private_data", "nobody looked for private data"),
    ):
        fault = (await train(**change)).final.fault
        assert isinstance(fault, FaultBody)
        assert (fault.whose, fault.code) == ("client", code)
        assert words in fault.message

    attempts: dict[str, Any] = {}
    whole = await train()
    checkpoints = [r.checkpoint for _, r in whole.reports if r.checkpoint]
    assert len(checkpoints) == 3, "one an epoch, since no time has to pass between two"
    stored = [await stand.bus().call(Artifacts.describe, ArtifactName(digest)) for digest in checkpoints]
    assert all(artifact.metadata["passing"] for artifact in stored), "each is of use until the next one"
    resumed = await train(checkpoints[1])
    assert len([r for _, r in resumed.reports if r.checkpoint]) == 1, "one epoch was left"
    models = [await stand.bus().call(Artifacts.open, ArtifactName(a.final.result["model"])) for a in (whole, resumed)]
    assert len({(Path(m.path) / "linear.safetensors").read_bytes() for m in models}) == 1, "to the last bit"
    opened = await stand.bus().call(Artifacts.open, ArtifactName(checkpoints[1]))
    tensors = Path(opened.path) / CHECKPOINT
    for name, content, format in (("older", tensors.read_bytes(), 0), ("broken", tensors.read_bytes()[:99], 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / CHECKPOINT).write_bytes(content)
        (tmp_path / name / FILE).write_bytes(msgspec.json.encode(Mark("my-trainer", "0.0.1", format)))
        attempts[name] = await train(await stand.store(tmp_path / name, "checkpoint"))
    assert len([r for _, r in attempts["older"].reports if r.checkpoint]) == 3, "it began anew"
    assert ["begins anew" in r.note for _, r in attempts["older"].reports if r.note] == [True]
    assert attempts["broken"].final.fault.code == "invalid_checkpoint"
    seldom = await train(checkpoint_every_s=60.0)
    assert not [r for _, r in seldom.reports if r.checkpoint]


async def test_a_server_without_a_model_and_one_with_another_s(stand: Stand, tmp_path: Path) -> None:
    create("server", "my-server", tmp_path / "plugin")
    subject = read(tmp_path / "plugin")
    idle = await stand.start(subject, {})
    await idle.ready()
    asked = await idle.wire.ask(idle.wire.subject("server/1", "classify"), {"input": ["a"]})
    assert (asked.fault.code, "serves none" in asked.fault.message) == ("unknown_model", True)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    card = tmp_path / "model" / "model.json"
    card.write_text(card.read_text().replace("tfidf-linear", "encoder"))
    model = {"name": "m", "artifact": await stand.store(tmp_path / "model", "model"), "generation": 1}
    wrong = await stand.start(subject, {"model": model})
    with pytest.raises(Failed, match="before it was ready"):
        await wrong.ready()
    assert "`structure` is 'encoder', and my-server serves tfidf-linear" in wrong.last_lines()
