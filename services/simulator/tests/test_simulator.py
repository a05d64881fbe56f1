"""Exact completion times of tiny cases, what every step keeps, readers of the public formats, the bound, and the command."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Share
from kernelm_sdk.errors import ClientFault
from kernelm_simulator import synthetic
from kernelm_simulator.bound import least_average
from kernelm_simulator.cluster import parse
from kernelm_simulator.engine import Options, Simulation
from kernelm_simulator.metrics import summarize
from kernelm_simulator.picture import draw, held
from kernelm_simulator.profiles import Profiles
from kernelm_simulator.schedulers import load
from kernelm_simulator.trace import TraceJob, read
from kernelm_simulator.work import FixedWork, Pace

SIA_DATA = os.environ.get("KERNELM_SIA_DATA", "")


def job(id: str, submitted: float, seconds: float, members: int = 1, restart_s: float = 0.0) -> TraceJob:
    return TraceJob(id, submitted, FixedWork(seconds, members, restart_s=restart_s), members)


def ends(jobs: list[TraceJob], cluster: str, scheduler: str, **options) -> dict[str, float]:
    loaded = load(scheduler)
    result = Simulation(jobs, parse(cluster), loaded.decide, Options(rigid=not loaded.resizes, **options)).run()
    return {run.job.id: run.finished for run in result.runs}


def test_first_in_first_out_to_the_second() -> None:
    jobs = [job("a", 0, 100, 2), job("b", 10, 100, 2), job("c", 20, 30)]
    # a from 0; b waits for a, until the round at 120; c behind b, though a device is never free before 120 + 100 -> round at 240
    assert ends(jobs, "1x2", "fifo") == {"a": 100, "b": 220, "c": 270}


def test_who_is_asked_sooner_places_sooner() -> None:
    jobs = [job("a", 0, 100, 2), job("b", 10, 100, 2), job("c", 20, 30)]
    assert ends(jobs, "1x2", "fifo", round_s=5.0) == {"a": 100, "b": 200, "c": 230}
    for nonsense in ({"round_s": 0.0}, {"refresh_s": -1.0}, {"round_s": float("nan")}):
        with pytest.raises(ClientFault, match="rounds have no distance"):
            ends(jobs, "1x2", "fifo", **nonsense)


def test_the_shortest_goes_first_and_a_preempted_job_pays_for_its_restart() -> None:
    jobs = [job("long", 0, 1000, restart_s=20), job("short", 50, 40, restart_s=20)]
    # long works from 20 to 60 (40 s done), short works from 80 to 120, long restarts at 120 and works 960 s from 140 on
    assert ends(jobs, "1x1", "srtf") == {"long": 1100, "short": 120}


def test_an_elastic_job_is_as_fast_as_its_curve() -> None:
    # half of 1000 s is serial: with 4 members 500 + 125 s, after 20 s of start
    assert ends([TraceJob("a", 0, FixedWork(1000, 1, serial=0.5, restart_s=20), 1, 4)], "1x4", "sia") == {"a": 645}


def test_a_pace_leads_there_and_back() -> None:
    pace = Pace((0, 10, 30), (0, 5, 25))
    assert [pace.speed(p) for p in (0, 9, 10, 30)] == [2, 2, 1, 1]
    assert [pace.progress(pace.time(p)) for p in (0, 4, 10, 22, 30)] == [0, 4, 10, 22, 30]


def test_a_scheduler_that_takes_what_is_taken_is_stopped() -> None:
    def greedy(state: ClusterState) -> Decisions:
        places = [Decision(j.id, "place", "node-000", allocation=(Share("node-000", 2),)) for j in state.pending]
        return Decisions(state.version, tuple(places))

    with pytest.raises(ClientFault, match="2 members on node node-000, which has 0 free"):
        Simulation([job("a", 0, 10, 2), job("b", 0, 10, 2)], parse("1x2"), greedy).run()


def test_a_job_that_is_never_placed_does_not_hang_the_simulation() -> None:
    with pytest.raises(ClientFault, match="places none"):
        ends([job("a", 0, 10, 5)], "1x4", "fifo", refresh_s=86400.0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scheduler=st.sampled_from(["fifo", "srtf", "las", "pollux", "sia", "scheduler"]))
def test_every_job_ends_after_no_less_than_its_work_and_nothing_is_lost(seed: int, scheduler: str) -> None:
    jobs = synthetic.generate("poisson", 12, seed, per_hour=60)
    cluster, loaded = parse("2x8:x,2x4:y"), load(scheduler)
    first, second = (Simulation(jobs, cluster, loaded.decide, Options(rigid=not loaded.resizes)).run() for _ in range(2))
    assert first.changes == second.changes  # deterministic
    assert all(run.finished >= run.job.submitted for run in first.runs)
    for run in first.runs:  # no faster than with all it can use, and device seconds are those of its allocations
        fastest = run.work.pace("x", (max(run.job.most, run.job.members),)).total if run.elastic else run.work.total
        assert run.finished - run.job.submitted >= fastest + run.work.restart_s - 1e-6
    area, now, at = 0.0, 0, 0.0
    levels: dict[str, int] = {}
    for change in first.changes:
        area, at = area + now * (change.time - at), change.time
        now += change.members - levels.get(change.job, 0)
        levels[change.job] = change.members
        assert 0 <= now <= cluster.devices
    assert area == pytest.approx(sum(run.served_s for run in first.runs))
    summary = summarize(scheduler, first, cluster)
    assert summary.average >= least_average(jobs, cluster, rigid=not loaded.resizes) - 1e-6


def test_the_bound_of_one_job_is_what_it_takes() -> None:
    assert least_average([job("a", 0, 100, 2)], parse("1x2"), rigid=True) == pytest.approx(100)
    assert least_average([job("a", 0, 100), job("b", 0, 300)], parse("1x1"), rigid=True) == pytest.approx(250)


@pytest.mark.parametrize(("text", "expected"), [
    ("timestamp,duration,num_gpus,gpu_time,cluster\n"
     "2017-10-09 07:02:55,66.0,2,132.0,11cb48\n2017-10-09 07:01:55,60.0,1,60.0,6214e9\n"
     "2017-10-09 07:01:55,60.0,0,0.0,6214e9\n", [(0, 60, 1, "6214e9"), (60, 66, 2, "11cb48")]),
    ("job_id,user,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue,vc\n"
     "7,u1,8,64,1,COMPLETED,2020-04-01 10:00:00,2020-04-01 10:00:10,2020-04-01 10:01:10,60,10,vcA\n", [(0, 60, 8, "vcA")]),
    ("job_id,user,node_num,gpu_num,cpu_num,type,state,submit_time,start_time,end_time,duration,queue,gpu_time\n"
     "s1,u,1,4.0,64,SFT,COMPLETED,2023-03-01 00:00:00+08:00,2023-03-01 00:00:00+08:00,2023-03-01 00:02:00+08:00,120,0,9\n",
     [(0, 120, 4, "SFT")]),
    ("j1,worker,3.0,Terminated,1000.0,1300.0,600.0,29.3,50.0,MISC\nj2,ps,1.0,Failed,,,600.0,29.3,,CPU\n", [(0, 300, 3, "default")]),
])  # fmt: skip
def test_public_formats_are_known_by_their_columns(tmp_path: Path, text: str, expected: list[tuple]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    assert [(j.submitted, j.work.total, j.members, j.tenant) for j in read(path)] == expected


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,duration,num_gpus,cluster\n2017-10-09 07:02:55,soon,2,x\n")
    with pytest.raises(ClientFault, match=r"line 2.*soon"):
        read(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ClientFault, match="of no format"):
        read(path)


PROFILE = {
    "placements-t.csv": "placement,local_bsz,step_time,sync_time\n1,64,0.5,0.1\n1,128,1.0,0.1\n2,64,0.6,0.2\n2,128,1.1,0.2\n",
    "scalability-t.csv": "num_nodes,num_replicas,local_bsz,step_time,sync_time\n2,2,64,0.8,0.4\n2,2,128,1.3,0.4\n",
    "validation-128.csv": "progress,iteration,metric,grad_sqr,grad_var\n100,100,0.5,1.0,1.0\n200,200,0.6,1.0,3.0\n",
    "validation-256.csv": "progress,iteration,metric,grad_sqr,grad_var\n100,70,0.5,1.0,1.0\n200,140,0.6,1.0,3.0\n",
}


def test_goodput_is_throughput_times_efficiency(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    for name, text in PROFILE.items():
        (folder / name).write_text(text)
    application = Profiles(tmp_path).work("bert").application
    # one device, batch 128: 1 s an iteration, which makes 1 of progress, 1.2 times slower; two devices: 64 each, 0.6 s
    assert application.speeds("t", (1,), 128)[0] == pytest.approx(1 / 1.2)
    assert application.speeds("t", (2,), 128)[0] == pytest.approx(1 / 0.6 / 1.2)
    # batch 256 on two devices: 1.1 s an iteration of (1 + 1) / (1 / 2 + 1) of progress, then of (3 + 1) / (3 / 2 + 1)
    assert application.speeds("t", (2,), 256) == pytest.approx([2 / 1.5 / 1.1 / 1.2, 4 / 2.5 / 1.1 / 1.2])
    assert all(application.speeds("t", (2,)) >= application.speeds("t", (2,), 256) - 1e-9)
    # on one device accumulated: two passes of 128, of which one synchronizes
    assert application.speeds("t", (1,), 256)[0] == pytest.approx(2 / 1.5 / 1.9 / 1.2)
    assert application.speeds("t", (1, 1), 128)[0] == pytest.approx(1 / 0.8 / 1.2)  # from scalability, on two nodes


def test_a_picture_shows_what_was_held(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cluster = parse("1x2")
    result = Simulation([job("a", 0, 100, 2), job("b", 10, 100, 1)], cluster, load("fifo").decide, Options(rigid=True)).run()
    groups, moments, levels = held(result, "job")
    assert (groups, moments) == (["a", "b"], [0.0, 100.0, 120.0, 220.0])
    assert (levels["a"], levels["b"]) == ([2, 0, 0, 0], [0, 0, 1, 0])
    for by in ("job", "tenant", "type"):
        draw(tmp_path / f"{by}.png", [("fifo", result)], cluster, by)
        assert (tmp_path / f"{by}.png").stat().st_size > 10_000


def test_the_command_compares(capsys: pytest.CaptureFixture[str]) -> None:
    from kernelm_cli.app import execute

    assert execute(["simulate", "--trace", "poisson", "--jobs", "20", "--cluster", "2x8", "--scheduler", "fifo,sia", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    fifo, sia = answer["schedulers"]
    assert fifo["jobs"] == sia["jobs"] == 20
    assert answer["bound"] <= sia["average"] <= fifo["average"]
    assert execute(["simulate", "--trace", "poisson", "--scheduler", "nobody"]) == 2


@pytest.mark.skipif(not SIA_DATA, reason="KERNELM_SIA_DATA names no folder with the Sia artifact's workloads and profiles")
def test_a_workload_of_sia_is_replayed_whole() -> None:
    folder = Path(SIA_DATA)
    jobs = read(folder / "philly/workload-4.csv", Profiles(folder / "profiles"))
    loaded, cluster = load("srtf"), parse("6x4:aws,3x8:rtx,2x8:dgx-ext")
    summary = summarize("srtf", Simulation(jobs, cluster, loaded.decide, Options(rigid=True)).run(), cluster)
    assert (summary.jobs, summary.rejected) == (160, 0)
    assert summary.average > least_average(jobs, cluster)
