"""Settings of a pool of the encoder server."""

from typing import Annotated

from msgspec import Meta, Struct

from kernelm_contracts.server import ServedModel

Count = Annotated[int, Meta(ge=1)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None  # what the pool serves; None for instances that only measure
    threads: Annotated[int, Meta(ge=0)] = 0  # of the compute library; 0 for as many as the deployment has cores
    max_batch: Count = 32  # texts that run together at most
    max_batch_ms: Annotated[float, Meta(gt=0)] = 100.0  # a batch is cut so that it should run no longer: who comes
    #                                                     meanwhile waits about so long for the next batch at most
    max_queue: Count = 1024  # texts that wait at most; a request beyond is refused with `busy`
