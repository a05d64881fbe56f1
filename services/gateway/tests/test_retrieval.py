"""An index of documents over HTTP: sources, answers, and private data in both."""

from typing import Any

import httpx
import msgspec
import pytest

from kernelm_contracts.data import Redacted, RedactedPart, RedactState


async def test_sources_come_with_their_place(client: httpx.AsyncClient, bus: Any) -> None:
    answer = (await client.post("/v1/search", json={"model": "news", "query": "Who won?", "top": 1})).json()
    assert answer["sources"] == [{"document": "news/1", "title": "Ada won", "passage": "Ada has won in Paris.", "score": 0.7,
                                  "label": ""}]  # fmt: skip
    assert (bus.calls[-1][0], bus.calls[-1][2].query, bus.calls[-1][2].top) == ("retriever/1.search", "Who won?", 1)
    answer = (await client.post("/v1/recommend", json={"model": "news", "documents": ["news/2"]})).json()
    assert [source["document"] for source in answer["sources"]] == ["news/1"]
    assert bus.calls[-1][2].documents == ("news/2",)


async def test_an_answer_whole_and_as_events(client: httpx.AsyncClient, bus: Any) -> None:
    asked = {"model": "news", "question": "Where did Ada win?", "max_tokens": 9}
    whole = (await client.post("/v1/answers", json=asked)).json()
    assert (whole["answer"], whole["finish_reason"], whole["usage"]["completion_tokens"]) == ("In Paris [1].", "stop", 5)
    assert [source["document"] for source in whole["sources"]] == ["news/1"]
    assert (whole["model"], whole["generation"], bool(whole["generator"])) == ("news", 3, True)
    streamed = (await client.post("/v1/answers", json=asked | {"stream": True})).text.split("\n\n")
    frames = [msgspec.json.decode(line.removeprefix("data: ")) for line in streamed[:-2]]
    assert streamed[-2] == "data: [DONE]"
    assert frames[0]["sources"][0]["title"] == "Ada won"
    assert "".join(frame.get("text", "") for frame in frames) == "In Paris [1]."
    assert {row.output_tokens for row in bus.meter._rows.values()} == {10}


@pytest.mark.parametrize(("path", "body", "param"), [
    ("search", {"model": "news"}, ""), ("search", {"model": "news", "query": "a", "top": -1}, "top"),
    ("recommend", {"model": "news", "documents": "a"}, "documents"), ("answers", {"model": "news", "query": "a"}, "query"),
])  # fmt: skip
async def test_bad_requests_name_the_field(client: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
    answer = await client.post(f"/v1/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"] or "") == (400, param)


async def test_a_key_for_searches_asks_for_no_answers(client: httpx.AsyncClient, bus: Any, new_key: Any, auth: Any) -> None:
    bus.keys.records["k2"] = new_key("k2", models=("news",), methods=("search",))
    headers = {"Authorization": auth("k2")}
    assert (await client.post("/v1/search", json={"model": "news", "query": "a"}, headers=headers)).status_code == 200
    refused = await client.post("/v1/answers", json={"model": "news", "question": "a"}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")


async def test_what_is_private_is_redacted_in_questions_sources_and_answers(client: httpx.AsyncClient, bus: Any) -> None:
    def hide(text: str) -> str:
        return text.replace("Ada", "[NAME]").replace("Paris", "[PLACE]")

    bus.answers["data/1.redact"] = lambda request, _: Redacted(tuple(map(hide, request.texts)), ({},) * len(request.texts))
    bus.answers["data/1.redact-part"] = lambda request, _: RedactedPart(hide(request.text), RedactState())
    headers = {"Kernelm-Redact": "both"}
    found = (await client.post("/v1/search", json={"model": "news", "query": "Is Ada there?"}, headers=headers)).json()
    assert bus.of_models[-1][2].query == "Is [NAME] there?"
    assert (found["sources"][0]["title"], found["sources"][0]["passage"]) == ("[NAME] won", "[NAME] has won in [PLACE].")
    asked = {"model": "news", "question": "Where is Ada?"}
    answer = (await client.post("/v1/answers", json=asked, headers=headers)).json()
    assert bus.of_models[-1][2].question == "Where is [NAME]?"
    assert (answer["answer"], answer["sources"][0]["title"]) == ("In [PLACE] [1].", "[NAME] won")
