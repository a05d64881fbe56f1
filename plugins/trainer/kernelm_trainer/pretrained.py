"""Hugging Face models of any architecture: from a folder or from scratch, with low-rank adapters, and back to a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

from kernelm_contracts.trainer import Adapter, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer.task import Tensors

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
AUTO = {"causal-lm": transformers.AutoModelForCausalLM, "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
        "token-classification": transformers.AutoModelForTokenClassification,
        "sentence-embedding": transformers.AutoModel}  # fmt: skip
PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "token-classification": "TOKEN_CLS"}
# new where a base lacks them
HEADS = {"token-classification": ("classifier.weight", "classifier.bias", "score.weight", "score.bias")}
BEGIN, END, PADDING = ("<s>", "<bos>"), ("<|endoftext|>", "</s>", "<eos>", "[SEP]"), ("<pad>", "[PAD]")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def check_base(folder: Path) -> None:
    """ClientFault if `folder` holds a pickle ("pickle_refused") or is no Hugging Face folder ("invalid_base")."""
    if pickles := sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in PICKLES):
        raise ClientFault("pickle_refused", f"base: {pickles[0]} is a pickle, which can run code when it is read",
                          "convert the weights to safetensors and store the folder without the pickle")  # fmt: skip
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ClientFault("invalid_base", f"base: {missing[0]} is missing",
                          f"give an artifact that holds {', '.join(NEEDED)}")  # fmt: skip


def load(request: TrainRequest, base: Path | None, vocabulary: int, **config: Any) -> Any:
    """The model that `request` starts from, in float32 and on torch's own memory: the same bits in every run.

    `vocabulary` is the tokenizer's number of ids. Torch's generator must be seeded before: it draws what is new.
    """
    model: Any = _from_scratch(request, vocabulary, config) if base is None else _from_base(request, base, vocabulary, config)
    own_memory(model)
    return prepared(model, request)


def prepared(model: Any, request: TrainRequest) -> Any:
    """A model that was just loaded, as `request` wants it trained."""
    if request.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ClientFault("invalid", f"train request: gradient_checkpointing: {model.config.model_type} can't", "leave it out")
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model if request.adapter is None else _adapted(model, request, request.adapter)


def own_memory(model: nn.Module) -> None:
    """Take a model off the mapped file, to torch's alignment: the same bits in every run."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


def _from_scratch(request: TrainRequest, vocabulary: int, config: dict[str, Any]) -> Any:
    fields = {"vocab_size": vocabulary, **request.architecture, **config}
    kind = fields.pop("model_type", None)
    try:
        made = transformers.AutoConfig.for_model(kind, **fields)
        model: Any = AUTO[request.structure].from_config(made, dtype=torch.float32, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ClientFault("invalid", f"train request: architecture: {error}",
                          f'give the fields of a config.json of transformers, "model_type" too, for {request.structure}') from None
    if model.config.vocab_size < vocabulary:
        raise ClientFault("invalid", f"train request: architecture: vocab_size is {model.config.vocab_size}, the tokenizer has "
                          f"{vocabulary} ids", "leave vocab_size out")  # fmt: skip
    return model


def _from_base(request: TrainRequest, base: Path, vocabulary: int, config: dict[str, Any]) -> Any:
    check_base(base)
    auto = AUTO[request.structure]
    options = config | ({"num_hidden_layers": request.layers} if request.layers else {})
    try:
        model, info = auto.from_pretrained(base, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                                           trust_remote_code=False, attn_implementation="sdpa", output_loading_info=True,
                                           **options)  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ClientFault("invalid_base", f"base: it does not load as a model for {request.structure}: {error}",
                          "give an intact model of that kind") from None  # fmt: skip
    absent = sorted(key for key in info["missing_keys"] if key not in HEADS.get(request.structure, ()) and "pooler" not in key)
    if absent:
        raise ClientFault("invalid_base", f"base: model.safetensors lacks {absent[0]}", "give weights that belong to config.json")
    if model.config.vocab_size < vocabulary:
        raise ClientFault("base_mismatch",
                          f"dataset: its tokenizer has {vocabulary} ids, the base {model.config.vocab_size} embeddings",
                          "prepare the dataset with the tokenizer of this base")  # fmt: skip
    return model


def _adapted(model: Any, request: TrainRequest, adapter: Adapter) -> Any:
    """The model with low-rank adapters on its linear maps, which alone are trained."""
    import peft

    if request.gradient_checkpointing:
        model.enable_input_require_grads()
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha,  # type: ignore[arg-type]
                             lora_dropout=adapter.dropout,
                             target_modules=list(adapter.targets) or "all-linear", task_type=PEFT_TASKS.get(request.structure),
                             base_model_name_or_path=request.base)  # fmt: skip
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ClientFault("invalid", f"train request: adapter.targets: {error}", "leave it out for all linear maps") from None
    config.base_model_name_or_path = request.base  # where peft has put the folder's path
    return adapted


def positions(model: Any) -> int:
    """Tokens that the model can take at most; 0 where it has no limit."""
    return int(getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None) or 0)


def check_length(model: Any, longest: int, where: str) -> None:
    """ClientFault "too_long" if a row is longer than the model takes."""
    most = positions(model)
    if most and longest > most:
        raise ClientFault("too_long", f"dataset: {where} has {longest} tokens, the model takes {most}",
                          f"set block to at most {most}, or take a model for longer texts")  # fmt: skip


def is_adapter(request: TrainRequest) -> bool:
    """Whether what is stored is an adapter alone."""
    return request.adapter is not None and not request.adapter.merge


def write(model: Any, tensors: Tensors, folder: Path, request: TrainRequest, *tokenizers: Path | None) -> None:
    """Write the model (its state is `tensors`, if given), or its adapter alone, to `folder`; what belongs to the tokenizer comes
    from the first folder that has it."""
    if request.adapter is not None and request.adapter.merge:
        model = model.merge_and_unload()
    model.save_pretrained(folder, **({"state_dict": tensors} if tensors else {}))
    if is_adapter(request):
        (folder / "README.md").unlink(missing_ok=True)  # peft's own card, with nothing in it; card.md says it
    for name in TOKENIZER:
        source = next((f / name for f in tokenizers if f is not None and (f / name).is_file()), None)
        if source is not None and not (folder / name).exists():
            shutil.copyfile(source, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions(model)}
        settings |= _special_tokens(folder / "tokenizer.json", model.config.to_dict())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; ClientFault if there is none that transformers can use."""
    try:
        if (folder / "tokenizer_config.json").is_file() and (folder / "config.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"),
                                                    **_special_tokens(folder / "tokenizer.json", config))  # fmt: skip
    except Exception as error:  # the library in Rust raises no narrower one
        raise ClientFault("invalid_dataset", f"tokenizer.json: {error}", "give a tokenizer that `tokenizers` can read") from None


def _special_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """The tokens that a model's config names by their ids."""
    names = Tokenizer.from_file(str(path))
    ids = {key: config.get(f"{key}_id") for key in ("bos_token", "eos_token", "pad_token")}
    return {key: token for key, id in ids.items() if isinstance(id, int) and (token := names.id_to_token(id)) is not None}


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Begin, end and padding of a new model's config: what the tokenizer says, or tokens of the usual names."""
    names = tokenizer.get_vocab()
    found = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PADDING}
    said = {key: getattr(tokenizer, key, None) for key in found}
    usual = {key: next((names[n] for n in wanted if n in names), None) for key, wanted in found.items()}
    return {key: said[key] if said[key] is not None else usual[key] for key in found}  # type: ignore[misc]
