"""Reading logs: real files, over their being set aside and emptied."""

import os
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kernelm_cli import home as homes
from kernelm_cli import log_files
from kernelm_cli.home import open_log
from kernelm_cli.log_files import Line, Log, find_logs, time_of

LOCAL = datetime(2026, 11, 30, 3, 28, 38, 417000).timestamp()
ZONED = datetime(2026, 11, 30, 3, 28, 38, 417000, tzinfo=UTC).timestamp()


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(("line", "at"), [
    ("2026-11-30 03:28:38,417 INFO kernelm.runner: jobs is ready", LOCAL),
    ("[4211] 2026/11/30 03:28:38.417000 [INF] Server is ready", LOCAL),
    ('{"time":"2026-11-30T03:28:38.417+00:00","level":"INFO"}', ZONED),
    ("2026-11-30T03:28:38.417Z INFO a Rust program", ZONED),
    ("[2026-11-30T04:28:38.417+0100] x", ZONED),
    ("2026-02-31 03:28:38 no such day", None),
    ("  File \"x.py\", line 3", None),
    ("epoch 2026-11-30 03:28:38", None),
])  # fmt: skip
def test_time_stamps(line: str, at: float | None) -> None:
    assert time_of(line) == at


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_lines_whatever_their_length(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "BLOCK", 64)
    chance = random.Random(7)
    lines = [chr(97 + k % 26) * chance.choice((0, 1, 63, 64, 65, 200)) for k in range(60)] + ["last"]
    path = write(tmp_path / "a.log", "\n".join(lines) + end)
    for count in range(len(lines) + 3):
        assert texts(list(Log("a", path).past(count))) == (lines[-count:] if count else [])
    assert texts(list(Log("a", path).past(None))) == lines


def test_what_was_set_aside_comes_before(tmp_path: Path) -> None:
    path = tmp_path / "nats.log"
    write(tmp_path / "nats.log.2026.11.29", "one\ntwo\n")
    os.utime(tmp_path / "nats.log.2026.11.29", (1.0, 1.0))
    write(tmp_path / "nats.log.2026.11.30", "three\nfour\n")
    os.utime(tmp_path / "nats.log.2026.11.30", (2.0, 2.0))
    write(path, "five\n")
    assert texts(list(Log("a", path).past(None))) == ["one", "two", "three", "four", "five"]
    assert texts(list(Log("a", path).past(4))) == ["two", "three", "four", "five"]
    assert texts(list(Log("a", path).past(1))) == ["five"]


def test_nothing_is_missed_when_a_log_is_set_aside_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "LOG_LIMIT", 10)
    first = open_log(tmp_path, "jobs")
    os.write(first, b"before\nhal")
    log = Log("jobs", tmp_path / "logs" / "jobs.log")
    assert texts(list(log.past(10, goes_on=True))) == ["before"]
    os.write(first, b"f\nwhole\n")
    assert texts(log.more()) == ["half", "whole"]
    os.write(first, b"last words")
    second = open_log(tmp_path, "jobs")
    assert (tmp_path / "logs" / "jobs.log.1").exists()
    os.write(second, b"anew\n")
    assert texts(log.more()) == ["last words", "anew"]
    os.write(second, b"on\n")
    assert texts(log.more()) == ["on"]
    log.close()
    os.close(first)
    os.close(second)


def test_a_log_that_is_emptied_and_one_that_comes_later(tmp_path: Path) -> None:
    path = write(tmp_path / "a.log", "one\ntwo\n")
    log, late = Log("a", path), Log("b", tmp_path / "b.log")
    assert texts(list(log.past(0, goes_on=True))) == texts(list(late.past(5, goes_on=True))) == []
    path.write_text("new\n")
    assert texts(log.more()) == ["new"]
    assert late.more() == []
    write(tmp_path / "b.log", "here\n")
    assert texts(late.more()) == ["here"]
    log.close()
    late.close()


def test_lines_without_a_time_have_that_of_those_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.log", "early\n2026-11-30 03:28:38,417 one\n  more of it\n2026-11-30 03:28:30,000 put back\n")
    assert [line.at for line in Log("a", path).past(None)] == [LOCAL] * 4
    bare = write(tmp_path / "b.log", "one\ntwo\n")
    os.utime(bare, (5.0, 5.0))
    assert [line.at for line in Log("b", bare).past(None)] == [5.0, 5.0]


def test_a_file_without_ends_of_lines_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "LONGEST", 8)
    path = write(tmp_path / "a.log", "x" * 20)
    log = Log("a", path)
    assert texts(list(log.past(None, goes_on=True))) == ["x" * 8, "x" * 8]
    write(path, "y\n")
    assert texts(log.more()) == ["xxxxy"]
    log.close()


def test_the_broker_has_two_files(tmp_path: Path) -> None:
    for name in ("logs/broker.log", "logs/jobs.log", "logs/jobs.log.1", "logs/audit.jsonl", "broker/nats.log"):
        write(tmp_path / name, "x\n")
    assert find_logs(tmp_path) == {"broker": (tmp_path / "logs" / "broker.log", tmp_path / "broker" / "nats.log"),
                                   "jobs": (tmp_path / "logs" / "jobs.log",)}  # fmt: skip
