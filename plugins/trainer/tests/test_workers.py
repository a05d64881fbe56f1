"""Real processes under torchrun, with gloo."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import psutil
import pytest
from textdata import LLAMA, write_packed
from transformers import AutoModelForCausalLM

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.ports import free_port
from kernelm_trainer import workers
from kernelm_trainer.training import Folders, train
from kernelm_trainer.workers import Order, Place, run

pytestmark = pytest.mark.slow  # each process imports torch and transformers
REQUEST = TrainRequest("sha256:d", structure="causal-lm", architecture=LLAMA, epochs=1, batch_size=8, learning_rate=3e-3,
                       max_steps=6, precision="fp32", processes=2, checkpoint_every_s=3600.0)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    seen = Losses()
    train(msgspec.structs.replace(REQUEST, processes=1), Folders(corpus, tmp_path_factory.mktemp("alone")), seen)
    return [seen.losses[step] for step in sorted(seen.losses)]


class Losses:
    """Keeps the loss of each step, and what was saved."""

    def __init__(self) -> None:
        self.losses: dict[float, float] = {}
        self.saved: list[str] = []
        self.anew: list[str] = []

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        if "loss" in metrics:
            self.losses[metrics["step"]] = metrics["loss"]

    def save(self, folder: Path, lasting: bool = False) -> None:
        self.saved.append((folder / "state.json").read_text())

    def begins_anew(self, why: str) -> None:
        self.anew.append(why)


def living() -> dict[int, list[str]]:
    """The command of each process below this one. Who has ended is not among them, though nobody may have waited for it yet."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended: there is no command
            found[process.pid] = process.cmdline()
    return found


def training() -> list[int]:
    """The processes that train, without torchrun."""
    return [pid for pid, line in living().items() if "kernelm_trainer.worker" in line and "torch.distributed.run" not in line]


def kill_one() -> None:
    """Kill the last of the processes that train, if they still run."""
    if found := training():
        os.kill(found[-1], signal.SIGKILL)


def order(request: TrainRequest, corpus: Path, work: Path, speaks: bool = True) -> Order:
    work.mkdir(exist_ok=True)
    return Order(request, str(corpus), "", "", str(work), 1, speaks)


@pytest.mark.parametrize(("processes", "sharding"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_losses_are_those_of_one_process(
    processes: int, sharding: str, corpus: Path, alone: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    seen = Losses()
    request = msgspec.structs.replace(REQUEST, processes=processes, sharding=sharding)
    result = run(order(request, corpus, tmp_path), Place(), seen)
    assert not list((tmp_path / "tmp").glob("torchelastic_*")), "nothing is left outside its folder"
    assert [seen.losses[step] for step in sorted(seen.losses)] == pytest.approx(alone, abs=2e-4)
    assert result is not None
    assert result.card.scores["validation"].loss < alone[0]
    assert AutoModelForCausalLM.from_pretrained(result.folder).num_parameters() == result.card.parameters


def test_a_killed_process_is_replaced_and_the_run_goes_on_from_the_last_checkpoint(
    corpus: Path, alone: list[float], tmp_path: Path
) -> None:  # fmt: skip
    class Killing(Losses):
        def save(self, folder: Path, lasting: bool = False) -> None:
            super().save(folder, lasting)
            if len(self.saved) == 1:
                kill_one()

    seen = Killing()
    request = msgspec.structs.replace(REQUEST, keep=msgspec.structs.replace(REQUEST.keep, every=3))
    result = run(order(request, corpus, tmp_path), Place(), seen)
    assert result is not None
    assert '"steps":3' in seen.saved[0]
    assert [seen.losses[step] for step in sorted(seen.losses)] == pytest.approx(alone, abs=2e-4)


def test_a_checkpoint_that_does_not_fit_costs_the_progress_in_all_processes(
    corpus: Path, alone: list[float], tmp_path: Path
) -> None:  # fmt: skip
    class Kept(Losses):
        def save(self, folder: Path, lasting: bool = False) -> None:
            shutil.copytree(folder, tmp_path / "kept", dirs_exist_ok=True)

    other = msgspec.structs.replace(REQUEST, processes=1, max_steps=2, architecture=LLAMA | {"num_hidden_layers": 1})
    train(other, Folders(corpus, tmp_path / "other"), Kept())
    seen = Losses()
    given = msgspec.structs.replace(order(REQUEST, corpus, tmp_path / "work"), checkpoint=str(tmp_path / "kept"))
    assert run(given, Place(), seen) is not None
    assert len(seen.anew) == 1
    assert seen.anew[0].startswith("the checkpoint is of another request or model (it lacks model.layers.1.")
    assert [seen.losses[step] for step in sorted(seen.losses)] == pytest.approx(alone, abs=2e-4)


def test_instances_meet_and_the_first_speaks(corpus: Path, alone: list[float], tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    request = msgspec.structs.replace(REQUEST, processes=1)
    other: list[object] = []
    thread = threading.Thread(target=lambda: other.append(run(order(request, corpus, tmp_path / "b", speaks=False),
                                                              Place(1, 2, address), Losses())))  # fmt: skip
    thread.start()
    seen = Losses()
    result = run(order(request, corpus, tmp_path / "a"), Place(0, 2, address), seen)
    thread.join(60.0)
    assert result is not None
    assert other == [None]
    assert [seen.losses[step] for step in sorted(seen.losses)] == pytest.approx(alone, abs=2e-4)


def test_a_fault_of_the_training_is_the_fault_of_the_job(corpus: Path, tmp_path: Path) -> None:
    request = msgspec.structs.replace(REQUEST, architecture=LLAMA | {"max_position_embeddings": 16})
    with pytest.raises(ClientFault, match="the model takes 16"):
        run(order(request, corpus, tmp_path), Place(), Losses())


def test_processes_that_die_too_often_end_the_job_and_leave_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    class Killing(Losses):
        def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
            if phase == "load":
                kill_one()

    before = set(living())
    with pytest.raises(PluginFault, match="the training's processes ended with code 1") as caught:
        run(order(msgspec.structs.replace(REQUEST, restarts=0), corpus, tmp_path), Place(), Killing())
    assert caught.value.code == "workers_failed"
    assert set(living()) <= before


def test_a_job_that_is_no_longer_wanted_stops_its_processes(corpus: Path, tmp_path: Path) -> None:
    class Unwanted(Exception):
        pass

    class Stopping(Losses):
        def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
            if phase.startswith("train"):
                raise Unwanted

    with pytest.raises(Unwanted):
        run(order(REQUEST, corpus, tmp_path), Place(), Stopping())
    assert not training()
    assert workers.LOG in {p.name for p in tmp_path.iterdir()}


PROGRAM = """
import sys
from pathlib import Path
import msgspec
from kernelm_trainer.workers import Order, Place, run
class Quiet:
    def progress(self, *_, **__): print("progress", flush=True)
    def save(self, folder, lasting): ...
run(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Order), Place(), Quiet())
"""


def test_who_is_killed_takes_its_processes_along(corpus: Path, tmp_path: Path) -> None:
    """Nobody would store the checkpoints of those who are left, and the job goes on elsewhere."""
    given = order(msgspec.structs.replace(REQUEST, max_steps=100_000), corpus, tmp_path / "work")
    (tmp_path / "order.json").write_bytes(msgspec.json.encode(given))
    trainer = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "order.json")], stdout=subprocess.PIPE)
    try:
        assert trainer.stdout is not None
        theirs: list[psutil.Process] = []
        while len(theirs) < 3:  # torchrun and two that train
            assert trainer.stdout.readline() == b"progress\n"
            theirs = psutil.Process(trainer.pid).children(recursive=True)
    finally:
        trainer.kill()
        trainer.wait()
    _, left = psutil.wait_procs(theirs, timeout=60)
    assert left == []
