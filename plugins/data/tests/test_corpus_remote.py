"""Inputs that fsspec reaches: over HTTP, from servers that know ranges and from one that doesn't."""

import gzip
import http.server
import io
import json
import re
import threading
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernelm_contracts.data import Input, PrepareRequest, Split, Store
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.store import Rows
from kernelm_sdk.errors import ClientFault


def text(n: int) -> str:
    return f"Document {n} is about {n * 7919}, about {chr(97 + n % 26) * 5} and about nothing that another one is about, {n}."


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; one byte range a request where `ranges` is set (RFC 9110, section 14)."""

    ranges = True

    def send_head(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not (self.ranges and asked):
            return super().send_head()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return io.BytesIO(data[first : last + 1])

    def end_headers(self):
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


class NoRanges(Handler):
    ranges = False


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    lines = b"".join(json.dumps({"text": text(n)}).encode() + b"\n" for n in range(200))
    (folder / "a.jsonl").write_bytes(lines)
    packed = b"".join(json.dumps({"text": text(n)}).encode() + b"\n" for n in range(200, 300))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(packed))
    pq.write_table(pa.table({"text": [text(n) for n in range(300, 400)]}), folder / "c.parquet")
    (folder / "d.txt").write_text(text(400))
    return folder


@pytest.fixture
def served(folder, request):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def corpus(tmp_path, urls, workers=0, **fields):
    inputs = tuple(Input(url=url) for url in urls)
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    request = PrepareRequest("", "auto", inputs=inputs, split=Split(0, 0), max_broken=1.0, **fields)
    card = prepare(Sources(inputs, tuple(None for _ in inputs)), request, work, out, lambda *_: None, workers=workers)
    rows = Rows(out)
    return card, {rows[i]["text"] for i in range(len(rows))}


FILES = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")


@pytest.mark.parametrize("served", [Handler], indirect=True)
def test_over_http_by_ranges_in_parts(tmp_path, served):
    card, texts = corpus(tmp_path, [f"{served}/{name}" for name in FILES], 2, store=Store(shard_mb=0.008))
    assert texts == {text(n) for n in range(401)}
    assert card.sources == {"jsonl": 300, "parquet": 100, "text": 1}


@pytest.mark.parametrize("served", [NoRanges], indirect=True)
def test_a_server_without_ranges_costs_what_needs_them_and_nothing_else(tmp_path, served):
    card, texts = corpus(tmp_path, [f"{served}/{name}" for name in FILES])
    assert texts >= {text(n) for n in (*range(300), 400)}
    assert sum(card.steps[0].reasons.values()) == (0 if len(texts) == 401 else 1)


@pytest.mark.parametrize("served", [Handler], indirect=True)
def test_what_is_not_there_is_named(tmp_path, served):
    with pytest.raises(ClientFault) as caught:
        corpus(tmp_path, [f"{served}/nowhere.jsonl"])
    assert caught.value.code in ("unreadable", "empty_source")
    assert "nowhere.jsonl" in str(caught.value)


def test_a_folder_of_any_file_system_of_fsspec(tmp_path, folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/kernelm-corpus", recursive=True)
    try:
        card, texts = corpus(tmp_path, ["memory://kernelm-corpus"])
        assert texts == {text(n) for n in range(401)}
        assert {"a.jsonl", "d.txt"} <= {path.name for path in folder.iterdir()}
        assert card.steps[0].reasons == {}
    finally:
        memory.rm("/kernelm-corpus", recursive=True)
