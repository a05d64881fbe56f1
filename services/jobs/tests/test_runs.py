"""Runs as pure functions: the demo's pipeline passes, and each kind of mistake is named with stage and field."""

import msgspec
import pytest

from kernelm_contracts.jobs import JobRecord, JobSpec, RunRecord, RunSpec
from kernelm_contracts.trainer import TrainRequest
from kernelm_jobs.runs import (
    content_key,
    digests_in,
    normalized,
    outcome,
    ready_stages,
    references_in,
    replaced,
    same_content,
    validate,
)
from kernelm_sdk.errors import ClientFault, FaultBody

DIGEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
NEWS = {
    "name": "news",
    "stage": [
        {"name": "prepare", "uses": "data/1.prepare", "with": {"source": DIGEST, "name": "bbc"}},
        {"name": "train", "uses": "trainer/1.train", "with": {"dataset": "${prepare.dataset}", "base": DIGEST, "epochs": 2}},
        {"name": "optimize", "uses": "optimizer/1.optimize", "with": {
            "dataset": "${prepare.dataset}", "candidates": [{"name": "trained", "model": "${train.model}"}]}},
        {"name": "deploy", "uses": "deploy", "with": {"name": "news", "model": "${optimize.model}"}},
    ],
}  # fmt: skip


def spec(**changes) -> RunSpec:
    return msgspec.convert(NEWS | changes, RunSpec)


def training(**request) -> RunSpec:
    return with_stage(1, **{"with": request})


def with_stage(index: int, **changes) -> RunSpec:
    return spec(stage=[stage | changes if i == index else stage for i, stage in enumerate(NEWS["stage"])])


def test_the_news_pipeline_is_valid() -> None:
    validate(spec())


@pytest.mark.parametrize(("run", "message"), [
    (spec(name="No Spaces"), r"run: name 'No Spaces' must be"),
    (with_stage(1, name="1-train"), r"stage '1-train': the name of a stage starts with a letter"),
    (spec(stage=[]), r"run 'news' has no stage"),
    (with_stage(1, name="prepare"), r"stage 'prepare': there are two of this name"),
    (with_stage(1, uses="trainer/1.fly"), r"stage 'train': `uses` 'trainer/1.fly' names no job"),
    (with_stage(1, uses="trainer/1.describe"), r"stage 'train': `uses` 'trainer/1.describe' names no job"),
    (training(dataset="${prepare.dataset}", epochs="two"), r"stage 'train': Expected `int`, got `str` - at `\$\.epochs`"),
    (training(dataset="${prepare.dataset}", epoch=2), r"stage 'train': Object contains unknown field `epoch`"),
    (training(base=DIGEST), r"stage 'train': Object missing required field `dataset`"),
    (training(dataset="${prepare.datset}"), r"\$\{prepare.datset\}; the result of 'prepare' has dataset, documents"),
    (training(dataset="${optimize.model}"), r"stage 'train': .*'optimize' is no earlier stage"),
    (training(dataset="${train.model}"), r"stage 'train': .*'train' is no earlier stage"),
    (training(dataset="a ${prepare.dataset}"), r"stage 'train': .*a reference is the whole value"),
    (training(dataset="${prepare.dataset}", epochs="${prepare.dataset}"), r"Expected `int`, got `str` - at `\$\.epochs`"),
    (with_stage(1, attempts=0), r"stage 'train': `attempts` is 0"),
    (with_stage(1, resources={"cpu": -1}), r"stage 'train': `resources`: resources must not be negative"),
    (with_stage(3, **{"with": {"name": "News!", "model": DIGEST}}), r"stage 'deploy': `name` 'News!' must be"),
    (with_stage(3, **{"with": {"name": "news", "model": "latest"}}), r"stage 'deploy': `model` 'latest' is no digest"),
    (with_stage(3, **{"with": {"name": "n" * 41, "model": DIGEST}}), r"stage 'deploy': `name` 'n+' is longer than 40"),
    (with_stage(3, **{"with": {"name": "news", "model": DIGEST, "instances": 0}}), r"stage 'deploy': `instances` is 0"),
])  # fmt: skip
def test_a_mistake_is_named_with_its_stage_and_field(run: RunSpec, message: str) -> None:
    with pytest.raises(ClientFault, match=message) as refusal:
        validate(run)
    assert refusal.value.code == "invalid"


def test_a_reference_takes_the_type_of_the_field() -> None:
    validate(with_stage(1, **{"with": {"dataset": "${prepare.dataset}", "seed": "${prepare.documents}"}}))
    assert replaced({"a": ["${s.x}", {"b": "${s.y}"}], "c": 1}, {"s": {"x": 7, "y": [1]}}) == {"a": [7, {"b": [1]}], "c": 1}
    assert list(references_in({"a": ["${s.x}"], "b": {"c": "${t-1.y}"}})) == [("s", "x"), ("t-1", "y")]


def test_equal_content_has_an_equal_key() -> None:
    short = normalized({"dataset": DIGEST}, TrainRequest)
    long = normalized({"seed": 0, "epochs": 2, "dataset": DIGEST}, TrainRequest)  # the defaults, in another order
    key = content_key("trainer/1.train", "trainer", "1", short)
    assert len(key) == 64
    assert key == content_key("trainer/1.train", "trainer", "1", long)
    others = [content_key("trainer/1.train", "trainer", "2", short), content_key("trainer/1.train", "other", "1", short),
              content_key("trainer/1.train", "trainer", "1", normalized({"dataset": DIGEST, "seed": 1}, TrainRequest))]  # fmt: skip
    assert len({key, *others}) == 4
    assert same_content(spec(), spec())
    assert not same_content(spec(), spec(priority=1))


def test_digests_are_found_wherever_they_are() -> None:
    assert sorted(digests_in({"a": DIGEST, "b": [{"c": OTHER}], "d": "sha256:short"})) == [DIGEST, OTHER]


def job(stage: str, state: str, result: dict | None = None, uses: str = "trainer/1.train") -> JobRecord:
    fault = FaultBody("plugin", "x", "boom")
    return JobRecord(f"news-1-{stage}", JobSpec(stage, uses, {}), "key", state, result=result or {}, fault=fault)


def test_stages_start_when_what_they_refer_to_is_known() -> None:
    run = RunRecord("news-1", spec())

    def names(**jobs: JobRecord) -> list[str]:
        started = msgspec.structs.replace(run, jobs={name: j.id for name, j in jobs.items()})
        return [stage.name for stage in ready_stages(started, jobs)]

    assert names() == ["prepare"]
    assert names(prepare=job("prepare", "running")) == []
    assert names(prepare=job("prepare", "done")) == ["train"]
    assert names(prepare=job("prepare", "done"), train=job("train", "done")) == ["optimize"]
    parallel = with_stage(1, **{"with": {"dataset": DIGEST}})
    assert [s.name for s in ready_stages(RunRecord("n", parallel), {})] == ["prepare", "train"]


def test_a_run_is_over_when_all_stages_are_or_one_has_failed() -> None:
    run = RunRecord("news-1", spec())
    done = {name: job(name, "done") for name in ("prepare", "train", "optimize")}
    assert outcome(run, done) == ("running", None)
    deploying, serving = job("deploy", "running", uses="deploy"), job("deploy", "running", {"model": "news"}, "deploy")
    assert outcome(run, done | {"deploy": deploying}) == ("running", None)
    assert outcome(run, done | {"deploy": serving}) == ("done", None)
    state, fault = outcome(run, done | {"train": job("train", "dead")})
    assert (state, fault and fault.message) == ("failed", "stage 'train': boom")
    assert outcome(run, done | {"train": job("train", "cancelled")}) == ("cancelled", None)
