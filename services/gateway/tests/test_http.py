"""HTTP: what each route answers, and how it refuses. The application runs in memory; the sockets are in test_service.py."""

import base64
import re
import struct
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kernelm_contracts.server import Entity, ExtractReply
from kernelm_contracts.usage import UsageQuery
from kernelm_sdk.errors import KernelFault

DIGEST = "sha256:" + "ab" * 32


def error(response: httpx.Response) -> dict[str, Any]:
    """The error in the answer, which has OpenAI's form and no stack trace."""
    assert set(response.json()) == {"error"}
    found: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "code", "param", "remedy"} <= set(found)
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return found


async def test_classify(client: httpx.AsyncClient, bus: Any) -> None:
    response = await client.post("/v1/classify", json={"model": "news", "input": ["a", "b"], "top": 1, "at_least": 2})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["model"], answer["generation"], answer["artifact"]) == ("news", 3, "sha256:" + "ab" * 32)
    assert answer["results"] == [[{"label": "sport", "score": 0.75}]] * 2
    name, model, request, timeout_s = bus.calls[-1]
    assert (name, model, timeout_s) == ("server/1.classify", "news", 30.0)
    assert msgspec.to_builtins(request) == {"input": ("a", "b"), "model": "news", "top": 1, "at_least": 2}


async def test_one_text(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/classify", content='{"model":"news","input":"Größe"}')
    assert len(response.json()["results"]) == 1
    assert len(response.json()["results"][0]) == 2


async def test_embeddings_in_openais_form(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/embeddings", json={"model": "news", "input": ["a", "b"], "user": "u"})).json()
    assert answer["object"] == "list"
    assert answer["data"] == [{"object": "embedding", "index": i, "embedding": [0.6, -0.8]} for i in (0, 1)]
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert (answer["model"], answer["generation"]) == ("news", 3)
    packed = (await client.post("/v1/embeddings", json={"model": "news", "input": "a", "encoding_format": "base64"})).json()
    assert struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"])) == pytest.approx((0.6, -0.8))
    refused = await client.post("/v1/embeddings", json={"model": "news", "input": "a", "dimensions": 8})
    assert (refused.status_code, error(refused)["param"]) == (400, "dimensions")


async def test_models_and_deployments(client: httpx.AsyncClient, bus: Any, new_key: Any) -> None:
    answer = (await client.get("/v1/models")).json()
    assert [(m["id"], m["object"], m["generation"]) for m in answer["data"]] == [("gone", "model", 1), ("news", "model", 3)]
    answer = (await client.get("/v1/deployments")).json()["deployments"]
    assert [i["id"] for d in answer for i in d["instances"]] == ["e-0"]
    assert answer[1]["route"]["to"] == [{"pool": "news-g3", "weight": 100}]
    bus.keys.records["k2"] = new_key("k2", models=("news",))
    some = await client.get("/v1/models", headers={"Authorization": client.headers["authorization"].replace("k1", "k2")})
    assert [m["id"] for m in some.json()["data"]] == ["news"]


async def test_jobs_and_runs_are_the_tenants_own(client: httpx.AsyncClient, bus: Any) -> None:
    answer = (await client.get("/v1/jobs", params={"state": "running", "limit": 5})).json()
    assert [j["id"] for j in answer["jobs"]] == ["j1"]
    asked = bus.calls[-1][2]
    assert (asked.state, asked.run, asked.limit, asked.tenant) == ("running", "", 5, "acme")
    assert (await client.get("/v1/runs/mine-1")).json()["run"]["id"] == "mine-1"
    other = await client.get("/v1/runs/theirs-1")
    assert (other.status_code, error(other)["code"]) == (404, "not_found")
    assert (await client.get("/v1/jobs", params={"limit": 0})).status_code == 400
    unknown = await client.get("/v1/jobs", params={"state": "runing"})
    assert (unknown.status_code, error(unknown)["param"], "running" in error(unknown)["remedy"]) == (400, "state", True)


@pytest.mark.parametrize(("body", "param", "what"), [
    (b"{", None, "the body is no JSON"), (b'{"name": "x", "uses": "trainer/1.train"}', None, "the request: Object missing"),
    (b'{"name": "x", "uses": "a", "request": {}, "resources": {"cpu": "x"}}', "resources.cpu", "resources.cpu: Expected `float`"),
])  # fmt: skip
async def test_bad_jobs(client: httpx.AsyncClient, body: bytes, param: str | None, what: str) -> None:
    response = await client.post("/v1/jobs", content=body)
    assert (response.status_code, error(response)["param"]) == (400, param)
    assert what in error(response)["message"]


async def test_extract_and_the_tenant_that_a_call_is_for(client: httpx.AsyncClient, bus: Any) -> None:
    found = ExtractReply("news", 3, DIGEST, ((Entity("person", 0, 3, 0.9),),), 4, 1.0)
    bus.answers["server/1.extract"] = lambda *_: found
    answer = await client.post("/v1/extract", json={"model": "news", "input": "Ada won."})
    assert answer.json()["results"] == [[{"label": "person", "start": 0, "end": 3, "score": 0.9}]]
    assert bus.headers == {"Kernelm-Tenant": "acme"}
    await client.post("/v1/chat/completions", json={"model": "news", "messages": [{"role": "user", "content": "a"}]})
    assert bus.headers == {"Kernelm-Tenant": "acme"}


async def test_calls_failures_and_tokens_are_on_the_tenants_account(client: httpx.AsyncClient, bus: Any) -> None:
    await client.post("/v1/classify", json={"model": "news", "input": ["a", "b"]})
    await client.post("/v1/classify", json={"model": "busy", "input": "a"})
    await client.post("/v1/chat/completions", json={"model": "news", "messages": [{"role": "user", "content": "a"}]})
    rows = {(r.tenant, r.model): (r.calls, r.failed, r.input_tokens, r.output_tokens) for r in bus.meter._rows.values()}
    assert rows == {("acme", "news"): (2, 0, 13, 2), ("acme", "busy"): (1, 1, 0, 0)}
    usage = (await client.get("/v1/usage", params={"since": "2026-11-01"})).json()
    assert [(d["day"], d["tenant"], d["usage"]["calls"]["news"]["calls"]) for d in usage["days"]] == [("2026-11-28", "acme", 2)]
    assert bus.calls[-1][2] == UsageQuery("acme", "2026-11-01")


async def test_metrics_are_for_who_may_read_them(client: httpx.AsyncClient, bus: Any, auth: Any) -> None:
    assert (await client.get("/metrics")).status_code == 403
    bus.keys.records["k2"] = msgspec.structs.replace(bus.keys.records["k1"], id="k2", methods=("metrics",))
    await client.post("/v1/classify", json={"model": "news", "input": ["a", "b"]})
    bus.answers["server/1.classify"] = lambda *_: KernelFault("no_responders", "nobody answers", retriable=True)
    assert (await client.post("/v1/classify", json={"model": "weather", "input": "a"})).status_code == 404
    answer = await client.get("/metrics", headers={"Authorization": auth("k2")})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    series = {s.name: s for s in samples if "news" in s.labels.values()}
    assert series["gen_ai_client_operation_duration_seconds_count"].value == 1
    assert series["gen_ai_client_token_usage_sum"].value == 10
    assert series["kernelm_model_generation"].value == 3
    tokens = {s.labels["token_type"]: s.value for s in samples if s.name == "kernelm_tenant_tokens_total"}
    assert tokens == {"input": 30, "output": 4}
    assert [s.value for s in samples if s.name == "kernelm_tenant_core_seconds_total"] == [7.5]
    assert not [s for s in samples if "weather" in s.labels.values()]


@pytest.mark.parametrize(("header", "what"), [
    ("", "no API key"), ("Bearer km_k1_wrong", "not known"), ("Bearer x", "no API key of"),
])  # fmt: skip
async def test_wrong_keys(client: httpx.AsyncClient, bus: Any, header: str, what: str) -> None:
    for method, path in (("POST", "/v1/classify"), ("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/v1/deployments"),
                         ("GET", "/v1/jobs"), ("GET", "/v1/runs/mine-1"), ("GET", "/v1/usage")):  # fmt: skip
        response = await client.request(method, path, headers={"Authorization": header}, content=b"{" if method == "POST" else None)
        assert response.status_code == 401, path
        assert what in error(response)["message"]
        assert error(response)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    assert bus.calls == []


async def test_what_was_not_granted(client: httpx.AsyncClient, bus: Any, new_key: Any) -> None:
    bus.keys.records["k1"] = new_key(models=("news",), methods=("classify",))
    for path, body in (("classify", {"model": "spam", "input": "a"}), ("embeddings", {"model": "news", "input": "a"})):
        response = await client.post(f"/v1/{path}", json=body)
        assert (response.status_code, error(response)["code"]) == (403, "permission_denied")
    assert (await client.post("/v1/classify", json={"model": "news", "input": "a"})).status_code == 200


@pytest.mark.parametrize(("body", "param", "what"), [
    (b"{", None, "no JSON"), (b"", None, "is empty"), (b"\xff\xfe", None, ""), (b"[]", None, "Expected `object`"),
    (b'{"input": "a"}', None, "missing required field `model`"),
    (b'{"model": "news", "input": 5}', "input", "Expected `str | array`"),
    (b'{"model": "news", "input": ["a", 5]}', "input[1]", "Expected `str`"),
    (b'{"model": "news", "input": []}', None, "no text"), (b'{"model": "news", "input": "a", "top": -1}', "top", ">= 0"),
    (b'{"model": "news", "input": "a", "tpo": 1}', None, "unknown field `tpo`"),
])  # fmt: skip
async def test_bad_bodies(client: httpx.AsyncClient, bus: Any, body: bytes, param: str | None, what: str) -> None:
    response = await client.post("/v1/classify", content=body)
    assert response.status_code == 400, response.text
    assert error(response)["type"] == "invalid_request_error"
    assert what in error(response)["message"]
    if param:
        assert error(response)["param"] == param
    assert bus.calls == []


@pytest.mark.parametrize(("model", "status", "code"), [
    ("nobody", 404, "unknown_model"), ("../x", 404, "unknown_model"), ("a.b", 404, "unknown_model"), ("*", 404, "unknown_model"),
    (">", 404, "unknown_model"), ("News", 404, "unknown_model"), ("x" * 64, 404, "unknown_model"), ("", 400, "invalid"),
    ("gone", 503, "not_ready"), ("busy", 429, "busy"), ("buggy", 500, "internal"),
])  # fmt: skip
async def test_models_that_do_not_answer(client: httpx.AsyncClient, bus: Any, model: str, status: int, code: str) -> None:
    known = bus.answers["server/1.classify"]
    from kernelm_sdk.errors import KernelFault

    bus.answers["server/1.classify"] = lambda request, name: KernelFault(
        "no_responders", "nobody", retriable=True) if name == "nobody" else known(request, name)  # fmt: skip
    response = await client.post("/v1/classify", json={"model": model, "input": "a"})
    assert (response.status_code, error(response)["code"]) == (status, code)
    assert response.headers.get("retry-after") == {503: "1", 429: "7"}.get(status)
    assert "secret" not in response.text
    if model == "nobody":
        assert error(response)["remedy"] == "deployments are: gone, news"


async def test_other_faults(client: httpx.AsyncClient) -> None:
    stale = await client.post("/v1/classify", json={"model": "news", "input": "a", "at_least": 4})
    assert (stale.status_code, error(stale)["code"]) == (409, "stale_generation")
    missing = await client.get("/v1/nothing")
    assert (missing.status_code, error(missing)["code"]) == (404, "not_found")
    assert "/v1/nothing" in error(missing)["message"]
    assert (await client.get("/v1/classify")).status_code == 405


async def test_health_says_whether_the_bus_is_there(client: httpx.AsyncClient, bus: Any) -> None:
    assert (await client.get("/healthz", headers={"Authorization": ""})).json() == {"status": "ok"}
    bus.connected = False
    response = await client.get("/healthz")
    assert (response.status_code, error(response)["code"]) == (503, "disconnected")
    assert response.headers["retry-after"] == "1"


async def test_docs_show_every_route_and_load_nothing(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for route in ("/v1/classify", "/v1/embeddings", "/v1/models", "/v1/jobs", "/v1/runs/{run_id}", "/v1/usage", "/healthz"):
        assert f"<code>{route}</code>" in page.text
    assert "<td>string or list of string<td>required" in page.text
    assert "Kernelm-Timeout" in page.text
    assert "`" not in page.text
    links = set(re.findall(r'href="#(\w+)"', page.text))
    assert "ChatMessage" in links
    assert links <= set(re.findall(r'id="(\w+)"', page.text)), "each type that is named is there"
    assert "<script" not in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    document = (await client.get("/docs/openapi.json")).json()
    state, _, limit = document["paths"]["/v1/jobs"]["get"]["parameters"]
    assert (state["name"], state["schema"]) == ("state", {"type": "string", "default": ""})
    assert limit["schema"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
