"""A Llama that was trained here is made a GGUF by `optimizer/1.compress`, and the plugin on llama.cpp says with it what the
generator says with the Llama itself: one run file, from corpus to two deployments."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.parts import absent
from kernelm_contracts.server import GenerateRequest, InfoRequest, Server
from kernelm_sdk.bus import Bus

TEXTS = Path(__file__).parents[1] / "benchmarks" / "texts"
HERE = Path(__file__).with_name("llamacpp")
LENGTH, TOKENS = 32, 8
RHYME = """One for sorrow, two for mirth, three for a funeral, four for a birth,
five for heaven, six for hell, seven for the devil, his own self."""
PROMPTS = ("One for sorrow, two", "One for sorrow, two for mirth, three", "five for heaven, six")
pytestmark = pytest.mark.slow
RUN = """
name = "smaller"

[[stage]]
name = "language"
uses = "trainer/1.train"
resources = { cpu = 1.0, memory_mb = 1000 }
[stage.with]
dataset = { folder = "CORPUS" }
structure = "causal-lm"
epochs = 100
max_steps = 150
batch_size = 8
learning_rate = 3e-3
precision = "fp32"
report_test = false
[stage.with.architecture]
model_type = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 128
max_position_embeddings = 64
tie_word_embeddings = true

[[stage]]
name = "small"
uses = "optimizer/1.compress"
resources = { cpu = 1.0, memory_mb = 1000 }
with = { model = "${language.model}", dataset = { folder = "CORPUS" }, method = "gguf", rounds = 1 }

[[stage]]
name = "serve-large"
uses = "deploy"
resources = { cpu = 0.5, memory_mb = 1024 }
with = { name = "large", model = "${language.model}", plugin = "generator" }

[[stage]]
name = "serve-small"
uses = "deploy"
resources = { cpu = 0.5, memory_mb = 1024 }
with = { name = "small", model = "${small.model}", plugin = "llamacpp" }
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rhyme over and over: whoever has learned it has no doubt what comes next, in whatever precision."""
    for folder in (TEXTS, TEXTS.parent):
        monkeypatch.syspath_prepend(folder)
    import packing

    folder = tmp_path / "corpus"
    tokenizer = packing.learn([RHYME], 400)
    ids = packing.stream(tokenizer, [RHYME] * 400)
    ids = ids[: len(ids) // LENGTH * LENGTH]
    packing.write(folder, tokenizer, {"validation": ids[: 8 * LENGTH], "train": ids[8 * LENGTH :]}, LENGTH)
    return folder


async def says(bus: Bus) -> dict[str, list[str]]:
    """What each deployment goes on with."""
    said: dict[str, list[str]] = {}
    for model in ("large", "small"):
        for prompt in PROMPTS:
            request = GenerateRequest(prompt=prompt, max_tokens=TOKENS, temperature=0.0)
            frames = [frame async for frame in bus.stream(Server.generate, request, model=model, idle_s=120.0)]
            assert frames[-1].usage.completion_tokens == TOKENS
            said.setdefault(model, []).append("".join(frame.text for frame in frames))
    info = await bus.call(Server.info, InfoRequest(), model="small")
    assert info.details["file"] == "model.gguf"
    return said


def test_a_compressed_llama_says_by_llama_cpp_what_it_says_by_the_generator(corpus: Path, tmp_path: Path, desk: Any) -> None:
    if find_spec("xllamacpp") is None:
        absent("needs xllamacpp: pip install -r deploy/thirdparty.txt -c deploy/constraints.txt")
    desk.kernelm("plugin", "replace", "server/1", HERE, "--watch", "0")
    (tmp_path / "run.toml").write_text(RUN.replace("CORPUS", str(corpus)))
    desk.kernelm("run", tmp_path / "run.toml")
    said = desk.speak(says)
    assert said["small"] == said["large"]
    rhyme = " ".join([RHYME] * 2)
    assert all((prompt + text).strip() in rhyme for prompt, text in zip(PROMPTS, said["small"], strict=True)), said
    for model in ("small", "large"):
        desk.kernelm("model", "undeploy", model)
    desk.kernelm("plugin", "replace", "server/1", "encoder", "--watch", "0")
