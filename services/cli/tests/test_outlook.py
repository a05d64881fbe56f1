"""`kernelm jobs why` and `plan` against a running system, as a user types them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from kernelm_contracts.trainer import ModelCard

pytestmark = pytest.mark.slow
JOBS = "[quotas]\nacme = { cpu = 0.5, memory_mb = 4000, gpus = 0 }\n"  # the model takes all of its cores


class Shell:
    """A folder, and a system whose only node gives away one core: half of it serves a model of the tenant acme."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What the command prints: on stdout, or on stderr where it is to fail."""
        env = os.environ | {"KERNELM_HOME": str(self.folder / "home"), "KERNELM_NODE_CPU": "1", "KERNELM_LEASE_S": "30"}
        done = subprocess.run([sys.executable, "-m", "kernelm_cli", *arguments], env=env, cwd=self.folder, capture_output=True,
                              text=True, check=False, timeout=240)  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if code else done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def run_file(self, name: str, *cores: float, tenant: str = "default") -> str:
        """A run of independent stages that ask for so many cores each."""
        lines = [f'name = "{name}"', f'tenant = "{tenant}"']
        for number, cpu in enumerate(cores):
            lines += ["[[stage]]", f'name = "stage{number}"', 'uses = "data/1.prepare"', 'with = { source = { folder = "texts" } }',
                      f"resources = {{ cpu = {cpu}, memory_mb = 100 }}"]  # fmt: skip
        (self.folder / f"{name}.toml").write_text("\n".join(lines))
        return f"{name}.toml"

    def waiting(self, job: str) -> dict[str, Any]:
        """The outlook of a job that waits, as soon as the scheduler has seen it."""
        end = time.monotonic() + 60.0
        while True:
            found: dict[str, Any] = self.json("jobs", "why", job)
            if found["action"] == "wait":
                return found
            assert time.monotonic() < end, found


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("outlook"))
    for label, words in (("sports", "a goal in the match"), ("tech", "a chip in the box")):
        (shell.folder / "texts" / label).mkdir(parents=True)
        for number in range(5):
            (shell.folder / "texts" / label / f"{number}.txt").write_text(f"{words} number {number}")
    weights = {"idf": np.ones(2, np.float32), "weight": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    model = shell.folder / "model"
    model.mkdir()
    save_file(weights, model / "linear.safetensors")
    (model / "vocabulary.json").write_text('{"goal": 0, "chip": 1}')
    card = ModelCard("words", "text-classification", "tfidf-linear", ("sports", "tech"), 64, request={"ngrams": 1})
    (model / "model.json").write_bytes(msgspec.json.encode(card))
    (shell.folder / "home").mkdir(mode=0o700)
    (shell.folder / "home" / "jobs.toml").write_text(JOBS)
    shell("up", "--detach")
    try:
        shell("model", "import", "model", "--name", "words")
        shell("model", "deploy", "words", "words", "--tenant", "acme", "--cpu", "0.5")
        yield shell
    finally:
        shell("down")


def test_why_names_what_a_job_waits_for_and_what_would_start_it(shell: Shell) -> None:
    shell("run", "--no-follow", shell.run_file("quota", 0.25, tenant="acme"))
    found = shell.waiting("quota-1-stage0")
    assert found["reason"] == "waits: needs 0.25 cores, the quota of tenant acme has 0 left"
    assert found["remedy"] == "deployment words of tenant acme is taken away (`kernelm model undeploy words`), or a larger quota"
    said = shell("jobs", "why", "quota-1-stage0").splitlines()
    assert [line.split("  ")[0] for line in said] == ["job", "state", "why", "what would start it", "waits behind", "starts"]
    told = " ".join(" ".join(said).split())
    assert "state queued why needs 0.25 cores, the quota of tenant acme has 0 left" in told
    assert "(`kernelm model undeploy words`), or a larger quota waits behind nobody" in told
    assert "starts not known: no estimate says when that is" in told

    shell("run", "--no-follow", shell.run_file("cores", 0.75))
    assert shell.waiting("cores-1-stage0")["reason"] == "waits: needs 0.75 cores, node local has 0.5 free"
    of_run = " ".join(shell("jobs", "why", "cores-1").split())
    assert "job cores-1-stage0 (stage0) state queued why needs 0.75 cores, node local has 0.5 free" in of_run
    assert "waits behind 1 job" in of_run

    assert "can never run" in shell("run", shell.run_file("never", 64), code=1)
    over = " ".join(shell("jobs", "why", "never-1-stage0").split())
    assert "state dead why can never run: needs 64 cores, node local has 1 in all remedy ask for less, or add a node" in over
    for run in ("quota-1", "cores-1"):
        shell("jobs", "cancel", run)
    assert "no job that waits or runs" in shell("jobs", "why", "quota-1")
    assert "cancelled by admin" in shell("jobs", "why", "quota-1-stage0")


def test_why_of_a_job_that_serves_says_what_it_serves_and_where(shell: Shell) -> None:
    [job] = [job["id"] for job in shell.json("jobs", "list") if job["spec"]["uses"] == "deploy"]
    told = " ".join(shell("jobs", "why", job).split())
    assert "state running on local why answers as words, generation 1" in told


def test_plan_says_when_and_where_and_creates_nothing(shell: Shell) -> None:
    jobs, artifacts = shell.json("jobs", "list"), shell.json("artifacts", "list")
    file = shell.run_file("plan", 0.25, 0.75, 64)
    now, later, never = shell.json("jobs", "plan", file)["stages"]
    assert (now["action"], now["node"], now["state"]) == ("place", "local", "planned")
    assert now["starts"] == pytest.approx(time.time(), abs=60.0)
    assert (later["action"], later["reason"]) == ("wait", "waits: needs 0.75 cores, node local has 0.5 free")
    assert (never["action"], never["starts"]) == ("reject", 0.0)
    table = [line.strip("│").split("│") for line in shell("jobs", "plan", file).splitlines() if line.startswith("│")]
    rows = [row for line in table if (row := [cell.strip() for cell in line])[0]]  # without what was folded
    assert [row[:3] for row in rows] == [["stage0", "now", "local"], ["stage1", "not known", ""], ["stage2", "never", ""]]
    assert rows[1][3] == "needs 0.75 cores, node local has 0.5 free"
    assert rows[1][4] == "deployment words, with 0.5 cores on node local, is taken away"  # the rest is folded
    assert rows[2][3] == "needs 64 cores, node local has 1 in all"
    mine = shell.json("jobs", "plan", shell.run_file("plan", 0.25, tenant="acme"))["stages"][0]
    assert mine["reason"] == "waits: needs 0.25 cores, the quota of tenant acme has 0 left"
    assert (shell.json("jobs", "list"), shell.json("artifacts", "list")) == (jobs, artifacts)


def test_bad_input_ends_in_a_clear_error(shell: Shell) -> None:
    fault = shell("jobs", "why", "nothing", code=2)
    assert "there is no job and no run 'nothing'" in fault
    assert "`kernelm jobs` lists the jobs" in fault
    assert "absent.toml does not exist" in shell("jobs", "plan", "absent.toml", code=2)
    file = shell.folder / "bad.toml"
    for text, what, remedy in (
        ("name = [", "bad.toml: Invalid value", "correct the TOML"),
        ('name = "x"\n', "missing required field", "correct the value"),
        ('name = "x"\nstage = []\n', "has no [[stage]]", "at least one stage"),
        ('name = "x"\n[[stage]]\nname = "a"\nuses = "data/1.prepar"\n', "'data/1.prepar' does not exist", "use data/1.prepare"),
        ('name = "x"\n[[stage]]\nname = "a"\nuses = "data/1.prepare"\nresources = { cpus = 1 }\n', "unknown field `cpus`", "'cpu'"),
        ('name = "x"\n[[stage]]\nname = "a"\nuses = "data/1.prepare"\nresources = { disk = 1 }\n', "unknown field `disk`",
         "known here: cpu, memory_mb, gpus"),
    ):  # fmt: skip
        file.write_text(text)
        fault = shell("jobs", "plan", "bad.toml", code=2)
        assert what in fault
        assert remedy in fault
