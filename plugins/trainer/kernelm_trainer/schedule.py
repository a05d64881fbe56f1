"""How the learning rate goes over the steps of a training."""

import math
from typing import Literal


def rate_at(step: int, steps: int, warmup: float, schedule: Literal["linear", "cosine", "constant"] = "linear") -> float:
    """Share of the peak rate at `step` (0 is the first): it rises linearly over `warmup` of `steps`; then "linear" falls to 0,
    "cosine" does so along half a cosine (Loshchilov and Hutter, "SGDR", 2017), and "constant" stays."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - rising)  # 1 at the first step after the warmup
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
