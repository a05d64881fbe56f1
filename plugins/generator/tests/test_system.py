"""A system as a user has it: a model is imported, deployed and talked with by the `kernelm` command, is unloaded while nobody calls
it, comes back for a call over HTTP, and makes room for the next one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kernelm_cli.home import read_up

pytestmark = pytest.mark.slow
ASKED = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}


class Desk:
    """One running system in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def kernelm(self, *words: object, code: int = 0, **environment: str) -> str:
        """What `kernelm WORDS` prints; it must exit with `code`. With another than 0: what it prints of the fault."""
        child = subprocess.run([sys.executable, "-m", "kernelm_cli", *map(str, words)], capture_output=True, text=True, timeout=200,
                               env=os.environ | {"KERNELM_HOME": str(self.home)} | environment, check=False)  # fmt: skip
        assert child.returncode == code, f"kernelm {words}: code {child.returncode}\n{child.stdout}{child.stderr}"
        return child.stderr if code else child.stdout

    def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < end, f"{what} did not come true within {timeout_s:g} s"
            time.sleep(0.1)
        return value


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(tmp_path_factory.mktemp("chatting") / "home")
    desk.kernelm("up", "--detach", KERNELM_START_WAIT_S="0")
    try:
        yield desk
    finally:
        desk.kernelm("down")


def test_a_model_is_talked_with_unloaded_and_called_back(desk: Desk, tiny: Path) -> None:
    desk.kernelm("model", "import", tiny, "--name", "tiny")
    assert "no model 'large' is in the store; there are tiny" in desk.kernelm("model", "deploy", "chat", "large", code=2)
    desk.kernelm("model", "deploy", "chat", "tiny", "--replicas", 0, "--maximum", 1, "--idle", 6)
    said = desk.kernelm("chat", "chat", "Hello", "--max-tokens", 12, "--temperature", 0).rstrip("\n")
    assert len(said) == 12

    def ready() -> list[str]:
        return [i["id"] for i in json.loads(desk.kernelm("ps", "--json"))["instances"]
                if "chat" in i["models"] and i["state"] == "ready"]  # fmt: skip

    desk.until(lambda: not ready(), 90.0, "the model was unloaded")
    key = json.loads(desk.kernelm("key", "create", "acme", "--models", "chat", "--json"))["secret"]
    up = read_up(desk.home)
    assert up is not None
    with httpx.Client(base_url=up.http, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        first = client.post("/v1/chat/completions", json=ASKED)
        assert first.status_code == 503, first.text
        assert int(first.headers["Retry-After"]) >= 1
        assert (first.json()["error"]["code"], first.json()["error"]["retriable"]) == ("starting", True)

        def answered() -> Any:
            response = client.post("/v1/chat/completions", json=ASKED)
            assert response.status_code in (200, 503), response.text
            return response.json() if response.status_code == 200 else None

        answer = desk.until(answered, 90.0, "the model came back")
    assert answer["choices"][0]["message"]["content"] == said
    assert answer["usage"]["completion_tokens"] == 12
    history = json.loads(desk.kernelm("model", "history", "chat", "--json"))
    assert [past["generation"] for past in history] == [1]


def test_a_text_is_translated_over_http(desk: Desk, translator: Path) -> None:
    desk.kernelm("model", "import", translator, "--name", "translator")
    desk.kernelm("model", "deploy", "translate", "translator", "--plugin", "generator")
    key = json.loads(desk.kernelm("key", "create", "initech", "--models", "translate", "--json"))["secret"]
    up = read_up(desk.home)
    assert up is not None
    asked = {"model": "translate", "prompt": "one two three", "temperature": 0, "max_tokens": 12}
    with httpx.Client(base_url=up.http, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        whole = client.post("/v1/completions", json=asked).json()
        assert whole["usage"] == {"prompt_tokens": 13, "completion_tokens": 12, "total_tokens": 25} | {
            k: v for k, v in whole["usage"].items() if "details" in k}  # fmt: skip
        streamed = client.post("/v1/completions", json=asked | {"stream": True})
        events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
        pieces = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
        assert "".join(pieces) == whole["choices"][0]["text"]
        assert len([piece for piece in pieces if piece]) > 1
        refused = client.post("/v1/completions", json=asked | {"prompt": "x" * 5000})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")


def test_a_model_that_needs_more_than_granted_is_not_loaded(desk: Desk, tiny: Path) -> None:
    desk.kernelm("model", "import", tiny, "--name", "tiny")
    fault = desk.kernelm("model", "deploy", "big", "tiny", "--memory", 300, code=1)
    assert "out_of_memory" in fault
    assert "memory_mb = 6" in fault
