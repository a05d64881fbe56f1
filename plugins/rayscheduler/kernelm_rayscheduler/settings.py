"""Settings of the plugin `rayscheduler`."""

from msgspec import Struct


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Units: `_s` in seconds."""

    address: str = "auto"  # of the Ray cluster, HOST:PORT; "auto" for RAY_ADDRESS, or the one of this machine
    namespace: str = "kernelm"  # in Ray; two systems on one Ray cluster need one each
    label: str = "kernelm-node"  # the label of a Ray node that holds the name of the kernelm node on the same machine
    queued: int = 100  # so many waiting jobs stand in Ray's queue at a time, the first ones
    settle_s: float = 1.0  # so long a decision waits for Ray's word on groups that it has just been given

    def __post_init__(self) -> None:
        if self.queued < 1 or self.settle_s <= 0:
            raise ValueError("queued must be at least 1, settle_s above 0")
