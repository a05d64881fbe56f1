"""Causal language models whose weights are integers of 8 or 4 bits: how they are stored, and the layers that compute with them.

A folder of structure "causal-lm" with `ModelCard.precision` "int8" or "int4" holds in `model.safetensors`, for each linear map:

8 bits   `weight` int8 [out, in], `scale` bfloat16 [out]: scale[:, None] * weight
4 bits   `weight` uint8 [out, in / 2], the even column in the low half; `scale`, `zero` bfloat16 [out, in / 32], one for each 32
         columns of a row: scale * level + zero, where level is 0 to 15

Token embeddings have 8 bits, one scale a row, in either case, and so has the head, which is not stored where it shares their
weights. All else is bfloat16. `quantization_config` of config.json is {"quant_method": "kernelm", "bits": 8 or 4, "tied": whether
head and embeddings share}. To import this module is to teach transformers' `from_pretrained` to read that (its `HfQuantizer`).

The products are torch's own (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`), which torchao (0.18) does not call on a
processor: its int8 linear map of 640 x 2048 takes 416 us for one row, bfloat16 159, this 75 (a core of an AMD EPYC with AVX-512).
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "kernelm"
GROUP = 32  # columns that share a scale, of 4 bits
FEW = 16  # rows up to which the product with integers is faster than one with the weights made bfloat16 first (measured: 18)


class Int8Linear(nn.Module):
    """`x @ (scale[:, None] * weight).T + bias`."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(rows, dtype=torch.bfloat16), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, dtype=torch.bfloat16), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = times(x, self.weight, self.scale)
        return found if self.bias is None else found + self.bias


class Int8Embedding(nn.Module):
    """Rows of `scale[:, None] * weight`, times `factor` where the architecture has one."""

    def __init__(self, rows: int, columns: int, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(rows, dtype=torch.bfloat16), requires_grad=False)
        self.factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.weight[ids].to(self.scale.dtype) * self.scale[ids].unsqueeze(-1)
        return found if self.factor == 1.0 else found * torch.tensor(self.factor, dtype=found.dtype, device=found.device)


class TiedHead(nn.Module):
    """The head that has the embeddings' weights, and none of its own."""

    def __init__(self, embedding: Int8Embedding) -> None:
        super().__init__()
        self.of = (embedding,)  # a tuple, so that its weights do not count twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return times(x, self.of[0].weight, self.of[0].scale)


class Int4Linear(nn.Module):
    """`x @ weight.T + bias` with 4-bit levels; on a processor they are repacked as torch wants them at the first use."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns // 2, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(rows, columns // GROUP, dtype=torch.bfloat16), requires_grad=False)
        self.zero = nn.Parameter(torch.empty(rows, columns // GROUP, dtype=torch.bfloat16), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, dtype=torch.bfloat16), requires_grad=False) if bias else None
        self.packed: tuple[torch.Tensor, torch.Tensor] | None = None

    def levels(self) -> torch.Tensor:
        """[out, in] uint8, 0 to 15."""
        return torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1)

    def pack(self) -> None:
        """Keep the weights as torch's kernel for the processor wants them, in place of the stored form. It reads a level q as
        (q - 8) * scale + zero."""
        packed = torch._convert_weight_to_int4pack_for_cpu(self.levels().int(), 1)
        zero = (self.zero.float() + 8 * self.scale.float()).bfloat16()
        self.packed = packed, torch.stack((self.scale.T, zero.T), -1).contiguous()
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.packed is not None and flat.dtype == torch.bfloat16:
            found = torch._weight_int4pack_mm_for_cpu(flat, self.packed[0], GROUP, self.packed[1])
        else:
            scale, zero = (each.repeat_interleave(GROUP, 1) for each in (self.scale, self.zero))
            found = linear(flat, (self.levels() * scale + zero).to(flat.dtype))
        found = found.view(*x.shape[:-1], -1)
        return found if self.bias is None else found + self.bias


def times(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x @ (scale[:, None] * weight).T`, [..., out] in the type of `x`."""
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= FEW and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        found = torch._weight_int8pack_mm(flat, weight, scale)
    else:
        found = linear(flat, weight.to(x.dtype)) * scale.to(x.dtype)
    return found.view(*x.shape[:-1], -1)


def int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A float matrix as `weight` and `scale`."""
    scale = (weight.float().abs().amax(1) / 127).bfloat16()
    scale[scale == 0] = 1.0  # a row of zeros needs no scale
    levels = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return {"weight": levels.to(torch.int8), "scale": scale}


def int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A float matrix, whose columns are a multiple of 32, as `weight`, `scale` and `zero`."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = ((high - low) / 15).bfloat16(), low.bfloat16()
    scale[scale == 0] = 1.0
    levels = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return {"weight": levels[:, ::2] | levels[:, 1::2] << 4, "scale": scale, "zero": zero}


def layers(model: Any, bits: int, tied: bool) -> dict[str, nn.Module]:
    """Name of each module of a model, as transformers makes it, that gets integers -> the one to put in its place."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
    own = Int8Embedding(embedding.num_embeddings, embedding.embedding_dim, factor)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module is embedding:
            found[name] = own
        elif module is head:
            found[name] = TiedHead(own) if tied else Int8Linear(module.out_features, module.in_features, module.bias is not None)
        elif type(module) is nn.Linear:
            sizes = module.out_features, module.in_features, module.bias is not None
            found[name] = Int4Linear(*sizes) if bits == 4 and module.in_features % GROUP == 0 else Int8Linear(*sizes)
    return found


@register_quantization_config(METHOD)
class Config(QuantizationConfigMixin):
    """`quantization_config` of config.json."""

    def __init__(self, bits: int = 8, tied: bool = False, **_: Any) -> None:
        if bits not in (4, 8):
            raise ValueError(f"quantization_config: bits is {bits}, and must be 8 or 4")
        self.quant_method: Any = METHOD
        self.bits, self.tied = bits, tied


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Puts the layers of this module where `from_pretrained` would load floats."""

    requires_calibration = True  # it reads what is quantized already, and quantizes nothing
    quantization_config: Config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        with torch.device("meta"):
            found = layers(model, self.quantization_config.bits, self.quantization_config.tied)
        for name, module in found.items():
            model.set_submodule(name, module)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, Int4Linear) and module.scale.dtype == torch.bfloat16 and not torch.cuda.is_available():
                module.pack()
            elif isinstance(module, Int8Linear | Int8Embedding):
                # off the mapped file: the kernel needs 64-byte alignment, and crashes without
                module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False
