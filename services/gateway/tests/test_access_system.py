"""Access through a real broker, kernel, job table and gateway process: a token of an issuer, a limit, one account, the audit,
and a real Prometheus that reads it all."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlparse

import grpc
import httpx
import msgspec
import oidc_provider_mock
import pytest
from google.protobuf import message_factory

from kernelm.testing.harness import System, until
from kernelm.testing.otlp import Collector
from kernelm.testing.parts import absent
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, GenerateFrame, GenerateRequest, Label, Server, Usage
from kernelm_data.plugin import DataPlugin
from kernelm_gateway import open_inference, protobuf
from kernelm_gateway.service import Announcement
from kernelm_sdk.bus import Bus
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.links import Credentials
from kernelm_sdk.plugin import Manifest, Plugin, find_manifests
from kernelm_sdk.ports import free_port
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

ROOT = Path(__file__).parents[3]
POLICY = """
[oidc]
issuer = "{issuer}"
audience = "kernelm"
[oidc.roles.analysts]
tenant = "acme"
models = ["news"]
methods = ["classify"]

[private]
hooli = "both"

[[limits]]
tenant = "initech"
requests_per_minute = 2
"""


class Answering(Plugin, Server):
    heard: ClassVar[list[str]] = []

    async def generate(self, request: GenerateRequest, call: Any) -> AsyncIterator[GenerateFrame]:
        """Says what it was told, four characters at a time."""
        text = request.prompt or request.messages[-1].content
        self.heard.append(text)
        answer = f"You said {text} and I am jane.roe@example.org."
        for at in range(0, len(answer), 4):
            yield GenerateFrame(answer[at : at + 4])
        yield GenerateFrame("", "stop", Usage(3, 4), call.model, 1, "sha256:0")

    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        return ClassifyReply(call.model, 1, "sha256:0", ((Label("sports", 0.9),),), 5, 0.1)

    def models(self) -> tuple[str, ...]:
        return ("news",)


@pytest.fixture
async def system() -> AsyncIterator[tuple[System, str]]:
    """The system, and its issuer."""
    users = [oidc_provider_mock.User(sub="ada", claims={"roles": "analysts"})]
    with oidc_provider_mock.run_server_in_thread(user_claims=users) as server:
        issuer = f"http://localhost:{server.server_port}"
        async with System() as system:
            (system.home / "gateway.toml").write_text(POLICY.format(issuer=issuer))
            await system.plugin(Answering, Manifest("answering", "1.0.0", "", ("server/1",), "x:Y"))
            await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("answering", 100),), 1, "sha256:0"))
            await system.service("jobs")
            await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0")
            yield system, issuer


def client(system: System, token: str) -> httpx.AsyncClient:
    where = msgspec.json.decode((system.home / "run" / "gateway.json").read_bytes(), type=Announcement)
    return httpx.AsyncClient(base_url=where.http, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=30)


def id_token(issuer: str) -> str:
    asked = {"client_id": "kernelm", "redirect_uri": "http://c/cb", "response_type": "code", "scope": "openid"}
    with httpx.Client(trust_env=False) as browser:
        at = browser.post(f"{issuer}/oauth2/authorize", params=asked, data={"sub": "ada"}).headers["location"]
        code = {"grant_type": "authorization_code", "code": parse_qs(urlparse(at).query)["code"][0], "redirect_uri": "http://c/cb"}
        return browser.post(f"{issuer}/oauth2/token", data=code, auth=("kernelm", "s")).json()["id_token"]


BODY = {"model": "news", "input": "Ada Lovelace scored twice."}


async def test_one_account_over_http_and_nats_whoever_asks_and_a_line_for_each_call(system: tuple[System, str]) -> None:
    running, issuer = system
    seed = new_seed()
    made = await running.admin.call(Kernel.create_key, KeyRequest("acme", tenant="acme", public_key=public_key(seed)))
    async with client(running, made.secret) as by_key, client(running, id_token(issuer)) as by_token:
        assert (await by_key.post("/v1/classify", json=BODY)).status_code == 200
        assert (await by_token.post("/v1/classify", json=BODY)).status_code == 200
        assert (await by_token.post("/v1/embeddings", json=BODY)).status_code == 403, "the role has classify alone"
        nats = await running.track(Bus.connect(running.broker.url, Credentials(f"key-{made.key.id}", made.jwt, seed)))
        await nats.call(Server.classify, ClassifyRequest(("Ada Lovelace scored twice.",)), model="news")

        async def counted() -> bool:
            days = (await by_token.get("/v1/usage")).json()["days"]
            wanted = {"calls": 3, "failed": 0, "input_tokens": 15, "output_tokens": 0}
            return bool(days) and days[-1]["usage"]["calls"].get("news") == wanted

        await until(counted, 30, "three calls on acme's account")
    audit = running.home / "logs" / "audit.jsonl"
    await until(lambda: audit.exists() and audit.read_text().count('"model":"news"') >= 2, 10, "the audit")
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    ours = [line for line in lines if line.get("model") == "news"]
    assert [(line["name"], line["tenant"], line["outcome"], line["input_tokens"]) for line in ours] == [
        ("acme", "acme", "ok", 5), ("ada", "acme", "ok", 5),
    ]  # fmt: skip
    assert "Lovelace" not in audit.read_text()


async def test_a_limit_is_the_tenants_and_says_when_to_come_back(system: tuple[System, str]) -> None:
    running, _ = system
    secrets = [(await running.admin.call(Kernel.create_key, KeyRequest(f"k{n}", tenant="initech"))).secret for n in range(2)]
    async with client(running, secrets[0]) as one, client(running, secrets[1]) as other:
        assert [(await c.post("/v1/classify", json=BODY)).status_code for c in (one, other)] == [200, 200]
        refused = await one.post("/v1/classify", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 60


def said(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


SECRET = "write to john.doe@example.com or +49 30 901820"


async def test_private_data_is_redacted_where_it_is_asked_for_and_nothing_goes_unread(system: tuple[System, str]) -> None:
    running, _ = system
    chat = {"model": "news", "messages": [{"role": "user", "content": SECRET}]}
    mine, theirs = [(await running.admin.call(Kernel.create_key, KeyRequest(t, tenant=t))).secret for t in ("acme", "hooli")]
    async with client(running, mine) as by_me, client(running, theirs) as by_them:
        refused = await by_me.post("/v1/chat/completions", json=chat, headers={"Kernelm-Redact": "both"})
        assert refused.status_code == 503, "nobody redacts yet: the call must not go through"
        assert Answering.heard == []
        manifest = find_manifests()[0]["data"]
        await running.plugin(DataPlugin, manifest)

        async def there() -> bool:
            return (await by_me.post("/v1/chat/completions", json=chat, headers={"Kernelm-Redact": "both"})).status_code == 200

        await until(there, 30, "the detector")
        for caller, header in ((by_me, {"Kernelm-Redact": "both"}), (by_them, {})):  # by request, and by policy
            Answering.heard.clear()
            whole = said(await caller.post("/v1/chat/completions", json=chat, headers=header))
            streamed = ""
            async with caller.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}, headers=header) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        streamed += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            assert streamed == whole
            for text in (whole, *Answering.heard):
                assert "john.doe" not in text
                assert "901820" not in text
                assert "write to" in text
            assert "jane.roe" not in whole
        Answering.heard.clear()
        plain = said(await by_me.post("/v1/chat/completions", json=chat))
        assert SECRET in plain, "who does not ask is not redacted"
        wrong = await by_me.post("/v1/chat/completions", json=chat, headers={"Kernelm-Redact": "all"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "kernelm-redact")


async def test_prometheus_reads_it_and_knows_every_name_that_is_asked_for(system: tuple[System, str], tmp_path: Path) -> None:
    if missing := [tool for tool in ("prometheus", "promtool") if shutil.which(tool) is None]:
        absent(f"needs {' and '.join(missing)}: apt-get install prometheus")
    running, _ = system
    made = await running.admin.call(Kernel.create_key, KeyRequest("prometheus", methods=("metrics", "classify"), tenant="acme"))
    where = urlparse(msgspec.json.decode((running.home / "run" / "gateway.json").read_bytes(), type=Announcement).http)
    port = free_port()
    (tmp_path / "key").write_text(made.secret)
    shutil.copy(ROOT / "deploy" / "observability" / "alerts.yaml", tmp_path)
    targets = f"[{{targets: ['{where.netloc}']}}]"
    (tmp_path / "prometheus.yaml").write_text(
        "global: {scrape_interval: 5s}\nrule_files: [alerts.yaml]\nscrape_configs:\n- job_name: kernelm\n"
        f"  authorization: {{credentials_file: {tmp_path}/key}}\n  static_configs: {targets}\n")  # fmt: skip
    judged = await asyncio.to_thread(subprocess.run, ["promtool", "check", "config", str(tmp_path / "prometheus.yaml")],
                                     capture_output=True, text=True, check=False)  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        own = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        async with client(running, made.secret) as caller, own as ask:
            await caller.post("/v1/classify", json=BODY)

            async def query(text: str) -> Any:
                answer = await ask.get("/api/v1/query", params={"query": text})
                assert answer.status_code == 200, f"{text}: {answer.text}"
                return answer.json()["data"]["result"]

            async def read() -> bool:
                try:
                    if (await ask.get("/-/ready")).is_error:  # 503 as it starts
                        return False
                except httpx.TransportError:
                    return False
                return bool(await query('gen_ai_client_operation_duration_seconds_count{gen_ai_request_model="news"} > 0'))

            await until(read, 60, "the first reading")
            names = set((await ask.get("/api/v1/label/__name__/values")).json()["data"])
            assert {"kernelm_up", "kernelm_instances", "kernelm_model_generation", "kernelm_health"} <= names
            assert all(float(one["value"][1]) == 1 for one in await query("kernelm_health"))
            for text in _queries():  # each can be asked, and asks for nothing that there never is
                await query(text)
                used = {n for n in _names(text) if n not in names}
                assert used <= RARE, f"{text}: nobody writes {used}"
            loaded = (await ask.get("/api/v1/rules")).json()["data"]["groups"][0]["rules"]
            assert len(loaded) == 8
            assert not [r for r in loaded if r["state"] == "firing"]
    finally:
        process.terminate()
        process.wait()


# written when there is something to write: a stream's first frame, budgets, pools that the kernel is to keep, tenants' holdings
RARE = {"gen_ai_client_operation_time_to_first_chunk_seconds_bucket", "kernelm_budget_spent", "kernelm_instances_wanted",
        "kernelm_tenant_core_seconds_total", "kernelm_tenant_tokens_total", "kernelm_jobs"}  # fmt: skip


def _queries() -> list[str]:
    """Every expression of the dashboard."""
    dashboard = json.loads((ROOT / "deploy" / "observability" / "grafana" / "dashboards" / "kernelm.json").read_text())
    return [t["expr"].replace("$__rate_interval", "1m") for panel in dashboard["panels"] for t in panel["targets"]]


def _names(text: str) -> list[str]:
    return re.findall(r"\b(?:kernelm|gen_ai_client)_[a-z_]+", text)



async def test_a_trace_goes_from_the_caller_through_the_gateway_to_the_model(system_traced: Any) -> None:
    """With a header of the caller's it goes on; without it begins at the gateway. No span holds what was said."""
    running, collector = system_traced
    made = await running.admin.call(Kernel.create_key, KeyRequest("acme"))
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with client(running, made.secret) as caller:
        assert (await caller.post("/v1/classify", json=BODY, headers={"traceparent": given})).status_code == 200
        assert (await caller.post("/v1/classify", json=BODY)).status_code == 200

    def whole() -> bool:
        traces = {s.trace_id.hex() for s in collector.spans}
        ours = [s for s in collector.spans if s.trace_id.hex() == given[3:35]]
        return len(traces) == 2 and {s.name for s in ours} >= {"server/1/classify news", "server/1/classify"}

    await until(whole, 20, "two traces")
    door = next(s for s in collector.spans if s.trace_id.hex() == given[3:35] and s.name == "server/1/classify news")
    assert door.parent_span_id.hex() == given[36:52]
    audit = running.home / "logs" / "audit.jsonl"
    await until(audit.read_text, 20, "the audit's first line")  # lines are written together, a tenth of a second later
    line = json.loads(audit.read_text().splitlines()[0])
    assert line["trace"] == given[3:35]
    assert b"Lovelace" not in collector.raw


async def test_each_door_goes_on_with_its_callers_trace(system_traced: Any) -> None:
    """Management over HTTP, a contract over gRPC, and the Open Inference Protocol."""
    running, collector = system_traced
    made = await running.admin.call(Kernel.create_key, KeyRequest("acme", admin=True))
    given = [f"00-{k:032x}-b7ad6b7169203331-01" for k in (1, 2, 3)]
    where = msgspec.json.decode((running.home / "run" / "gateway.json").read_bytes(), type=Announcement)
    async with client(running, made.secret) as caller, grpc.aio.insecure_channel(where.grpc) as channel:
        assert (await caller.get("/v1/kernel/state", headers={"traceparent": given[0]})).status_code == 200
        for trace, (service, method, file, fields) in zip(given[1:], GRPC_CALLS, strict=True):
            described = protobuf.make_pool([file]).FindServiceByName(service).methods_by_name[method]
            taken, reply = map(message_factory.GetMessageClass, (described.input_type, described.output_type))
            stub = channel.unary_unary(f"/{service}/{method}", taken.SerializeToString, reply.FromString)
            metadata = (("authorization", f"Bearer {made.secret}"), ("traceparent", trace))
            await stub(taken(**fields), metadata=metadata, timeout=20)
    doors = {"kernel/1/state", "server/1/classify news"}
    await until(lambda: {s.trace_id.hex() for s in collector.spans if s.name in doors} == {t[3:35] for t in given}, 20, "the spans")


INPUTS = [{"name": "text", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"Ada"]}}]
GRPC_CALLS = (
    ("kernelm.server.v1.Server", "Classify", protobuf.describe(Server), {"model": "news", "input": ["Ada"]}),
    (open_inference.SERVICE, "ModelInfer", open_inference.describe(),
     {"model_name": "news", "inputs": INPUTS, "parameters": {"method": {"string_param": "classify"}}}),
)  # fmt: skip


@pytest.fixture
async def system_traced(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    collector = Collector()
    async with System() as system:
        await system.plugin(Answering, Manifest("answering", "1.0.0", "", ("server/1",), "x:Y"))
        await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("answering", 100),), 1, "sha256:0"))
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0", **traced)
        yield system, collector
    collector.close()
