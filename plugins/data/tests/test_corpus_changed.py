"""Inputs that change between two attempts of a job, or during one, and keep their size: what was read before is not taken."""

import gzip
import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from kernelm_contracts.data import Input, Limits, PrepareRequest, Split, Store, Train
from kernelm_data.corpus import remote
from kernelm_data.corpus.formats import records
from kernelm_data.corpus.inputs import pieces
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.remote import Remote
from kernelm_data.corpus.store import Rows
from kernelm_sdk.errors import PluginFault


class StoppedError(Exception):
    """The process was killed."""


def lines(word: str) -> bytes:
    rows = [{"text": f"{word} is line {n} of nobody else, {n * 7919}, {chr(97 + n % 26) * 9} {n * n}."} for n in range(300)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Attempts:
    """Runs over one input in one work folder."""

    def __init__(self, folder, given, artifact=None):
        self.folder, self.given, self.artifact = folder, given, artifact

    def run(self, stop="", meanwhile=lambda: None):
        """Until the phase `stop` begins, or to the end: the words that the texts begin with. `meanwhile` is called before each
        shard is read."""
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        (self.folder / "work").mkdir(exist_ok=True)
        request = PrepareRequest("", "auto", inputs=(self.given,), split=Split(0, 0), store=Store(shard_mb=0.01),
                                 train=Train("bpe", 400))  # fmt: skip

        def say(fraction, phase, *_):
            if phase == stop:
                raise StoppedError
            if phase == "read" and fraction > 0:
                meanwhile()

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


def write_over(path, data):
    """As another process would, but however coarse the clock of the file system is."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(0, before + 1))


def test_a_local_file_that_is_written_over_during_an_attempt_makes_no_dataset(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines("Oslo"))
    attempts = Attempts(tmp_path, Input(url=str(path)))
    with pytest.raises(PluginFault) as caught:
        attempts.run(meanwhile=lambda: write_over(path, lines("Bonn")) if attempts.times() else None)  # some shards are done
    assert (caught.value.code, caught.value.retriable) == ("input_changed", True)
    assert attempts.times()
    assert attempts.run() == {"Bonn"}


@pytest.mark.parametrize(("name", "pack"), [("in.jsonl", bytes), ("in.txt", bytes), ("in.jsonl.gz", gzip.compress)])
def test_a_local_file_that_is_written_over_while_it_is_read(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(lines("Oslo")))
    (piece,) = pieces((Input(url=str(path)),), (None,), Store())
    found = records(piece, Input(), Limits())
    assert "Oslo" in str(next(found).data)
    write_over(path, pack(lines("Bonn")))
    with pytest.raises(PluginFault, match=name):
        list(found)


def test_a_packed_file_that_is_not_yet_written_to_its_end_is_changing_and_not_broken(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    whole = gzip.compress(lines("Oslo"))
    path.write_bytes(whole[:-100])
    (piece,) = pieces((Input(url=str(path)),), (None,), Store())
    assert list(records(piece, Input(), Limits()))[-1].broken == "truncated gz"  # nobody writes
    found = records(piece, Input(), Limits())
    next(found)
    os.utime(path, ns=(0, 1))
    with pytest.raises(PluginFault, match="written to"):
        list(found)


class Gone:
    """An open file whose connection is broken."""

    def read(self, _):
        raise ConnectionResetError

    def close(self):
        pass


def test_a_file_elsewhere_that_is_another_one_when_its_connection_is_back():
    memory = fsspec.filesystem("memory")
    memory.pipe("/kernelm-changed/in.jsonl", lines("Oslo"))
    try:
        file = Remote("memory://kernelm-changed/in.jsonl")
        assert b"Oslo" in file.read(100)
        file._file = Gone()
        assert b"line" in file.read(100)  # it is what it was
        memory.pipe("/kernelm-changed/in.jsonl", lines("Bonn"))
        file._file = Gone()
        with pytest.raises(PluginFault, match=r"kernelm-changed/in\.jsonl"):
            file.read(100)
    finally:
        memory.rm("/kernelm-changed", recursive=True)


@pytest.mark.parametrize(("name", "pack"), [("in.jsonl", bytes), ("in.jsonl.gz", gzip.compress)])
def test_a_file_elsewhere_that_changes_while_its_connection_holds(monkeypatch, name, pack):
    monkeypatch.setattr(remote, "BLOCK", 1_000)  # not all of it is one answer
    memory, url = fsspec.filesystem("memory"), f"memory://kernelm-changed/{name}"
    limits, given = Limits(), Input(url=url)
    try:
        for after in (None, lines("Bonn")):
            memory.pipe(f"/kernelm-changed/{name}", pack(lines("Oslo")))
            (piece,) = pieces((given,), (None,), Store())
            assert len(list(records(piece, given, limits))) == 300  # it stays what it is
            found = records(piece, given, limits)
            assert "Oslo" in str(next(found).data)
            if after:
                memory.pipe(f"/kernelm-changed/{name}", pack(after))
            else:
                memory.rm(f"/kernelm-changed/{name}")
            with pytest.raises(PluginFault, match="kernelm-changed") as caught:
                list(found)
            assert caught.value.code == "input_changed"
    finally:
        memory.rm("/kernelm-changed", recursive=True)


def test_a_small_file_elsewhere_is_asked_for_once():
    memory = fsspec.filesystem("memory")
    memory.pipe("/kernelm-changed/in.jsonl", lines("Oslo"))
    try:
        file = Remote("memory://kernelm-changed/in.jsonl")
        file._ask = None  # it would be called
        file.check_unchanged()
    finally:
        memory.rm("/kernelm-changed", recursive=True)


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
