"""Curves of trainings, from records such as the job table sends."""

import io

from rich.console import Console

from kernelm_cli.curves import BARS, KEPT, WIDTH, Curves
from kernelm_cli.view import RunDrawing
from kernelm_contracts.jobs import JobRecord, JobSpec, RunRecord, RunSpec, RunView, StageSpec
from kernelm_sdk.system import Progress


def training(state: str = "running", **metrics: float) -> JobRecord:
    return JobRecord("j", JobSpec("train", "trainer/1.train", {}), "key", state, started=1.0,  # type: ignore[arg-type]
                     progress=Progress(0.5, "train", "", metrics))  # fmt: skip


def test_a_curve_falls_from_the_highest_bar_to_the_lowest() -> None:
    curves = Curves()
    assert curves.draw("j") == ""
    for step in range(1, 200):
        curves.take(training(step=step, loss=6.0 - step / 50))
    name, first, bars, last = curves.draw("j").split()
    assert (name, first, last) == ("loss", "5.98", "2.02")
    assert len(bars) == WIDTH
    assert list(bars) == sorted(bars, reverse=True)
    assert (bars[0], bars[-1]) == (BARS[-1], BARS[0])


def test_a_look_at_the_validation_split_is_one_point() -> None:
    curves = Curves()
    for step in range(1, 9):
        curves.take(training(step=step, loss=2.0, validation_loss=3.0 if step < 5 else 1.0))
    assert curves.draw("j") == "loss 2 ▁▁▁▁▁▁▁▁ 2   validation 3 █▁ 1"


def test_an_attempt_that_goes_on_from_a_checkpoint_takes_its_place() -> None:
    curves = Curves()
    for step, loss in ((1, 4.0), (2, 3.0), (3, 9.0), (2, 3.5), (3, 2.0)):
        curves.take(training(step=step, loss=loss))
    assert curves.draw("j") == "loss 4 █▆▁ 2"


def test_a_long_training_takes_no_more_room_and_a_lost_loss_no_place() -> None:
    curves = Curves()
    for step in range(20 * KEPT):
        curves.take(training(step=step, loss=float("nan") if step % 2 else 1.0 / (step + 1)))
    assert max(map(len, curves._points.values())) <= 2 * KEPT
    assert len(curves.draw("j").split()[2]) == WIDTH


def test_the_picture_of_a_run_has_the_curve_below_the_training_and_keeps_it() -> None:
    drawing, console = RunDrawing(), Console(file=io.StringIO(), width=140)
    for step, state in ((1, "running"), (2, "running"), (3, "done")):
        spec = RunSpec("news", (StageSpec("train", "trainer/1.train"),))
        record = RunRecord("r", spec, {"train": "j"}, "running", None, 1.0, 0.0)
        picture = drawing.draw(RunView(record, (training(state, step=step, loss=5.0 - step),)), 9.0)
    console.print(picture)
    assert "loss 4 █▅▁ 2" in console.file.getvalue()  # type: ignore[attr-defined]
