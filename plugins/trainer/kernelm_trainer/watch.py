"""Ends a training that diverges, with a diagnosis."""

import math

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import PluginFault
from kernelm_trainer.checkpoint import Position

FIRST = 8  # steps whose mean loss is where the training came from
KEPT = 0.9  # of the recent mean at each step
EXPLODED = 3.0  # times the first loss, or times 1 nat where that is more


def check_loss(here: Position, request: TrainRequest, loss: float, norm: float, rate: float, bf16: bool) -> None:
    """PluginFault "diverged" if the loss is not finite, or has been far above where it began for some steps. `here` is before
    the step; it keeps the means."""
    if here.steps < FIRST:
        here.first_loss += (loss - here.first_loss) / (here.steps + 1)
        here.recent_loss = here.first_loss
    here.recent_loss = KEPT * here.recent_loss + (1 - KEPT) * loss
    exploded = here.steps >= FIRST and here.recent_loss > EXPLODED * max(here.first_loss, 1.0)
    if math.isfinite(loss) and math.isfinite(norm) and not exploded:
        return
    what = f"mean loss {here.recent_loss:.4g} after {here.first_loss:.4g} at the beginning" if exploded else f"loss {loss}"
    raise PluginFault("diverged", f"training diverged in epoch {here.epoch + 1}, step {here.step + 1}: {what}, "
                      f'gradient norm {norm}, learning rate {rate:.3g}, algorithm "{request.algorithm}", '
                      f'{"bf16" if bf16 else "fp32"}',
                      "lower learning_rate, raise warmup, or set precision to fp32; then check the dataset",
                      epoch=here.epoch + 1, step=here.step + 1)  # fmt: skip
