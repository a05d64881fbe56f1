"""What a job may say of how far it got."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from kernelm_sdk.plugin import Job
from kernelm_sdk.system import Progress


async def test_a_metric_that_json_can_t_hold_does_not_end_the_job(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(scratch=tmp_path)
    job = Job(context, "jobs", "train-1", 1)
    job.progress(1.2, "train", "diverged", loss=math.nan, best=math.inf, step=7, rate=np.float32(0.5))
    sent = msgspec.json.decode(msgspec.json.encode(job.latest), type=Progress)
    assert (sent.fraction, sent.message, sent.metrics) == (1.0, "diverged", {"step": 7.0, "rate": 0.5})
