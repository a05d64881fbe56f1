"""The schedule over time, from events to the picture."""

from pathlib import Path

import pytest

from kernelm_cli.timeline import Lane, Span, cut, draw, held, lanes
from kernelm_contracts.jobs import JobChanged, ModelScaled
from kernelm_sdk.errors import ClientFault


def job(at: float, state: str, cpu: float = 0.0, id: str = "j", why: str = "", **more):
    return at, JobChanged(job=id, name=id, run="", state=state, epoch=1, why=why, tenant="lab", cpu=cpu, **more)


def scaled(at: float, replicas: int):
    return at, ModelScaled(model="news", replicas=replicas, was=0, why="", node="n", tenant="shop", cpu=0.5)


EVENTS = [job(0.0, "queued"), job(1.0, "queued", why="waits"), job(4.0, "placed", 1.0), job(5.0, "running", 1.0), scaled(6.0, 2),
          job(7.0, "placed", 0.5, "d", uses="deploy"), job(8.0, "queued", why="made room"), scaled(9.0, 0),
          job(9.0, "running", 1.0), job(12.0, "done")]  # fmt: skip


def test_events_become_lanes() -> None:
    first, model = lanes(EVENTS, 20.0)
    assert [(s.begin, s.end, s.cpu, s.state) for s in first.spans] == [
        (0.0, 4.0, 0.0, "queued"), (4.0, 5.0, 1.0, "placed"), (5.0, 8.0, 1.0, "running"), (8.0, 9.0, 0.0, "queued"),
        (9.0, 12.0, 1.0, "running")]  # fmt: skip
    assert first.core_s == 7.0
    assert (model.name, model.tenant, model.model) == ("model news", "shop", True)  # and no lane for the deployment's job
    assert [(s.begin, s.end, s.cpu) for s in model.spans] == [(6.0, 9.0, 1.0), (9.0, 20.0, 0.0)]


def test_what_is_held_adds_up() -> None:
    moments, levels = held(lanes(EVENTS, 20.0))
    at = {moment: {group: row[i] for group, row in levels.items()} for i, moment in enumerate(moments)}
    assert at[5.0] == {"lab": 1.0, "model news": 0.0}
    assert at[6.0] == {"lab": 1.0, "model news": 1.0}
    assert at[8.0] == {"lab": 0.0, "model news": 1.0}
    assert at[12.0] == {"lab": 0.0, "model news": 0.0}


def test_only_the_last_part_is_kept() -> None:
    found = cut(lanes(EVENTS, 20.0), 10.0)
    assert [[(s.begin, s.end) for s in lane.spans] for lane in found] == [[(10.0, 12.0)], [(10.0, 20.0)]]
    assert cut(found, 30.0) == []


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "t.png"
    draw(path, lanes(EVENTS, 20.0), 2.0, [("calls/s", [(0.0, 1.0), (10.0, 5.0)])], "a title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000
    with pytest.raises(ClientFault, match="no job has been placed"):
        draw(path, [Lane("j", "lab")])
    assert Span(0.0, 1.0, 0.0).state == ""
