"""Inputs that change between two attempts of a job, and keep their size: what was read of them before is not taken."""

import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from kernelm_contracts.data import Input, PrepareRequest, Split, Store, Train
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.store import Rows


class StoppedError(Exception):
    """The process was killed."""


def lines(word: str) -> bytes:
    rows = [{"text": f"{word} is line {n} of nobody else, {n * 7919}, {chr(97 + n % 26) * 9} {n * n}."} for n in range(300)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Attempts:
    """Runs over one input in one work folder."""

    def __init__(self, folder, given, artifact=None):
        self.folder, self.given, self.artifact = folder, given, artifact

    def run(self, stop=""):
        """Until the phase `stop` begins, or to the end: the words that the texts begin with."""
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        (self.folder / "work").mkdir(exist_ok=True)
        request = PrepareRequest("", "auto", inputs=(self.given,), split=Split(0, 0), store=Store(shard_mb=0.01),
                                 train=Train("bpe", 400))  # fmt: skip

        def say(fraction, phase, *_):
            if phase == stop:
                raise StoppedError

        prepare(Sources((self.given,), (self.artifact,)), request, self.folder / "work", out, say)
        rows = Rows(out)
        return {rows[i]["text"].split()[0] for i in range(len(rows))}

    def times(self):
        """When each finished shard was written."""
        return {path: path.stat().st_mtime_ns for path in (self.folder / "work" / "first").rglob("book.json")}


def test_a_local_file_that_was_written_over_is_read_again(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines("Oslo"))
    attempts = Attempts(tmp_path, Input(url=str(path)))
    with pytest.raises(StoppedError):
        attempts.run("deduplicate")
    before = attempts.times()
    assert len(before) > 1
    path.write_bytes(lines("Bonn"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # however coarse the clock of the file system is
    assert attempts.run() == {"Bonn"}
    assert all(attempts.times()[shard] != time for shard, time in before.items())


def test_a_tokenizer_of_text_that_is_gone_is_not_taken(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines("Oslo"))
    attempts = Attempts(tmp_path, Input(url=str(path)))
    attempts.run()
    kept = tmp_path / "work" / "tokenizer.json"
    one = kept.read_text()
    path.write_bytes(lines("Bonn"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    (tmp_path / "out").rename(tmp_path / "earlier")
    attempts.run()
    assert kept.read_text() != one


def test_an_artifact_is_what_it_is_whenever_it_was_unpacked(tmp_path):
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "in.jsonl").write_bytes(lines("Oslo"))
    attempts = Attempts(tmp_path, Input(artifact="sha256:x"), folder)
    with pytest.raises(StoppedError):
        attempts.run("deduplicate")
    before = attempts.times()
    os.utime(folder / "in.jsonl", ns=(0, 0))
    assert attempts.run() == {"Oslo"}
    assert attempts.times() == before


def test_a_file_in_memory_and_one_over_http(tmp_path):
    memory = fsspec.filesystem("memory")
    (tmp_path / "served").mkdir()
    path = tmp_path / "served" / "in.jsonl"

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(path.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = {"memory://kernelm-changed/in.jsonl": lambda data: memory.pipe("/kernelm-changed/in.jsonl", data),
            f"http://127.0.0.1:{server.server_port}/in.jsonl": path.write_bytes}  # fmt: skip
    try:
        for number, (url, write) in enumerate(urls.items()):
            write(lines("Oslo"))
            if path.exists():
                os.utime(path, (0, 1_000_000))  # HTTP tells whole seconds
            (tmp_path / str(number)).mkdir()
            attempts = Attempts(tmp_path / str(number), Input(url=url))
            with pytest.raises(StoppedError):
                attempts.run("deduplicate")
            write(lines("Bonn"))
            assert attempts.run() == {"Bonn"}, url
    finally:
        server.shutdown()
        server.server_close()
        memory.rm("/kernelm-changed", recursive=True)
