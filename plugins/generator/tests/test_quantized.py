"""Models whose weights are integers (`optimizer/1.compress`) are planned with what they hold, and answer."""

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from kernelm_contracts.trainer import ModelCard
from kernelm_generator.engine import Asked, Engine
from kernelm_generator.loading import load
from kernelm_generator.sampling import Sampling
from kernelm_generator.settings import Settings
from kernelm_optimizer.integers import integers

LOG = logging.getLogger("test")
PROMPT = list(range(65, 91))


@pytest.mark.parametrize(("bits", "apart"), [(8, 0.1), (4, 0.6)])
async def test_a_model_of_integers_answers(tiny: Path, tmp_path: Path, bits: int, apart: float) -> None:
    integers(tiny, tmp_path / "less", ModelCard("tiny", "text-generation", "causal-lm", (), 512), bits)
    settings = Settings(precision="bf16", slots=2, threads=1)
    whole, _ = load(tiny, settings, 0, 1, LOG)
    model, plan = load(tmp_path / "less", settings, 0, 1, LOG)
    assert (whole.precision, model.precision) == ("bf16", f"int{bits}"), "`info` says how the weights are held"
    with torch.inference_mode():
        wanted, found = (m.network(torch.tensor([PROMPT])).logits.float() for m in (whole, model))
    assert float((found - wanted).norm() / wanted.norm()) < apart
    engine = Engine(model, plan, 16, 4, LOG)
    try:
        answer = engine.submit(Asked(PROMPT, 20, Sampling()))
        assert [piece.finish async for piece in engine.pieces(answer)][-1] == "length"
    finally:
        await asyncio.to_thread(engine.close)
    assert len(answer.made) == 20
