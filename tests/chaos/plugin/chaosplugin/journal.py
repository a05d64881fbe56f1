"""What the plugin's instances did, in the order in which they did it, shared by all of them.

    <folder>/journal.jsonl      one line a happening; a line is one write(2), so a kill can't tear it
    <folder>/effects/<name>     an effect; made with O_EXCL, so it is done at most once, by whoever is first
"""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = "KERNELM_CHAOS_FOLDER"  # outside of the home, which some faults fill up or damage


class Journal:
    """The journal in `folder`."""

    def __init__(self, folder: Path, instance: str) -> None:
        self._effects, self._instance = folder / "effects", instance
        self._effects.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def note(self, what: str, **more: Any) -> None:
        """Append a line."""
        os.write(self._file, json.dumps({"what": what, "by": self._instance, **more}).encode() + b"\n")

    def effect(self, name: str, value: str) -> bool:
        """Do the effect `name`, once; False if it was done already. ValueError if it was done with another value."""
        path = self._effects / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(value)
        try:
            os.link(temporary, path)  # appears whole, or not at all, and only once
        except FileExistsError:
            if (other := path.read_text()) != value:
                raise ValueError(f"effect {name} was done with {other!r}, now it would be {value!r}") from None
            return False
        finally:
            temporary.unlink()
        return True


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines of the journal."""
    path = folder / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
