"""Attention while training in bf16 on a processor: short rows by products of whole matrices.

Torch's fused kernel multiplies piece by piece. In bf16 each piece is a call of a library that plans it anew (oneDNN), or that falls
back on float32 where the processor is not of its maker (MKL); a product of whole matrices is planned once. Forward and backward of
64 heads of 64, processor ms of one core of an AMD EPYC, causal:

    rows x tokens      fused    here    here, compiled
    16 x 128            59       28
     8 x 256            63       45       32
     4 x 512           107       79

As in the fused kernel nothing of the size tokens x tokens is kept for the backward pass: it is computed again. Processors with AMX,
for which the fused kernel has a way of its own, keep that: there it has not been measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

LARGEST = 2**24  # scores at once, of 2 bytes, and a few times as many in passing


def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
           is_causal: bool | None = None, **more: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """In place of transformers' "sdpa", whose arguments and result these are: query [batch, heads, tokens, size]; the result
    [batch, tokens, heads, size]. What is not for this way goes there."""
    if not _by_products(query, key, attention_mask, dropout, more):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)  # fmt: skip
        return found
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    attended: torch.Tensor = ByProducts.apply(*(t.to(torch.bfloat16) for t in (scaled, key, value)), attention_mask)
    return attended.transpose(1, 2).contiguous(), None


def _by_products(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, dropout: float, more: dict[str, Any]) -> bool:
    """Whether this is training in bf16 here, of rows that are short enough, with nothing that is not known here."""
    plain = not dropout and not more.get("softcap") and more.get("position_bias") is None
    plain = plain and (mask is None or mask.dtype == torch.bool)
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    # autocast makes bfloat16 of what the fused kernel is given: rotated queries are float32
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    here = query.device.type == "cpu" and dtype == torch.bfloat16
    return here and plain and query.requires_grad and query.shape[2] > 1 and scores <= LARGEST


class ByProducts(torch.autograd.Function):
    """softmax(query key^T) value over the places where `mask` is true (None: everywhere); sums and exponents in float32."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        return _weights(query, key, mask) @ value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        weights = _weights(query, key, mask)
        of_value = weights.transpose(2, 3) @ gradient
        of_scores = torch.ops.aten._softmax_backward_data(gradient @ value.transpose(2, 3), weights, -1, weights.dtype)
        return of_scores @ key, of_scores.transpose(2, 3) @ query, of_value, None


def _weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = query @ key.transpose(2, 3)
    if mask is not None:  # the least number, not minus infinity: a row of padding alone must not become NaN
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


@contextmanager
def short_rows_by_products() -> Iterator[None]:
    """Inside, transformers' models that attend by "sdpa" do it by `attend`."""
    if not torch.cpu.get_capabilities().get("amx_bf16"):
        AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
