"""Tiny language models with random weights and a byte tokenizer, in the format of an artifact: causal, and encoder-decoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"  # fmt: skip # noqa: E501

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
# Tokens that no model says: it says printable letters, and never ends by itself, so that lengths are known
SILENT = [k for k in range(258) if k >= len(LETTERS) or not LETTERS[k].isascii()]
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "initializer_factor": 3.0,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 256, "init_std": 1.0,
        "forced_eos_token_id": None, "decoder_start_token_id": 256}  # fmt: skip
# An mBART is told the language of its answer, a Marian must not say the token that it begins with
ASKED: dict[str, dict[str, Any]] = {"mbart": {"forced_bos_token_id": 65}, "marian": {"bad_words_ids": [[256]]}}


def make_tokenizer() -> Any:
    """Bytes and two special tokens: 256 begins a text, 257 ends it."""
    core = Tokenizer(models.BPE({letter: k for k, letter in enumerate(LETTERS)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]
    made.chat_template = TEMPLATE
    return made


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama with 2 layers: random weights of a size that makes its answers vary, 512 positions."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}  # fmt: skip
    config = LlamaConfig(**{**sizes, "bos_token_id": 256, "eos_token_id": 257, **changes})
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        network.lm_head.weight[SILENT] = 0
    network.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_seq2seq(folder: Path, kind: str = "t5", **changes: Any) -> Path:
    """A model with random weights of a size that makes its answers vary; it never ends by itself."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 256, "tie_word_embeddings": False}
    sizes |= T5 if "t5" in kind else BART
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    network: Any = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "embed_positions" in name or "relative_attention_bias" in name or name == "lm_head.weight":
                tensor.copy_(torch.randn_like(tensor))
        network.lm_head.weight[SILENT] = 0
    for name, value in ASKED.get(kind, {}).items():
        setattr(network.generation_config, name, value)
    network.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """The tiny model with more layers: an answer takes it a second, so that there is something to cancel."""
    return write_model(tmp_path / "deep", num_hidden_layers=12)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder."""
    return write_seq2seq(tmp_path_factory.mktemp("translator"))


@pytest.fixture
def seq2seq() -> Any:
    """`write_seq2seq`, which the tests can't import."""
    return write_seq2seq
