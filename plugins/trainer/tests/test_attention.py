import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from kernelm_trainer import attention
from kernelm_trainer.attention import attend, short_rows_by_products

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def computed(function: object, mask: torch.Tensor | None, causal: bool, heads: int, dtype: torch.dtype) -> Four:
    """The result, and the gradients of query, key and value, of 2 rows x 4 heads x 24 tokens x 16."""
    generator = torch.Generator().manual_seed(7)
    query, key, value, gradient = (torch.randn(2, count, 24, 16, generator=generator).to(dtype) for count in (4, heads, heads, 4))
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, 4 // heads  # type: ignore[assignment]
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    result, _ = function(module, *inputs, mask)  # type: ignore[operator]
    result.backward(gradient.transpose(1, 2))
    return (result.detach(), *(tensor.grad for tensor in inputs))  # type: ignore[return-value]


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(("causal", "padding"), [(True, False), (False, False), (False, True)])
def test_it_computes_what_the_fused_kernel_does(causal: bool, padding: bool, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)  # it must not be what computes
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool)
    mask[1, :, :, 17:] = False
    given = mask if padding else None
    exact = computed(sdpa_attention_forward, given, causal, heads, torch.float64)
    for ours, wanted in zip(computed(attend, given, causal, heads, torch.bfloat16), exact, strict=True):
        assert (ours.double() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_under_autocast_it_takes_float32_as_the_fused_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    exact = computed(sdpa_attention_forward, None, True, 4, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(attend, None, True, 4, torch.float32)
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours.double() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_a_row_of_padding_alone_is_no_nan() -> None:
    mask = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    assert all(tensor.isfinite().all() for tensor in computed(attend, mask, False, 4, torch.bfloat16))


@pytest.mark.parametrize("field", ["dtype", "long", "dropout", "mask"])
def test_what_it_is_not_for_goes_to_the_fused_kernel(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if field == "dtype" else torch.bfloat16
    query = torch.randn(2, 4, 24, 16, dtype=dtype).requires_grad_()
    mask = torch.zeros(2, 1, 24, 24, dtype=dtype) if field == "mask" else None
    if field == "long":
        monkeypatch.setattr(attention, "LARGEST", 2 * 4 * 24 * 24 - 1)
    torch.manual_seed(3)
    ours = attend(torch.nn.Module(), query, query, query, mask, dropout=0.5 if field == "dropout" else 0.0)[0]
    torch.manual_seed(3)
    theirs = sdpa_attention_forward(torch.nn.Module(), query, query, query, mask, dropout=0.5 if field == "dropout" else 0.0)[0]
    assert ours.equal(theirs)


def test_models_attend_as_before_when_a_training_is_over() -> None:
    with short_rows_by_products():
        assert AttentionInterface()["sdpa"] in (attend, sdpa_attention_forward)
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
