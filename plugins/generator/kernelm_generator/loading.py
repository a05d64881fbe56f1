"""A model of transformers from an artifact's folder: checked, planned with the memory granted, and loaded."""

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from kernelm_contracts.quantized import METHOD  # the import teaches transformers to read layers of 8 and 4 bits
from kernelm_generator.memory import Plan, plan, shape_of
from kernelm_generator.model import Model
from kernelm_generator.seq2seq import TYPES, Seq2Seq
from kernelm_generator.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault

REMEDY = "store a folder as transformers' save_pretrained writes it: config.json, model.safetensors, tokenizer.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that a padded batch suits


def load(folder: Path, settings: Settings, granted_mb: int, threads: int, log: logging.Logger) -> tuple[Model, Plan]:
    """Plan with the memory granted, then load; ClientFault "invalid_model" by file and field, PluginFault "out_of_memory".
    `threads` (0 for as torch has it) holds for the whole process."""
    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = _device(settings)
    config = read_config(folder)
    integers = getattr(config, "quantization_config", None)  # of layers of 8 or 4 bits: the rest is bfloat16
    precision = "bf16" if integers else _precision(settings, device)
    shape = shape_of(folder, config.get_text_config(), 2 if precision == "bf16" else 4)
    if integers:  # held as they are stored
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        shape = shape._replace(parameters=stored // shape.bytes_per_parameter)
    planned = plan(shape, settings, granted_mb)
    log.info("%s: %d slots of %d tokens, %d tokens of prefixes, about %d MB of %d granted", folder.name, planned.slots,
             planned.context, planned.prefix_tokens, planned.needed_mb, granted_mb)  # fmt: skip
    tokenizer = _call("tokenizer.json", transformers.AutoTokenizer.from_pretrained, folder)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _invalid("tokenizer_config.json", f"`tokenizer_class` {type(tokenizer).__name__} does not use tokenizer.json")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    of, kind = ((transformers.AutoModelForSeq2SeqLM, Seq2Seq) if config.is_encoder_decoder else
                (transformers.AutoModelForCausalLM, Model))  # fmt: skip
    network, found = _call("model.safetensors", of.from_pretrained, folder, dtype=dtype, use_safetensors=True,
                           output_loading_info=True)  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise _invalid("model.safetensors", f"{len(missing)} tensors are missing, the first is `{missing[0]}`")
    held = f"int{integers['bits']}" if integers and integers["quant_method"] == METHOD else precision
    return kind(network.eval().to(device), tokenizer, device, held), planned


def read_config(folder: Path) -> Any:
    """The config of transformers, once the folder is known to be one that can be served; ClientFault otherwise."""
    if pickled := [path.name for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICKLES]:
        raise ClientFault("unsafe_file", f"{pickled[0]}: pickles can run code when they are read, and are not",
                          "store the weights as safetensors")  # fmt: skip
    if files := [path.name for path in folder.glob("*.gguf")]:
        raise ClientFault("invalid_model", f"{files[0]}: a GGUF is read by llama.cpp, and this server has transformers",
                          "deploy it with a plugin that has llama.cpp, or the model that it was made from")  # fmt: skip
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise _invalid(name, "the file is missing")
    if not list(folder.glob("*.safetensors")):
        raise _invalid("model.safetensors", "the file is missing")
    config = _call("config.json", transformers.AutoConfig.from_pretrained, folder)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "compressed-tensors":
        raise ClientFault("invalid_model", "config.json: the weights are of compressed-tensors, which vLLM reads, not this server",
                          "deploy it with `--plugin vllm`, or the model that it was made from")  # fmt: skip
    if config.is_encoder_decoder:
        if config.model_type not in TYPES:
            raise _invalid("config.json", f"`model_type` {config.model_type!r} is no encoder-decoder that this server can batch: "
                           f"it can {', '.join(sorted(TYPES))}")  # fmt: skip
        return config
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - ATTENTION
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or kinds:
        why = f"has layers of the kind {', '.join(sorted(kinds))}" if kinds else "is no causal language model"
        raise _invalid("config.json", f"`model_type` {config.model_type!r} {why}, which this server can't batch")
    if "position_ids" not in inspect.signature(kind.forward).parameters:
        raise _invalid("config.json", f"`model_type` {config.model_type!r} takes no positions, so its calls can't be batched")
    return config


def _call(file: str, load: Any, folder: Path, **settings: Any) -> Any:
    try:
        return load(folder, local_files_only=True, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, RuntimeError
        raise _invalid(file, f"transformers can't load it: {error}") from error


def _invalid(file: str, why: str) -> ClientFault:
    return ClientFault("invalid_model", f"{file}: {why}", REMEDY)


def _device(settings: Settings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise PluginFault("no_device", '`device` is "cuda", and torch finds no GPU', 'install a CUDA build of torch, or set "auto"')
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def _precision(settings: Settings, device: torch.device) -> str:
    if settings.precision != "auto":
        return str(settings.precision)
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    can = torch.cpu.get_capabilities()
    return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"
