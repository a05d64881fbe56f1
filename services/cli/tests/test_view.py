"""A run as it is drawn and as it is logged, from records such as the job table sends."""

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from kernelm_cli.jobs import _attempt
from kernelm_cli.results import _comparison, key_result, tables
from kernelm_cli.run import _fault_of, _summary
from kernelm_cli.view import PlainRun, RunDrawing, duration, left, lines, metrics
from kernelm_contracts.data import DatasetCard, Prepared
from kernelm_contracts.deployments import Deployed
from kernelm_contracts.jobs import JobRecord, JobSpec, RunRecord, RunSpec, RunView, StageSpec
from kernelm_contracts.optimizer import Change, Compressed, Optimized, Row
from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import Scores, Trained
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.system import Progress

DIGEST = "sha256:" + "ab" * 32
TEST = Scores("test", 425, 0.9765, 0.9751, 0.9758)
STAGES = tuple(StageSpec(n, u) for n, u in (("data", "data/1.prepare"), ("train", "trainer/1.train"),
                                            ("optimize", "optimizer/1.optimize"), ("deploy", "deploy")))  # fmt: skip


def job(name: str, uses: str, state: str = "running", result: Any = None, parent: str = "", **fields: Any) -> JobRecord:
    record = JobRecord(f"j-{name}", JobSpec(name, uses, {}, parent=parent), "key", state, started=1000.0,  # type: ignore[arg-type]
                       result=msgspec.to_builtins(result) if result else {})  # fmt: skip
    return msgspec.structs.replace(record, **fields)


def view(*jobs: JobRecord, state: str = "running", fault: FaultBody | None = None) -> RunView:
    by_stage = {j.spec.name: j.id for j in jobs if not j.spec.parent}
    return RunView(RunRecord("r-1", RunSpec("news", STAGES), by_stage, state, fault, 990.0, 1300.0), jobs)  # type: ignore[arg-type]


PREPARED = job("data", "data/1.prepare", "done",
               Prepared(DIGEST, 2121, ("a", "b"), {"train": 1484, "test": 425}, DatasetCard("d", ("a", "b"), (), {}, 256)),
               finished=1012.0, reused=True)  # fmt: skip
TRAINING = job("train", "trainer/1.train", progress=Progress(0.25, "epoch 1 of 2", "", {"loss": 0.4321, "tokens_per_s": 5123.0}))
MEASURED = Measurement(DIGEST, TEST, 0.52, 0.9, 4100.0, 3 * 2**20, 12.0, 0.1)
OPTIMIZED = Optimized(DIGEST, "tfidf", (
    Row("tfidf", "winner", "tfidf-linear", "liblinear", "fp32", DIGEST, MEASURED),
    Row("lion", "not measured: the budget was spent", "encoder", "lion"),
), TEST, took_s=120.0)  # fmt: skip


def drawn(run: RunView, now: float = 1030.0, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=terminal)
    console.print(RunDrawing().draw(run, now))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_energy_is_a_column_of_the_candidates_where_the_machine_counts_it() -> None:
    change = msgspec.structs.replace
    counted = tuple(change(row, measurement=row.measurement and change(row.measurement, energy_j=0.0123)) for row in OPTIMIZED.rows)
    for rows, there in ((OPTIMIZED.rows, False), (counted, True)):
        console = Console(file=io.StringIO(), width=160)
        console.print(_comparison(change(OPTIMIZED, rows=rows)))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("mJ/doc" in text, "12.3" in text) == (there, there), text


def test_every_stage_has_a_line_with_its_state() -> None:
    text = drawn(view(PREPARED, TRAINING)).splitlines()
    assert "✓ data" in text[1]
    assert "found, not repeated: 2,121 documents in 2 classes" in text[1]
    assert "train" in text[2]
    assert "epoch 1 of 2 · loss 0.4321, 5,123 tokens/s" in text[2]
    assert "30 s · about 1:30 left" in text[2]
    assert "waits" in text[3]
    assert "waits" in text[4]


def test_trials_are_indented_below_their_parent() -> None:
    parent = job("optimize", "optimizer/1.optimize")
    trial = job("lion", "trainer/1.train", parent=parent.id)
    found = [(line.name, line.depth) for line in lines(view(PREPARED, TRAINING, parent, trial))]
    assert found == [("data", 0), ("train", 0), ("optimize", 0), ("lion", 1), ("deploy", 0)]


def test_a_failed_stage_shows_its_fault() -> None:
    fault = FaultBody("plugin", "out_of_memory", "train ran out of memory")
    dead = job("train", "trainer/1.train", "dead", fault=fault, finished=1040.0)
    assert "✗ train" in drawn(view(PREPARED, dead))
    assert "train ran out of memory" in drawn(view(PREPARED, dead))


def test_the_reason_of_a_failed_run_is_left_to_its_panel() -> None:
    fault = FaultBody("plugin", "not_ready", "config.json is missing")
    dead = job("train", "trainer/1.train", "dead", fault=fault, why=fault.message, finished=1040.0)
    nan = FaultBody("plugin", "nan", "the loss is nan")
    child = job("trial-1", "trainer/1.train", "dead", parent="j-train", fault=nan, finished=1040.0)
    of_run = FaultBody("plugin", "not_ready", "stage 'train': config.json is missing")
    run = view(PREPARED, dead, child, state="failed", fault=of_run)
    console = Console(file=io.StringIO(), width=140)
    _summary(run, console)
    for text in (drawn(run), "\n".join(PlainRun().update(run, 1040.0)), console.file.getvalue()):  # type: ignore[attr-defined]
        assert fault.message not in text
        assert "fail" in text.lower()
        assert "the loss is nan" in text, "of a child there is no panel"


def test_a_failed_run_shows_the_last_traceback_of_its_plugin(tmp_path: Path) -> None:
    stored, runner = f"{tmp_path}/artifacts/trees/{'ab' * 32}/files/my/plugin.py", "/x/kernelm_sdk/runner.py"
    frames = f'  File "{runner}", line 8, in run\n    f()\n  File "{stored}", line 3, in fit\n    raise ValueError("no good")\n'
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "my-1.log").write_text(f"Traceback (most recent call last):\n{frames}ValueError: no good\n" * 2)
    fault = FaultBody("plugin", "internal", "ValueError: no good", "see the log of my-1")
    dead = job("train", "trainer/1.train", "dead", fault=fault, instance="my-1", finished=1040.0)
    log = _fault_of(view(dead, state="failed", fault=fault), tmp_path).details["log"]
    assert log.splitlines() == ["Traceback (most recent call last):", '  File "my/plugin.py", line 3, in fit',
                                '    raise ValueError("no good")', "ValueError: no good"]  # fmt: skip
    mistaken = msgspec.structs.replace(fault, whose="client")
    assert "log" not in _fault_of(view(dead, state="failed", fault=mistaken), tmp_path).details


def test_an_attempt_that_fails_like_the_one_before_is_not_told_at_length_again() -> None:
    plain, queued = PlainRun(), job("train", "trainer/1.train", "queued", why="config.json is missing", attempt=1)
    assert plain.update(view(queued), 1001.0) == ["train: queued: config.json is missing"]
    assert plain.update(view(job("train", "trainer/1.train", attempt=1)), 1002.0)
    assert plain.update(view(msgspec.structs.replace(queued, attempt=2)), 1003.0) == ["train: queued: as before"]


@pytest.mark.parametrize(("state", "failed", "said"), [("running", 0, "1 of 3"), ("done", 1, "2 of 3"), ("dead", 3, "3 of 3"),
                                                       ("dead", 0, "1 of 3"), ("cancelled", 3, "3 of 3")])  # fmt: skip
def test_attempts_are_counted_from_one(state: str, failed: int, said: str) -> None:
    assert _attempt(job("train", "trainer/1.train", state, attempt=failed, epoch=4)) == f"{said}, epoch 4"
    assert _attempt(job("train", "trainer/1.train", "queued", started=0.0)) == ""


def test_plain_lines_have_no_control_codes_and_come_only_for_news() -> None:
    plain = PlainRun()
    first = plain.update(view(PREPARED, TRAINING), 1010.0)
    assert first == ["data: done after 12 s: found, not repeated: 2,121 documents in 2 classes (train 1,484, test 425)",
                     "train: running: epoch 1 of 2 · 25% · loss 0.4321, 5,123 tokens/s · 10 s · about 30 s left"]  # fmt: skip
    assert not any("\x1b" in line for line in first)
    assert plain.update(view(PREPARED, TRAINING), 1015.0) == []
    assert len(plain.update(view(PREPARED, TRAINING), 1020.0)) == 1  # ten seconds later
    evaluating = msgspec.structs.replace(TRAINING, progress=Progress(0.9, "evaluating"))
    assert plain.update(view(PREPARED, evaluating), 1021.0)[0].startswith("train: running: evaluating")


def test_the_plugins_own_estimate_goes_before_ours() -> None:
    estimated = msgspec.structs.replace(TRAINING, progress=Progress(0.25, "x", "", {"left_s": 61.0, "loss": 0.5}))
    assert left(estimated, 1010.0) == "1:01 left"
    assert metrics(estimated.progress) == "loss 0.5000"


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.9, 60, 3725)] == ["0 s", "59 s", "1:00", "1:02:05"]


def test_key_results_of_all_stages() -> None:
    trained = job("train", "trainer/1.train", "done", Trained(DIGEST, "encoder", "adamw", 22_000_000, TEST, TEST, 160.0, 5000.0))
    assert key_result(trained) == "accuracy 0.9765 on test, 5,000 tokens/s"
    assert key_result(job("o", "optimizer/1.optimize", "done", OPTIMIZED)) == "tfidf of 1 measured, accuracy 0.9765 on test"
    change = Change("loss", 0.01, -0.01, 0.03, False, "not significant")
    smaller = Compressed(DIGEST, "int8", *(Measurement(DIGEST, TEST, ms, 9.0, 1.0, size, 1.0, 1.0)
                                           for ms, size in ((4.0, 2_000_000), (2.0, 1_000_000))), change)  # fmt: skip
    assert key_result(job("c", "optimizer/1.compress", "done", smaller)) == (
        "int8: 2.00 to 1.00 MB, 4.00 to 2.00 ms; not significant")
    served = {"model": "news", "generation": 3, "artifact": DIGEST, "pool": "news-g3"}
    assert key_result(job("deploy", "deploy", "done", served)) == "news generation 3, artifact abababababab"


def test_a_result_of_another_version_is_shown_as_it_is() -> None:
    assert key_result(job("train", "trainer/1.train", "done", {"model": DIGEST, "score": 0.5})) == "model abababababab, score 0.5"


def test_the_tables_show_quality_and_every_candidate() -> None:
    console = Console(file=io.StringIO(), width=160)
    for table in tables(view(PREPARED, job("optimize", "optimizer/1.optimize", "done", OPTIMIZED))):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ("0.9765", "0.9751", "0.9758", "winner", "not measured: the budget was spent", "4,100", "3.0"):
        assert figure in text


def test_a_model_that_writes_has_no_labels_in_its_table() -> None:
    scores = Scores("test", 1289, 0.4312, 0.0, 0.0, 2.5, tokens=18_034, perplexity=12.18)
    trained = Trained(DIGEST, "seq2seq-lm", "adamw", 6_685_696, scores, scores)
    (table,) = tables(view(PREPARED, job("train", "trainer/1.train", "done", trained)))
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "macro" not in text
    assert all(figure in text for figure in ("1,289", "18,034", "0.4312", "12.18"))


def test_of_a_model_that_finds_entities_the_whole_ones_count() -> None:
    labels = {name: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 9.0} for name in ("B-person", "I-person", "O")}
    whole = {"precision": 0.6285, "recall": 0.6937, "f1": 0.6595, "support": 1727.0}
    scores = Scores("test", 1490, 0.9651, 0.7306, 0.7436, 0.1, per_label=labels | {"entities": whole})
    done = job("train", "trainer/1.train", "done", Trained(DIGEST, "token-classification", "adamw", 9, scores, scores))
    assert key_result(done) == "F1 0.6595 of entities on test"
    console = Console(file=io.StringIO(), width=160)
    console.print(*tables(view(PREPARED, done)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "macro" not in text
    assert all(figure in text for figure in ("1,490", "1,727", "0.6285", "0.6937", "0.6595", "0.9651"))
    named = Scores("test", 9, 0.75, 0.7, 0.7, 0.1, per_label={"entities": labels["O"], "sport": labels["O"]})  # a class
    done = job("train", "trainer/1.train", "done", Trained(DIGEST, "encoder", "adamw", 9, named, named))
    assert key_result(done) == "accuracy 0.7500 on test"


def test_a_replica_that_serves_is_a_stage_that_is_over() -> None:
    serving = job("deploy", "deploy", result=Deployed("news", 3, DIGEST, "news-g3"), progress=Progress(1.0, "serving"))
    said = PlainRun()
    (line,) = said.update(view(serving), 1030.0)
    assert line == f"deploy: serves: news generation 3, artifact {'ab' * 6}"
    assert not said.update(view(serving), 1060.0), "it is said once, however long it serves"
    assert "✓ deploy" in drawn(view(serving))
    starting = job("deploy", "deploy", progress=Progress(0.0, "starting"))
    assert "running: starting" in PlainRun().update(view(starting), 1030.0)[0]
