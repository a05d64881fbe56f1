"""Settings of a trainer's pool."""

from typing import Annotated

from msgspec import Meta, Struct


class TrainerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    threads: int = 0  # of the compute library; 0 for as many as the job has cores
    address: str = ""  # host name or IP address at which other nodes reach this one, for gangs; "" for the host name's
    nice: Annotated[int, Meta(ge=0, le=19)] = 0  # of what trains, see nice(1): above 0 it gives way to whoever answers calls
