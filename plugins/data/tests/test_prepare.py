"""The whole pipeline over real articles."""

import json
from collections import Counter
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer

from kernelm_contracts.data import Clean, DatasetCard, Deduplicate, PrepareRequest, Split, Tokenize
from kernelm_data.account import Meter, Tally
from kernelm_data.duplicates import find_near
from kernelm_data.prepare import check_request, prepare
from kernelm_sdk.errors import ClientFault, PluginFault


def test_counts_of_bbc_news(whole):
    card, _, _ = whole
    assert card.labels == ("business", "entertainment", "politics", "sports", "tech")
    steps = {step.name: step for step in card.steps}
    assert steps["read"].documents_in == 2225
    assert steps["read"].changed == {"decoded from cp1252": 1}  # sports/199.txt, with a pound sign
    assert steps["deduplicate exact"].documents_out == 2127
    assert sum(steps["deduplicate exact"].reasons.values()) == 98
    assert sum(steps["deduplicate near"].reasons.values()) == 59
    assert sum(split.documents for split in card.splits.values()) == 2068
    for before, after in zip(card.steps, card.steps[1:], strict=False):
        assert before.documents_out == after.documents_in


def test_parquet_agrees_with_the_card(whole, tokenizer):
    card, out, _ = whole
    assert json.loads((out / "labels.json").read_text()) == list(card.labels)
    reference = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    reference.no_padding()
    reference.no_truncation()
    cut = 0
    for name, split in card.splits.items():
        table = pq.read_table(out / f"{name}.parquet")
        assert [str(f.type) for f in table.schema] == ["string", "string", "int32", "list<element: int32>"]
        rows = table.to_pylist()
        assert len(rows) == split.documents
        assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
        assert Counter(card.labels[row["label"]] for row in rows) == split.per_label
        assert all(row["id"].startswith(card.labels[row["label"]] + "/") for row in rows)
        assert sum(len(row["input_ids"]) for row in rows) == split.tokens
        full = [encoding.ids for encoding in reference.encode_batch([row["text"] for row in rows])]
        for row, ids in zip(rows, full, strict=True):
            # cut at 256 with the closing special token kept
            assert row["input_ids"] == (ids if len(ids) <= 256 else [*ids[:255], ids[-1]])
        cut += sum(len(ids) > 256 for ids in full)
        assert pq.read_metadata(out / f"{name}.parquet").row_group(0).column(1).compression == "ZSTD"
    assert card.steps[-1].changed == {"cut at 256 tokens": cut}


def test_stored_tokenizer_gives_the_stored_ids(whole):
    _, out, _ = whole
    stored = Tokenizer.from_file(str(out / "tokenizer.json"))
    rows = pq.read_table(out / "test.parquet").to_pylist()[:50]
    assert [encoding.ids for encoding in stored.encode_batch([row["text"] for row in rows])] == [row["input_ids"] for row in rows]


def test_no_leakage_by_exact_similarity(whole, exact_pairs):
    _, out, _ = whole
    rows = [row for name in ("train", "validation", "test") for row in pq.read_table(out / f"{name}.parquet").to_pylist()]
    pairs = exact_pairs([row["text"] for row in rows], 0.3)
    assert pairs  # there are similar documents
    assert max(pairs.values()) < 0.8  # but none that is near, in one split or across two


def test_stratified_within_one_document(whole):
    card, _, _ = whole
    for label in card.labels:
        total = sum(split.per_label[label] for split in card.splits.values())
        assert abs(card.splits["test"].per_label[label] - 0.2 * total) <= 1
        assert abs(card.splits["validation"].per_label[label] - 0.1 * total) <= 1


def test_every_missing_document_is_accounted_for(whole, news):
    _, out, _ = whole
    kept = {id for name in ("train", "validation", "test") for id in pq.read_table(out / f"{name}.parquet")["id"].to_pylist()}
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert kept | {line["id"] for line in lines} == {path.relative_to(news).as_posix() for path in news.glob("*/*.txt")}
    assert kept.isdisjoint(line["id"] for line in lines)
    originals = {line["id"]: line["kept"] for line in lines}
    for line in lines:
        original = line["kept"]
        while original in originals:  # an exact copy of what turned out to be a near duplicate
            original = originals[original]
        assert original in kept


def test_card_and_pictures(whole):
    card, out, _ = whole
    assert msgspec.json.decode((out / "dataset.json").read_bytes(), type=DatasetCard) == card
    text = (out / "card.md").read_text()
    for wanted in ("| deduplicate exact | 2,225 | 2,127 |", "98 duplicate", "| tech |", '"jaccard": 0.8'):
        assert wanted in text
    for name in ("account", "classes", "lengths"):
        assert f"({name}.png)" in text
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn
            assert "Software" not in picture.info


def test_progress_rises_to_one_with_a_rate(whole):
    _, _, reports = whole
    fractions = [fraction for fraction, *_ in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    for phase in ("read", "clean", "deduplicate", "check", "tokenize"):
        assert max(rate for _, name, _, rate in reports if name == phase) > 0


def test_same_source_same_bytes_whatever_the_order_on_disk(source, run, tokenizer, tmp_path):
    copy = tmp_path / "copy"
    for path in reversed(sorted(source.rglob("*.txt"))):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    _, one = run(source, tokenizer, tokenize=Tokenize("sha256:t"))
    _, other = run(copy, tokenizer, tokenize=Tokenize("sha256:t"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_seed_moves_documents(source, run):
    def ids_of_test(seed):
        return pq.read_table(run(source, split=Split(seed=seed))[1] / "test.parquet")["id"].to_pylist()

    assert ids_of_test(0) != ids_of_test(1)


def test_without_tokenizer_no_ids(source, run):
    card, out = run(source)
    assert pq.read_table(out / "train.parquet").column_names == ["id", "text", "label"]
    assert not (out / "tokenizer.json").exists()
    assert card.steps[-1].name == "split"


def test_without_test_split_no_file(source, run):
    card, out = run(source, split=Split(validation=0.2, test=0.0))
    assert list(card.splits) == ["train", "validation"]
    assert not (out / "test.parquet").exists()


def test_duplicates_that_stay_stay_together(source, run):
    for i in range(4):
        (source / "tech" / f"copy{i}.txt").write_bytes((source / "tech" / "001.txt").read_bytes() + b" Again." * i)
    _, out = run(source, deduplicate=Deduplicate(exact=False, near=False))
    copies = {"tech/001.txt", *(f"tech/copy{i}.txt" for i in range(4))}
    shares = [copies & set(pq.read_table(out / f"{name}.parquet")["id"].to_pylist()) for name in ("train", "validation", "test")]
    assert sorted(map(len, shares)) == [0, 0, 5]


def test_a_near_duplicate_that_minhash_misses_stops_the_job(source, run, monkeypatch):
    def blind(documents, settings, meter):
        return [], find_near(documents, settings, meter)[1]

    monkeypatch.setattr("kernelm_data.prepare.find_near", blind)
    for i in range(8):
        text = (source / "tech" / "001.txt").read_text() + " Again." * (i + 1)
        (source / "tech" / f"copy{i}.txt").write_text(text)
    with pytest.raises(PluginFault) as caught:
        run(source)
    assert caught.value.code == "leakage"


def test_cancelling_stops_in_the_middle(source, tmp_path):
    class Cancelled(Exception):
        pass

    def report(fraction, phase, message, rate):
        if phase == "deduplicate":
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare(source, None, tmp_path, PrepareRequest("sha256:x"), report)
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize(("fields", "word"), [
    ({"max_broken": 1.5}, "max_broken"), ({"max_broken": float("nan")}, "max_broken"), ({"name": " "}, "name"),
    ({"clean": Clean(normalize="NFX")}, "clean.normalize"), ({"clean": Clean(min_characters=-1)}, "clean.min_characters"),
    ({"deduplicate": Deduplicate(jaccard=0.0)}, "deduplicate.jaccard"),
    ({"deduplicate": Deduplicate(permutations=0)}, "deduplicate.permutations"),
    ({"deduplicate": Deduplicate(jaccard=0.3, permutations=2)}, "deduplicate.permutations"),
    ({"tokenize": Tokenize(max_tokens=0)}, "tokenize.max_tokens"),
    ({"split": Split(validation=-0.1)}, "split.validation"), ({"split": Split(test=float("nan"))}, "split.test"),
    ({"split": Split(validation=0.5, test=0.5)}, "split"), ({"split": Split(test=1.0)}, "split.test"),
    ({"format": "foldres"}, "format"), ({"format": "parquet"}, "format"),
])  # fmt: skip
def test_nonsense_in_the_request_is_named(fields, word):
    with pytest.raises(ClientFault, match=rf"^{word}") as caught:
        check_request(PrepareRequest("sha256:x", **fields))
    assert caught.value.remedy


def test_unknown_format_suggests(run, source):
    with pytest.raises(ClientFault) as caught:
        run(source, format="folder")
    assert caught.value.code == "unknown_format"
    assert "did you mean 'folders'?" in caught.value.remedy


def test_a_step_that_loses_a_document_is_a_fault():
    tally = Tally("clean")
    tally.drop("a", "too short")
    assert tally.step(3, 2).reasons == {"too short": 1}
    with pytest.raises(PluginFault, match="do not add up"):
        tally.step(4, 2)


def test_meter_of_nothing():
    seen = []
    assert list(Meter(lambda *report: seen.append(report), "read", (0.0, 0.5), 0).track([])) == []
    assert seen[-1][0] == 0.5


def test_source_is_left_as_it_was(source, run):
    before = {path: path.read_bytes() for path in Path(source).rglob("*.txt")}
    run(source)
    assert {path: path.read_bytes() for path in Path(source).rglob("*.txt")} == before
