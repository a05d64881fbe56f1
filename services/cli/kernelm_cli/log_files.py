"""The logs of a home, as files: which there are, the last lines of each, and what is written from then on."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = 2**16  # bytes read at a time on the way back from the end of a file
LONGEST = 2**20  # bytes; a longer line is cut in two, so that memory suffices for a file without any end of line
AHEAD = 1000  # lines that are looked at for the first time stamp of a log
# As Python's logging and JSON lines of kernelm_sdk.logs have it, and nats-server ("[pid] 2026/11/30 03:28:38.123456"), Go, Rust
STAMP = re.compile(r'(?:\[\d+\] |\{"time":"|\[)?(\d{4}([-/])\d\d\2\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)')


class Line(NamedTuple):
    """One line of a log."""

    at: float  # Unix seconds: of its time stamp, without one of the line before it
    name: str  # of the log
    text: str


def find_logs(home: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each log by its name, which is that of a process or instance. The broker has two: what it prints, which is
    little, and the log that nats-server itself keeps and sets aside."""
    found: dict[str, tuple[Path, ...]] = {path.stem: (path,) for path in sorted((home / "logs").glob("*.log"))}
    if (nats := home / "broker" / "nats.log").exists():
        found["broker"] = (*found.get("broker", ()), nats)
    return found


def written(paths: Iterable[Path]) -> float:
    """When something was written to one of the files for the last time, Unix seconds; 0.0 where there is none."""
    times = [0.0]
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # being set aside
            continue
    return max(times)


def time_of(text: str) -> float | None:
    """The time stamp with which a line begins, as Unix seconds. Without a zone it is local time, as loggers have it."""
    if (found := STAMP.match(text)) is None:
        return None
    try:
        return datetime.fromisoformat(found[1].replace("/", "-")).timestamp()
    except ValueError:  # the 31st of February
        return None


class Log:
    """One log: `past` once, then `more` as often as one likes. What was set aside when it was too large (`<file>.1`, or as
    nats-server calls it) comes before it, and nothing is missed when that happens while it is read."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._file: BinaryIO | None = None  # the newest of its files that was seen; behind its position nothing was read
        self._rest = b""  # of a line whose end is not there yet
        self._at = 0.0

    def past(self, count: int | None, *, goes_on: bool = False) -> Iterator[Line]:
        """The last `count` lines, None for all of them. A last line without an end is one, unless it `goes_on`."""
        return self._dated(self._past(count, goes_on))

    def more(self) -> list[Line]:
        """The lines that were written since."""
        lines = list(self._dated(self._texts()))
        try:
            status = self._path.stat()
        except FileNotFoundError:  # set aside and not yet made anew, or never written
            return lines
        if self._file is None or not os.path.samestat(status, os.fstat(self._file.fileno())):
            with self._path.open("rb") as new:
                lines += self._dated(chain(self._texts(), self._ended()))  # what was written before it was set aside
                self.close()
                self._file = os.fdopen(os.dup(new.fileno()), "rb")
        elif status.st_size < self._file.tell():  # somebody has emptied it
            lines += self._dated(self._ended())
            self._file.seek(0)
        return [*lines, *self._dated(self._texts())]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _past(self, count: int | None, goes_on: bool) -> Iterator[str]:
        for file in reversed(self._last_files(count)):
            yield from self._ended()  # what a killed process left of a line is one
            self.close()
            self._file = file
            yield from self._texts()
        if not goes_on:
            yield from self._ended()
            self.close()

    def _last_files(self, count: int | None) -> list[BinaryIO]:
        """Those that hold the last `count` lines, the newest first, each where these begin."""
        files: list[BinaryIO] = []
        aside = [Path(name) for name in glob.glob(f"{glob.escape(str(self._path))}.*")]  # noqa: PTH207 - escaped
        for path in (self._path, *sorted(aside, key=lambda p: written((p,)), reverse=True)):
            if files and count == 0:
                break
            try:
                file = path.open("rb")
            except FileNotFoundError:
                continue
            if any(os.path.sameopenfile(file.fileno(), other.fileno()) for other in files):  # set aside this very moment
                file.close()
                continue
            files.append(file)
            if count is not None:
                count -= _go_back(file, count)
        return files

    def _texts(self) -> Iterator[str]:
        """The lines behind the position whose end is there."""
        while self._file is not None and (piece := self._file.readline(LONGEST)):
            self._rest += piece
            if piece.endswith(b"\n") or len(self._rest) >= LONGEST:
                yield from self._ended()

    def _ended(self) -> Iterator[str]:
        if self._rest:
            text, self._rest = self._rest.decode(errors="replace").rstrip("\r\n"), b""
            yield text

    def _dated(self, texts: Iterable[str]) -> Iterator[Line]:
        """Each with its time. Lines before the first with a time stamp were written by then; where there is none at all, the
        file's own time will do."""
        early: list[str] = []
        for text in texts:
            at = time_of(text)
            if at is None and not self._at and len(early) < AHEAD:
                early.append(text)
                continue
            self._at = max(self._at, at or 0.0) or written((self._path,))  # never back: they are merged by it
            yield from (Line(self._at, self.name, each) for each in (*early, text))
            early.clear()
        if early:
            self._at = written((self._path,))
            yield from (Line(self._at, self.name, each) for each in early)


def _go_back(file: BinaryIO, count: int) -> int:
    """Put the file before its last `count` lines; how many there are from there."""
    position = end = file.seek(0, os.SEEK_END)
    found = 0
    while position and count:
        size = min(BLOCK, position)
        position -= size
        file.seek(position)
        block = file.read(size)
        at = size - (position + size == end and block.endswith(b"\n"))  # the end of the last line begins none
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found == count:
                file.seek(position + at + 1)
                return found
    if count:
        file.seek(0)
    return found + 1 if count and end else 0
