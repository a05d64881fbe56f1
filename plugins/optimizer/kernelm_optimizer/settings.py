"""The plugin's settings."""

from msgspec import Struct

from kernelm_sdk.system import Resources


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the optimizer's pool."""

    train: Resources = Resources(cpu=1.5, memory_mb=3000)  # what each training of a candidate asks for: less than a small
    # node has, since this job and a deployment that serves hold some of it meanwhile
    measure: Resources = Resources(cpu=1.5, memory_mb=3000)  # what each measurement asks for
    wait_s: float = 60.0  # how long a measurement may wait for its cores when the budget is spent, or nearly
    rounds: int = 3  # of each measurement; models take turns within a round
    poll_max_s: float = 1.0  # longest pause between two looks at the jobs that are waited for
    patience_s: float = 60.0  # how long the job table may be away before the search gives up
    reduce_range: bool = False  # 7-bit weights; for processors without VNNI, where 8-bit sums can saturate

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.poll_max_s <= 0 or self.patience_s < 0 or not self.wait_s >= 0:
            raise ValueError("rounds must be at least 1, poll_max_s above 0, patience_s and wait_s at least 0")
