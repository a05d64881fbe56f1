"""Settings of a trainer's pool."""

from msgspec import Struct


class TrainerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    threads: int = 0  # of the compute library; 0 for as many as the job has cores
