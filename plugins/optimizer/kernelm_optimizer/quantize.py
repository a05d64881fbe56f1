"""A trained model's folder in, the folder of its int8 variant out. No kernelm I/O.

Encoders become one ONNX graph (tokens in, `logits` and the pooled `embeddings` out) whose linear layers hold int8 weights
with one scale a column, activations being quantized as they come (dynamic quantization: Jacob et al. 2018, section 2,
without their fine-tuning) or in ranges that documents have shown (`static.py`). Word and position embeddings are 8-bit with one
scale a table. The TF-IDF model keeps its form, with int8 weights and one scale a label.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from kernelm_contracts.trainer import ModelCard
from kernelm_optimizer.folder import carry, read_card
from kernelm_sdk.errors import ClientFault, PluginFault

if TYPE_CHECKING:
    import onnx

CARRIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
           "vocabulary.json")  # whatever else a model's folder holds describes its old weights
OPSET = 20  # the first with a Gelu of its own
TOLERANCE = 1e-3  # of logits, between the exported graph and the model it was exported from, both fp32


class Quantized(Struct, frozen=True):
    """What was made, and what it took."""

    card: ModelCard
    export_s: float
    quantize_s: float
    bytes_before: int  # of the weights
    bytes_after: int
    max_logit_difference: float  # int8 against fp32, on random tokens; 0 where logits need text


def why_not(card: ModelCard) -> str:
    """Why a model can't be quantized; "" if it can."""
    if card.precision == "int8" or card.format != "safetensors":
        return f"it is {card.precision} {card.format} already"
    return "" if card.task == "text-classification" else f"its task is {card.task}, and only classifiers of whole texts become int8"


def quantize(source: Path, target: Path, reduce_range: bool = False, texts: Sequence[str] = ()) -> Quantized:
    """Write the int8 variant of the model in `source` to the new folder `target`.

    `reduce_range` keeps weights to 7 bits, for processors without VNNI. With `texts` the ranges of an encoder's activations are
    those that these documents show. ClientFault `invalid_model` if `source` is no fp32 or bf16 model, or has no ranges;
    PluginFault `export_differs` if the exported graph does not compute what the model does.
    """
    card = read_card(source)
    if reason := why_not(card):
        raise ClientFault("invalid_model", f"model {card.name!r} can't be quantized: {reason}")
    if texts and card.structure == "tfidf-linear":
        raise ClientFault("invalid_model", f"model {card.name!r} counts terms, it has no activations with ranges",
                          'take activations = "dynamic"')  # fmt: skip
    target.mkdir(parents=True)
    carry(source, target, CARRIED)
    if card.structure == "tfidf-linear":
        made = _quantize_tfidf(source, target, card, reduce_range)
    else:
        made = _quantize_encoder(source, target, card, reduce_range, texts)
    (target / "model.json").write_bytes(msgspec.json.format(msgspec.json.encode(made.card), indent=2))
    return made


# ---- TF-IDF ------------------------------------------------------------------------------------------------------

def _quantize_tfidf(source: Path, target: Path, card: ModelCard, reduce_range: bool) -> Quantized:
    import numpy as np
    from safetensors.numpy import save_file

    started = time.perf_counter()
    tensors = _tensors(source / "linear.safetensors", "idf", "weight", "bias")
    weight = tensors["weight"].astype(np.float32)
    largest = np.abs(weight).max(axis=1)
    levels = 63 if reduce_range else 127
    scale = np.where(largest > 0, largest / levels, 1.0).astype(np.float32)  # a row of zeros needs no scale
    tensors["weight"] = np.rint(weight / scale[:, None]).clip(-levels, levels).astype(np.int8)
    save_file({**tensors, "scale": scale}, target / "linear.safetensors")
    return Quantized(
        card=msgspec.structs.replace(card, precision="int8", scores={}),
        export_s=0.0, quantize_s=time.perf_counter() - started, max_logit_difference=0.0,
        bytes_before=(source / "linear.safetensors").stat().st_size,
        bytes_after=(target / "linear.safetensors").stat().st_size)


def _tensors(path: Path, *names: str) -> dict[str, Any]:
    """The tensors `names` of a safetensors file as numpy arrays; ClientFault that names what is missing."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ClientFault("invalid_model", f"{path.name}: {error}", "give the digest of a model artifact") from None
    if missing := [name for name in names if name not in tensors]:
        raise ClientFault("invalid_model", f"{path.name} has no tensor {missing[0]!r}")
    return tensors


# ---- encoders ----------------------------------------------------------------------------------------------------

def _quantize_encoder(source: Path, target: Path, card: ModelCard, reduce_range: bool, texts: Sequence[str]) -> Quantized:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    started = time.perf_counter()
    classifier = load_classifier(source)
    if (rows := classifier.head.out_features) != len(card.labels):
        raise ClientFault("invalid_model", f"head.safetensors has {rows} rows, model.json {len(card.labels)} labels")
    graph = export(classifier)
    ids, mask, expected = _sample(classifier)
    exported = _logits(graph.SerializeToString(), ids, mask)
    if (difference := float(abs(exported - expected).max())) > TOLERANCE:
        raise PluginFault("export_differs", f"the ONNX graph of {card.name!r} is off by {difference:.2g} in its logits")
    exported_at = time.perf_counter()
    path = target / "model.onnx"
    if texts:
        from kernelm_optimizer.static import token_rows, write_static

        write_static(graph, path, token_rows(source, texts, card.max_tokens), reduce_range)
    else:
        quantize_dynamic(graph, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduce_range,
                         op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    return Quantized(
        card=msgspec.structs.replace(card, format="onnx", precision="int8", scores={}),
        export_s=exported_at - started, quantize_s=time.perf_counter() - exported_at,
        max_logit_difference=float(abs(_logits(str(path), ids, mask) - expected).max()),
        bytes_before=sum((source / name).stat().st_size for name in ("model.safetensors", "head.safetensors")),
        bytes_after=path.stat().st_size)


def load_classifier(folder: Path) -> Any:
    """The encoder in `folder` with its head, as a torch module.

    It maps `input_ids` and `attention_mask` ([batch, tokens] int64) to logits [batch, labels] and embeddings
    [batch, hidden], both float32; an embedding is the mean of the token vectors where the mask is 1, not normalized.
    """
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self, encoder: Any, head: Any) -> None:
            super().__init__()
            self.encoder, self.head = encoder, head

        def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
            vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(vectors.dtype)
            embeddings = (vectors * mask).sum(1) / mask.sum(1).clamp(min=1)
            return self.head(embeddings), embeddings

    tensors = _tensors(folder / "head.safetensors", "weight", "bias")
    head = torch.nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
    head.load_state_dict({name: torch.from_numpy(tensors[name]).float() for name in ("weight", "bias")})
    return Classifier(_load_encoder(folder), head).eval()


def _load_encoder(folder: Path) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not (folder / "model.safetensors").is_file():  # transformers would look for it on a hub
        raise ClientFault("invalid_model", "model.safetensors is missing", "give the digest of a trained model")
    # eager attention: the fused one exports to a graph that is a fifth slower in int8 (batches of 16)
    encoder, found = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, use_safetensors=True, local_files_only=True,
        trust_remote_code=False, output_loading_info=True)
    # a missing tensor would be random numbers; the pooler is not used
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise ClientFault("invalid_model", f"model.safetensors has no tensor {missing[0]!r} (and {len(missing) - 1} more)")
    return encoder


def export(classifier: Any) -> "onnx.ModelProto":
    """The ONNX graph of `load_classifier`'s module, for any batch and any number of tokens; no path of this machine is
    left in it."""
    import torch

    ids, mask, _ = _sample(classifier)
    inputs = (torch.from_numpy(ids), torch.from_numpy(mask))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    # the outputs get their names below, since the exporter calls nodes of its own so
    program = torch.onnx.export(
        classifier, inputs, dynamo=True, verbose=False, opset_version=OPSET, input_names=["input_ids", "attention_mask"],
        output_names=["logits_out", "embeddings_out"], dynamic_shapes={"input_ids": axes, "attention_mask": axes})
    assert program is not None
    graph = program.model_proto
    _name_outputs(graph, {"logits_out": "logits", "embeddings_out": "embeddings"})
    _keep_layer_norm(graph)
    del graph.metadata_props[:]
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    return graph


def _name_outputs(graph: "onnx.ModelProto", names: dict[str, str]) -> None:
    """Rename the graph's outputs; whoever has the new name already gets another."""
    names = {**{new: f"{new}_inner" for new in names.values()}, **names}
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.graph.value_info, *graph.graph.output):
        value.name = names.get(value.name, value.name)


def _keep_layer_norm(graph: "onnx.ModelProto") -> None:
    """Spell `Add` before a `LayerNormalization` as `Sum`, which is the same.

    onnxruntime (1.32) fuses Add and LayerNormalization into a SkipLayerNormalization whose CPU kernel is scalar: 5 ns an
    element against 0.9, a seventh of the whole int8 model's time.
    """
    producer = {output: node for node in graph.graph.node for output in node.output}
    for node in graph.graph.node:
        if node.op_type == "LayerNormalization" and (before := producer.get(node.input[0])) is not None:
            before.op_type = "Sum" if before.op_type == "Add" else before.op_type


def _sample(classifier: Any) -> tuple[Any, Any, Any]:
    """Random token ids [3, 48], a mask with padding, and the logits that the module gives for them."""
    import numpy as np
    import torch

    config = classifier.encoder.config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, min(48, config.max_position_embeddings)))
    mask = np.ones_like(ids)
    mask[1, ids.shape[1] // 2:] = 0
    with torch.inference_mode():
        logits = classifier(torch.from_numpy(ids), torch.from_numpy(mask))[0].numpy()
    return ids, mask, logits


def _logits(model: str | bytes, ids: Any, mask: Any) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
