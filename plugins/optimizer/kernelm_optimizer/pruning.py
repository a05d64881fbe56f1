"""Structured pruning: whole layers, attention heads and feed-forward units go, and a smaller model of the same kind is left.

What goes did least on documents: layers by how little they turn the hidden states (Men et al., "ShortGPT", 2024, equation 1), heads
and units by the mean square of what they hand on times that of the weights that read it (after Sun et al., "Wanda", 2023, with
whole columns). No kernelm I/O.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import transformers
from torch import nn

from kernelm_contracts.optimizer import Prune
from kernelm_contracts.trainer import ModelCard
from kernelm_optimizer.folder import write_smaller
from kernelm_sdk.errors import ClientFault

Scores = list[torch.Tensor]


class Form(NamedTuple):
    """Where a layer has what: names within it."""

    ups: tuple[str, ...]  # linear maps whose rows are the inner units
    down: str  # the one whose columns they are
    queries: str = ""
    shared: tuple[str, ...] = ()  # keys and values
    out: str = ""  # whose columns are the heads'


FORMS = (
    Form(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "self_attn.q_proj", ("self_attn.k_proj", "self_attn.v_proj"),
         "self_attn.o_proj"),  # Llama, Mistral, Qwen, Gemma
    Form(("intermediate.dense",), "output.dense"),  # BERT and those like it, whose config knows no size of a head
)  # fmt: skip


def prune(source: Path, target: Path, card: ModelCard, share: Prune, rows: Iterable[torch.Tensor]) -> None:
    """Write the model in `source` without the least `share` to the new folder `target`; `rows` are the token ids of documents.
    ClientFault `invalid_model` if it is none that can be pruned so."""
    model = _load(source, card)
    config = model.config
    name, layers = _layers(model)
    form = _form(layers[0], share, config.model_type)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    turned, heads, units = _importance(model, layers, form, groups, rows)
    kept = _best(turned, share.layers)
    least = {"heads": [_best(heads[i], share.heads) for i in kept] if share.heads else [],
             "units": [_best(units[i], share.width) for i in kept]}  # fmt: skip
    tensors = _cut(model, name, form, kept, least, groups)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept), "intermediate_size": len(least["units"][0])}
    if share.heads:
        left = len(least["heads"][0])
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = left * (config.num_attention_heads // groups)
        changes |= {"num_key_value_heads": left, "num_attention_heads": queries, "head_dim": size}
    if kinds := getattr(config, "layer_types", None):
        changes["layer_types"] = [kinds[i] for i in kept]
    numbers = sum(t.numel() for t in tensors.values())
    write_smaller(source, target, tensors, changes, msgspec.structs.replace(card, parameters=numbers))


def _load(source: Path, card: ModelCard) -> Any:
    if card.structure not in ("causal-lm", "encoder") or card.format != "safetensors" or card.precision in ("int8", "int4"):
        raise _refused(f"a {card.precision} {card.structure} in {card.format} can't be pruned",
                       "give an encoder or a causal-lm in floats")  # fmt: skip
    auto = transformers.AutoModelForCausalLM if card.structure == "causal-lm" else transformers.AutoModel
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return auto.from_pretrained(source, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                                    trust_remote_code=False, attn_implementation="sdpa").eval()  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _refused(f"transformers can't load it: {error}", "give the digest of a trained model") from None


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    count = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise _refused(f"model_type {model.config.model_type!r} has no list of its layers", "give a Llama-like or BERT-like model")


def _form(layer: nn.Module, share: Prune, kind: str) -> Form:
    there = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    form = next((f for f in FORMS if {*f.ups, f.down} <= there), None)
    if form is None:
        raise _refused(f"the layers of model_type {kind!r} have no feed-forward part of a known form",
                       "give a Llama-like or BERT-like model")  # fmt: skip
    if share.heads and not form.queries:
        raise _refused(f"the config of model_type {kind!r} can't say that heads are missing", "prune layers and width instead")
    return form


def _importance(model: Any, layers: nn.ModuleList, form: Form, groups: int,
                rows: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Scores, Scores]:  # fmt: skip
    """(of each layer, of each layer's groups of heads, of each layer's units), the larger the more they did."""
    turned = torch.zeros(len(layers))
    squares: dict[tuple[int, str], torch.Tensor] = {}
    handles = []

    def watch(i: int, layer: nn.Module) -> None:
        def whole(_: nn.Module, given: Any, more: Any, out: Any) -> None:
            before, after = (given[0] if given else more["hidden_states"]), (out[0] if isinstance(out, tuple) else out)
            turned[i] += float(1 - torch.cosine_similarity(before, after, -1).mean())

        handles.append(layer.register_forward_hook(whole, with_kwargs=True))
        for name in filter(None, (form.down, form.out)):
            def read(_: nn.Module, given: Any, name: str = name) -> None:
                found = given[0].flatten(0, -2).square().mean(0)
                squares[i, name] = squares.get((i, name), torch.zeros_like(found)) + found

            handles.append(layer.get_submodule(name).register_forward_pre_hook(read))

    for i, layer in enumerate(layers):
        watch(i, layer)
    with torch.inference_mode():
        for ids in rows:
            model(input_ids=ids.unsqueeze(0))
    for handle in handles:
        handle.remove()

    def moved(i: int, name: str) -> torch.Tensor:
        weight = layers[i].get_submodule(name).weight  # type: ignore[union-attr]
        return squares[i, name] * weight.detach().square().sum(0)  # type: ignore[union-attr, operator]

    heads = [moved(i, form.out).view(groups, -1).sum(1) if form.out else torch.zeros(groups) for i in range(len(layers))]
    return turned, heads, [moved(i, form.down) for i in range(len(layers))]


def _best(scores: torch.Tensor, share: float) -> list[int]:
    """Indices of those that stay, in their order: all but the least `share`, and one at least."""
    count = max(1, len(scores) - round(share * len(scores)))
    return sorted(scores.topk(count).indices.tolist())


def _cut(model: Any, name: str, form: Form, kept: list[int], least: dict[str, list[list[int]]],
         groups: int) -> dict[str, torch.Tensor]:  # fmt: skip
    """The state of the smaller model."""
    tied = model.get_output_embeddings()
    shares = tied is not None and tied.weight is model.get_input_embeddings().weight
    found, place = {}, {old: new for new, old in enumerate(kept)}
    for key, tensor in model.state_dict().items():
        if key.startswith("pooler.") or (shares and tied.weight.data_ptr() == tensor.data_ptr() and "embed" not in key):
            continue
        if not key.startswith(f"{name}."):
            found[key] = tensor.contiguous()
            continue
        number, _, inner = key.removeprefix(f"{name}.").partition(".")
        if int(number) in place:
            new = place[int(number)]
            module, _, part = inner.rpartition(".")
            found[f"{name}.{new}.{inner}"] = _slice(tensor, module, part, form, {k: v[new] for k, v in least.items() if v}, groups)
    return found


def _slice(tensor: torch.Tensor, module: str, part: str, form: Form, stays: dict[str, list[int]], groups: int) -> torch.Tensor:
    of_rows = {**dict.fromkeys(form.ups, "units"), **dict.fromkeys((form.queries, *form.shared), "heads")}
    of_columns = {form.down: "units", form.out: "heads"}
    if module in of_rows and of_rows[module] in stays:
        tensor = _pick(tensor, 0, stays[of_rows[module]], groups if of_rows[module] == "heads" else 0)
    elif module in of_columns and of_columns[module] in stays and part == "weight":
        tensor = _pick(tensor, 1, stays[of_columns[module]], groups if of_columns[module] == "heads" else 0)
    return tensor.contiguous()


def _pick(tensor: torch.Tensor, dimension: int, stays: list[int], groups: int) -> torch.Tensor:
    index = torch.tensor(stays)
    if not groups:
        return tensor.index_select(dimension, index)
    return tensor.unflatten(dimension, (groups, -1)).index_select(dimension, index).flatten(dimension, dimension + 1)  # type: ignore[no-untyped-call, no-any-return]


def _refused(why: str, remedy: str) -> ClientFault:
    return ClientFault("invalid_model", f"compress: {why}", remedy)
