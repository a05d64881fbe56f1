"""`kernelm data` on corpora in folders: what a user reads, and what the exit status says."""

import json
from pathlib import Path

import pytest

from kernelm_cli import data
from kernelm_cli.app import app
from kernelm_contracts.data import Input, PrepareRequest, Split, Store
from kernelm_data.corpus.pipeline import Sources, prepare


def text(n: int) -> str:
    what = "river" if n % 2 else "mountain"
    return f"Article {n} about the {what} number {n * 7919}, which no other article is about, and {n * 31}."


def corpus(tmp_path: Path, name: str, numbers: range, parent: Path | None = None) -> Path:
    source, work, out = tmp_path / f"{name}-source", tmp_path / f"{name}-work", tmp_path / name
    source.mkdir()
    out.mkdir()
    lines = (json.dumps({"id": f"a{n}", "text": text(n)}) for n in numbers)
    (source / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    inputs = (Input(artifact="sha256:x", id="id"),)
    request = PrepareRequest("sha256:x", "auto", split=Split(0, 0), store=Store(append_to="sha256:p" if parent else ""))
    prepare(Sources(inputs, (source,), parent=parent), request, work, out, lambda *_: None)
    return out


def kernelm(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        app(["data", *map(str, arguments)])
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.fixture
def versions(tmp_path):
    first = corpus(tmp_path, "first", range(40))
    return first, corpus(tmp_path, "second", range(40, 45), first)


def test_diff_of_two_versions_reads_only_what_they_do_not_share(versions, capsys, monkeypatch):
    first, second = versions
    assert len(data._hashes(second, data._same(versions))) == 5
    status, out = kernelm(capsys, "diff", first, second)
    assert (status, out.splitlines()[0]) == (1, "40 and 45 documents, 40 in both")
    assert "only in the second: 5: a40, a41, a42, a43, a44" in out
    whole = kernelm(capsys, "diff", first, second, "--json")
    monkeypatch.setattr(data, "_same", lambda _: {})
    assert kernelm(capsys, "diff", first, second, "--json") == whole


def test_diff_of_the_same_says_so(versions, capsys):
    assert kernelm(capsys, "diff", versions[0], versions[0]) == (0, "40 and 40 documents, 40 in both, no difference\n")


def test_search_shows_whole_words_before_what_it_found(versions, capsys):
    status, out = kernelm(capsys, "search", versions[0], "WHICH NO", "--most", 2)
    assert status == 0
    assert out.endswith("40 of 40 documents\n")
    assert len(out.splitlines()) == 5
    assert kernelm(capsys, "search", versions[0], "nowhere")[0] == 1


def test_preview_and_describe(versions, capsys):
    status, out = kernelm(capsys, "preview", versions[1], "--rows", 3)
    assert (status, len(out.splitlines())) == (0, 7)
    status, out = kernelm(capsys, "describe", versions[1])
    assert status == 0
    assert "version 2" in out
    assert "nobody looked" in out
