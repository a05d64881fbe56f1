"""A Llama's folder in, a GGUF for llama.cpp out, with 8-bit matrices. No kernelm I/O.

The names of tensors and the writing are the `gguf` package's. What is particular to the architecture is here: llama.cpp rotates
neighbouring pairs of a head's dimensions where transformers rotates the two halves, so the rows of queries and keys change places.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kernelm_contracts.trainer import ModelCard
from kernelm_optimizer.folder import need_floats, write_card
from kernelm_optimizer.gguf_models import add, finish
from kernelm_sdk.errors import ClientFault

if TYPE_CHECKING:
    import gguf
    import numpy as np

FILE = "model.gguf"
REMEDY = ("llama.cpp's own convert_hf_to_gguf.py knows more architectures and tokenizers: convert the folder with it, and store "
          "the file with `kernelm model import FILE.gguf`")  # fmt: skip
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # how a text falls apart before the merges


def export(source: Path, target: Path, card: ModelCard) -> None:
    """Write the Llama in `source` to the new folder `target`, as FILE with Q8_0 matrices. ClientFault `invalid_model` if it is of
    another architecture, has a tokenizer that llama.cpp would read otherwise, or integers already."""
    need_floats(card, "become a GGUF", "give the model that it was made from")
    import gguf
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    _check(config)
    tokenizer = _tokenizer(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True,
                                                              local_files_only=True, trust_remote_code=False)  # fmt: skip
    target.mkdir(parents=True)
    writer = gguf.GGUFWriter(target / FILE, "llama")
    _describe(writer, config, card.name)
    _vocabulary(writer, tokenizer, source, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise _unknown(f"model.safetensors: a Llama of llama.cpp has no tensor {name!r}")
        values = tensor.numpy()
        heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
        add(writer, new, _in_pairs(values, heads[kind]) if (kind := new.split(".", 2)[-1]) in heads else values)
    finish(writer)
    write_card(target, msgspec.structs.replace(card, format="gguf", precision="int8", scores={}))


def _check(config: Any) -> None:
    if config.model_type != "llama":
        raise _unknown(f"config.json: model_type is {config.model_type!r}, and only Llamas are exported here")
    rope = config.rope_parameters
    expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    if wrong := [name for name, value in expected.items() if getattr(config, name) != value]:
        raise _unknown(f"config.json: {wrong[0]} is {getattr(config, wrong[0])!r}, and llama.cpp expects {expected[wrong[0]]!r}")
    if rope.get("rope_type", "default") != "default":
        raise _unknown(f"config.json: rope_type is {rope['rope_type']!r}, and only the default is exported here")


def _tokenizer(source: Path) -> dict[str, Any]:
    """tokenizer.json, of byte-level BPE with GPT-2's way of splitting."""
    found: dict[str, Any] = json.loads((source / "tokenizer.json").read_bytes())
    split = {name: (found["pre_tokenizer"] or {}).get(name) for name in GPT2}
    if found["model"]["type"] != "BPE" or found["model"].get("byte_fallback") or split != GPT2 or found["normalizer"]:
        raise _unknown("tokenizer.json: only byte-level BPE that splits texts as GPT-2 does is exported here")
    return found


def _describe(writer: "gguf.GGUFWriter", config: Any, name: str) -> None:
    import gguf

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: "gguf.GGUFWriter", tokenizer: dict[str, Any], source: Path, size: int) -> None:
    """`size` tokens, of which those that the tokenizer does not know are said to be unused."""
    import gguf

    texts = [f"[unused{i}]" for i in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for text, i in tokenizer["model"]["vocab"].items():
        texts[i], kinds[i] = text, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(source, load_merges=True, n_vocab=size)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _in_pairs(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """The rows of each head, [first half, second half], so that those which are rotated together are neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _unknown(why: str) -> ClientFault:
    return ClientFault("invalid_model", why, REMEDY)
