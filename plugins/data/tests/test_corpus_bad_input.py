"""Broken input of every kind: accounted for, never fatal, never silently dropped."""

import gzip
import io
import json
import multiprocessing
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernelm_contracts.data import DatasetCard, Input, Limits, PrepareRequest, Split, Store
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.store import Rows
from kernelm_sdk.errors import ClientFault

NOTHING = Split(validation=0.0, test=0.0)


def text(n: int) -> str:
    of = f"of a {chr(97 + n % 26) * 5} and of {n * 7919} other things"
    return f"Document number {n} tells {of}, none of which is in another document."


@pytest.fixture
def corpus(tmp_path):
    """Prepare a folder as a corpus; the card, the rows by id, and the lines of what was dropped."""
    count = 0

    def call(folder: Path, format: str = "auto", workers: int = 0, **fields):
        nonlocal count
        count += 1
        work, out = tmp_path / f"work{count}", tmp_path / f"out{count}"
        work.mkdir()
        out.mkdir()
        given = fields.pop("inputs", (Input(artifact="sha256:x", format=format),))
        fields = {"split": NOTHING, "max_broken": 1.0} | fields
        request = PrepareRequest("sha256:x", format=format, **fields)
        card = prepare(Sources(given, tuple(folder for _ in given)), request, work, out, lambda *_: None, workers=workers)
        rows = Rows(out)
        lines = {line["id"]: line for line in map(json.loads, (out / "dropped.jsonl").read_text().splitlines())}
        return card, {row["id"]: row for row in (rows[i] for i in range(len(rows)))}, lines

    return call


def read(card: DatasetCard) -> dict[str, int]:
    return card.steps[0].reasons


def test_truncated_gzip_keeps_what_comes_before(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    lines = b"".join(json.dumps({"text": text(n)}).encode() + b"\n" for n in range(3000))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    card, rows, lost = corpus(folder)
    assert read(card) == {"truncated gz": 1}
    assert 1000 < len(rows) < 3000
    assert rows["a.jsonl.gz#0"]["text"] == text(0)
    assert card.steps[0].documents_in == card.steps[0].documents_out + 1
    assert next(iter(lost.values()))["reason"] == "truncated gz"


def test_bytes_that_are_no_gzip(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(b"plainly not")
    (folder / "b.txt").write_text(text(1))
    card, rows, _ = corpus(folder)
    assert read(card) == {"broken gz": 1}
    assert list(rows) == ["b.txt"]


def test_a_line_longer_than_a_document_may_be(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    with (folder / "a.jsonl").open("wb") as file:
        file.write(json.dumps({"text": text(1)}).encode() + b'\n{"text": "')
        for _ in range(30):
            file.write(b"x" * 100_000)
        file.write(b'"}\n' + json.dumps({"text": text(2)}).encode() + b"\n")
    (folder / "b.txt").write_bytes(b"y" * 3_000_000)
    card, rows, _ = corpus(folder, limits=Limits(document_mb=1.0))
    assert read(card) == {"larger than limits.document_mb": 2}
    assert sorted(row["text"] for row in rows.values()) == [text(1), text(2)]


def test_invalid_utf8(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_bytes("Die Börse schloß höher, für Anleger ein schöner Tag.".encode() + b"\xff\xfe oder")
    (folder / "b.txt").write_bytes("Die Börse schloß gestern höher als am Tag davor.".encode("cp1252"))
    (folder / "c.jsonl").write_bytes(b'{"text": "caf\xe9 au lait, and a croissant"}\n' + json.dumps({"text": text(1)}).encode())
    card, rows, _ = corpus(folder)
    assert read(card) == {"broken utf-8": 2}
    assert rows["b.txt"]["text"].startswith("Die Börse schloß")
    assert card.steps[0].changed == {"decoded from cp1252": 1}


def test_csv_with_broken_quoting(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    good = [f'{n},"{text(n)}\nand ""quoted"" on a second line"' for n in range(6)]
    rows = ["id,text", *good[:2], '90,"never closed', *good[2:4], "91,a,b", '92,"ab"c d', *good[4:], ""]
    (folder / "a.csv").write_text("\n".join(rows))
    card, found, lost = corpus(folder, inputs=(Input(artifact="sha256:x", id="id"),))
    assert read(card) == {"unclosed quote": 1, "wrong number of columns": 1, "broken quoting": 1}
    assert sorted(found) == ["0", "1", "2", "3", "4", "5"]
    assert found["5"]["text"] == text(5) + '\nand "quoted" on a second line'
    assert lost["a.csv#6"]["reason"] == "unclosed quote"  # the line of the file


def test_zip_bomb(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.txt", b" " * 200_000_000)
        archive.writestr("good.txt", text(1))
        archive.writestr("inner.zip", b"PK")
        archive.writestr("../../escape.txt", text(2))
    card, rows, _ = corpus(folder, limits=Limits(document_mb=500.0))
    assert read(card) == {
        "unpacks to more than limits.expansion": 1,
        "an archive within an archive": 1,
        "a path out of the archive": 1,
    }
    assert list(rows) == ["bomb.zip/good.txt"]
    (folder / "bomb.zip").unlink()
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(b" " * 200_000_000))
    (folder / "good.txt").write_text(text(1))
    assert read(corpus(folder, limits=Limits(document_mb=500.0))[0]) == {"unpacks to more than limits.expansion": 1}


def test_html_of_200000_nested_tags(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "deep.html").write_text("<div>" * 200_000 + text(1) + "<script>var hidden = 1;</script>" + "</div>" * 200_000)
    card, rows, _ = corpus(folder)
    assert rows["deep.html"]["text"] == text(1)
    assert card.steps[0].changed == {"nested too deep: only the tags taken out": 1}


def test_symbolic_link_out_of_the_folder_is_not_followed(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("the secret of somebody else, in a text that is long enough")
    (tmp_path / "elsewhere").mkdir()
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "good.txt").write_text(text(1))
    card, rows, lost = corpus(folder, max_broken=0.0)
    assert read(card) == {"symbolic link out of the folder": 2}
    assert set(lost) == {"link.txt", "more"}
    assert list(rows) == ["good.txt"]


def test_parquet_with_another_schema(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    pq.write_table(pa.table({"text": [text(n) for n in range(5)], "n": range(5)}), folder / "a.parquet")
    pq.write_table(pa.table({"body": [text(n) for n in range(7)]}), folder / "b.parquet")
    pq.write_table(pa.table({"text": [1, 2, 3]}), folder / "c.parquet")
    pq.write_table(pa.table({"text": [text(9), None]}), folder / "d.parquet")
    (folder / "e.parquet").write_bytes(b"PAR1 and nothing else")
    card, rows, _ = corpus(folder)
    assert read(card) == {"no column 'text'": 7, "column 'text' is no string": 4, "broken parquet": 1}  # a null is none either
    assert len(rows) == 6
    assert card.steps[0].documents_in == 18


def test_tar_with_links_and_a_cut_end(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.txt")
            info.size = len(text(n))
            archive.addfile(info, io.BytesIO(text(n).encode()))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (folder / "a.tar").write_bytes(buffer.getvalue())
    (folder / "b.tgz").write_bytes(gzip.compress(buffer.getvalue())[:-30])
    card, rows, _ = corpus(folder)
    assert {id for id in rows if id.startswith("a.tar")} == {"a.tar/0.txt", "a.tar/1.txt", "a.tar/2.txt"}
    assert read(card)["a link or device"] >= 1
    assert sum(read(card).values()) >= 2


def test_too_many_broken_documents_are_fatal_and_named(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{nonsense\n" * 3 + "".join(json.dumps({"text": text(n)}) + "\n" for n in range(7)))
    with pytest.raises(ClientFault, match="3 of 10 documents") as caught:
        corpus(folder, max_broken=0.2)
    assert caught.value.code == "too_many_broken"
    assert "a.jsonl#0" in str(caught.value)


def test_nothing_to_read(corpus, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(ClientFault) as caught:
        corpus(tmp_path / "source")
    assert caught.value.code == "empty_source"


def _killing(folder: Path, tmp: Path, answer) -> None:
    request = PrepareRequest("sha256:x", "auto", split=NOTHING, max_broken=1.0, store=Store(shard_mb=0.0002))
    (tmp / "out").mkdir()
    sources = Sources((Input(artifact="sha256:x"),), (folder,))
    card = prepare(sources, request, tmp / "work", tmp / "out", lambda *_: None, workers=2)
    answer.put((read(card), sorted(row["id"] for row in map(Rows(tmp / "out").__getitem__, range(5)))))


def test_a_document_whose_parser_kills_the_process(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.html").write_text(f"<html><body><p>{text(n)}</p></body></html>")
    (folder / "3.html").write_text("<html><body><p>the page of death, " + text(3) + "</p></body></html>")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of workers, and so of the server that they are forked from
    (tmp_path / "sitecustomize.py").write_text(
        "import os, resiliparse.parse.html as html\n"
        "class Tree:\n"
        "    @staticmethod\n"
        "    def parse(text):\n"
        "        if 'page of death' in text: os.abort()\n"
        "        return real.parse(text)\n"
        "real, html.HTMLTree = html.HTMLTree, Tree\n"
    )
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    process = spawn.Process(target=_killing, args=(folder, tmp_path, answer))
    process.start()
    reasons, ids = answer.get(timeout=240)
    process.join()
    assert reasons == {"kills its parser": 1}
    assert ids == ["0.html", "1.html", "2.html", "4.html", "5.html"]
    lost = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["step"]) for line in lost] == [("3.html", "read")]


@pytest.mark.slow
def test_a_line_of_a_gigabyte(corpus, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    with (folder / "a.jsonl").open("wb") as file:
        for _ in range(1000):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + json.dumps({"text": text(2)}).encode() + b"\n")
    card, rows, _ = corpus(folder, store=Store(shard_mb=2000))
    assert read(card) == {"larger than limits.document_mb": 1}
    assert len(rows) == 1


@pytest.mark.parametrize("packing", ["gz", "zst", "bz2", "xz"])
def test_every_packing_is_read_and_its_cut_end_noticed(corpus, tmp_path, packing):
    import bz2
    import lzma

    import zstandard

    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}[packing]
    folder = tmp_path / "source"
    folder.mkdir()
    lines = b"".join(json.dumps({"text": text(n)}).encode() + b"\n" for n in range(2000))
    (folder / f"a.jsonl.{packing}").write_bytes(pack(lines[: len(lines) // 2]) + pack(lines[len(lines) // 2 :]))
    assert len(corpus(folder)[1]) == 2000
    (folder / f"a.jsonl.{packing}").write_bytes(pack(lines)[:-20])
    card, _, _ = corpus(folder)
    assert read(card) == {f"truncated {packing}": 1}
