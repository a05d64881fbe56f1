"""Method "gptq" where it runs: llm-compressor in the optimizer's own environment, and what it made served by vLLM."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from kernelm.testing.harness import System, until
from kernelm.testing.parts import absent
from kernelm_contracts.jobs import Jobs, RunName, RunSpec, RunView
from kernelm_contracts.optimizer import Compressed, CompressRequest
from kernelm_contracts.server import GenerateRequest, Server
from kernelm_contracts.trainer import TrainRequest
from kernelm_node.runtimes.venvs import Venvs
from kernelm_optimizer.compress import checked
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.oneshot import gptq
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import ArtifactName, Artifacts, PoolSpec, PutArtifact
from kernelm_trainer.training import Folders, train
from kernelm_trainer.workers import silent

ROOT = Path(__file__).parents[3]
PROMPT = "The striker scored twice"


@pytest.fixture(scope="module")
def venvs() -> Path:
    """The folder of environments, the optimizer's and vLLM's: 5 GB, minutes. Skipped where they can't be had; in CI failed."""
    folder, manifests = ROOT / "build" / "venvs", find_manifests()[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("optimizer", "vllm"):
        try:
            asyncio.run(Venvs(folder).of(name, None, manifests[name].venv.cpu, folder / f"{name}.log"))
        except KernelFault as fault:
            absent(f"the environment of {name} can't be made here: {fault}")
    return folder


@pytest.fixture(scope="module")
def llama(corpus: Path, real: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with heads of 32, the smallest that vLLM knows on a processor."""
    shape = real.LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    request = TrainRequest("sha256:corpus", structure="causal-lm", architecture=shape, max_steps=150, epochs=20, learning_rate=5e-3)
    return train(request, Folders(corpus, tmp_path_factory.mktemp("model")), silent()).folder


def run_of(model: str, dataset: str, scheme: str) -> RunSpec:
    request = {"model": model, "dataset": dataset, "method": "gptq", "scheme": scheme, "rounds": 1}
    served = {"name": "small", "model": "${smaller.model}", "plugin": "vllm", "settings": {"kv_cache_mb": 64, "threads": 1}}
    stages = [
        {"name": "smaller", "uses": "optimizer/1.compress", "with": request, "resources": {"cpu": 0.5, "memory_mb": 2000}},
        {"name": "serve", "uses": "deploy", "with": served, "resources": {"cpu": 0.5, "memory_mb": 3000}},
    ]
    return msgspec.convert({"name": "smaller", "stage": stages}, RunSpec)


async def ended(system: System, spec: RunSpec) -> RunView:
    run = await system.admin.call(Jobs.submit_run, spec)

    async def over() -> RunView | None:
        view: RunView = await system.admin.call(Jobs.get_run, RunName(run.id), patience_s=30.0)
        return view if view.run.state != "running" else None

    view: RunView = await until(over, 800.0, "the end of the run")
    assert view.run.state == "done", (view.run.fault, [job.fault for job in view.jobs])
    return view


def likely(folder: Path) -> list[str]:
    """The ten tokens, of 512, with which the model in floating point would most likely go on."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode(PROMPT).ids])).logits[0, -1]
    return [tokenizer.decode([int(token)]).strip() for token in logits.topk(10).indices]


@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_it_is_smaller_has_its_figures_and_is_served_by_vllm(llama: Path, corpus: Path, venvs: Path) -> None:
    expected = likely(llama)
    installed, _ = find_manifests()
    wanted = {name: msgspec.structs.replace(installed[name], default=False) for name in ("scheduler", "optimizer", "vllm")}
    async with System(manifests=wanted) as system:
        (system.home / "venvs").symlink_to(venvs)
        (system.home / "jobs.toml").write_text("deploy_s = 600.0\n")
        for service in ("artifacts", "node", "jobs"):
            await system.service(service)
        await system.pool(PoolSpec("scheduler", "scheduler"))
        await system.pool(PoolSpec("optimizer", "optimizer", runtime="venv"))
        model, dataset = [
            (await system.admin.call(Artifacts.put, PutArtifact(str(folder), kind))).digest
            for folder, kind in ((llama, "model"), (corpus, "dataset"))
        ]
        for scheme, precision, loss in (("W4A16", "int4", 0.1), ("W8A8", "int8", 0.02)):
            view = await ended(system, run_of(model, dataset, scheme))
            made = msgspec.convert(view.jobs[0].result, Compressed)
            opened: Any = await system.admin.call(Artifacts.open, ArtifactName(made.model))
            card = read_card(Path(opened.path))
            assert (card.precision, card.scores["validation"]) == (precision, made.after.scores)
            assert made.change.text in card.notes
            assert abs(made.change.difference) < loss
            assert made.after.bytes < 0.7 * made.before.bytes
            request = GenerateRequest(prompt=PROMPT, max_tokens=1, temperature=0.0)  # a word may have several tokens
            stream = system.admin.stream(Server.generate, request, model="small", idle_s=120.0)
            text = "".join([frame.text async for frame in stream])
            assert text.strip() in expected


def request(**more: Any) -> CompressRequest:
    return CompressRequest("sha256:m", "sha256:d", "gptq", **more)


async def test_without_llm_compressor_it_says_where_to_get_it(here: Any) -> None:
    with pytest.raises(ClientFault, match="llm-compressor is not in this instance's environment") as raised:
        await here.compress("gptq")
    assert raised.value.code == "not_installed"
    assert "--runtime venv" in raised.value.remedy


def test_a_scheme_is_of_this_method_alone() -> None:
    checked(request(scheme="W8A8"))
    with pytest.raises(ClientFault, match="method 'int8' with scheme 'W8A8'"):
        checked(msgspec.structs.replace(request(scheme="W8A8"), method="int8"))
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'W2A16'"):
        msgspec.convert({"model": "m", "dataset": "d", "method": "gptq", "scheme": "W2A16"}, CompressRequest)


def test_integers_are_not_quantized_again(causal_lm: Path, tmp_path: Path) -> None:
    card = msgspec.structs.replace(read_card(causal_lm), precision="int8")
    with pytest.raises(ClientFault, match="it is int8 already"):
        gptq(causal_lm, tmp_path / "out", card, "W4A16", [])
