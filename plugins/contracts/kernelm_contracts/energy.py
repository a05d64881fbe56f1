"""Energy that this machine's processors have used, where they count it and let it be read.

Linux: the zones of the packages below /sys/class/powercap (Documentation/power/powercap/powercap.rst; AMD's have the same names).
Since CVE-2020-8694 root alone reads them; virtual machines have none. It is what the whole machine used meanwhile, so it is that of
the work and of an idle machine where nobody else is at work.
"""

import re
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")  # one a processor package; `intel-rapl:0:1` is a part of it


class Meter:
    """Counts from now on. It is to be asked more often than the counters wrap: at 250 W that is every 17 minutes."""

    def __init__(self, root: Path = POWERCAP) -> None:
        packages = sorted(root.iterdir()) if root.is_dir() else []
        self._last: dict[Path, int] = {}  # counter -> microjoules
        for counter in (package / "energy_uj" for package in packages if PACKAGE.fullmatch(package.name)):
            try:
                self._last[counter] = int(counter.read_text())
            except (OSError, ValueError):  # not for us to read: a part of the machine's energy would be taken for all of it
                self._last = {}
                return

    def joules(self) -> float:
        """Since the last question, or since it was made; 0.0 where nothing can be read."""
        used = 0
        for counter, last in self._last.items():
            now = int(counter.read_text())
            wrapped = int((counter.parent / "max_energy_range_uj").read_text()) if now < last else 0
            used += now - last + wrapped
            self._last[counter] = now
        return used / 1e6


__all__ = ["Meter"]
