"""Bad sources: what, where, remedy; and nothing is dropped in silence."""

import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kernelm_contracts.data import Deduplicate, Split, Tokenize
from kernelm_sdk.errors import ClientFault

PICTURE = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + random.Random(0).randbytes(500)


def refused(code: str, *words: str):
    class Check:
        def __enter__(self):
            self.context = pytest.raises(ClientFault)
            self.caught = self.context.__enter__()
            return self.caught

        def __exit__(self, *error):
            swallowed = self.context.__exit__(*error)
            fault = self.caught.value
            assert fault.code == code
            assert fault.remedy
            for word in words:
                assert word in fault.message
            return swallowed

    return Check()


def read_step(card):
    return card.steps[0]


def test_empty_folder(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with refused("empty_source", "empty"):
        run(tmp_path / "empty")


def test_files_without_class_folders(tmp_path, run):
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "a.txt").write_text("some text that is long enough")
    with refused("no_classes", "flat", "1 files"):
        run(folder)


def test_class_folder_without_documents(source, run):
    (source / "weather").mkdir()
    with refused("empty_class", "weather/"):
        run(source)


def test_class_with_one_document(source, run):
    (source / "weather").mkdir()
    (source / "weather" / "1.txt").write_text("It will rain in the west and be dry in the east.")
    with refused("class_too_small", "'weather' has 1", "in the source"):
        run(source)


def test_class_that_is_too_small_without_its_duplicates(source, run):
    (source / "weather").mkdir()
    for i in range(5):
        (source / "weather" / f"{i}.txt").write_text("It will rain in the west and be dry in the east." + " " * i)
    with refused("class_too_small", "'weather' has 1", "after deduplication"):
        run(source)


def test_class_that_is_one_group_of_duplicates_cannot_be_split(source, run):
    (source / "weather").mkdir()
    for i in range(6):
        (source / "weather" / f"{i}.txt").write_text("It will rain in the west and be dry in the east.")
    with refused("class_too_small", "'weather' in"):
        run(source, deduplicate=Deduplicate(exact=False, near=False))


def test_binary_and_broken_files_are_quarantined_and_counted(source, run):
    (source / "tech" / "picture.txt").write_bytes(PICTURE)
    text = "Die Börse schloß höher, für Anleger ein schöner Tag."
    (source / "tech" / "broken.txt").write_bytes(text.encode() + b"\xff\xfe\xfd oder")
    (source / "tech" / "noise.txt").write_bytes(bytes(random.Random(1).randrange(128, 256) for _ in range(400)))
    (source / "sports" / "notes.pdf").write_bytes(b"%PDF-1.7")
    (source / "README.md").write_text("about")
    card, out = run(source, max_broken=0.1)
    step = read_step(card)
    assert step.documents_in == 35
    assert step.documents_out == 30
    assert step.reasons == {"binary": 1, "broken utf-8": 1, "unknown encoding": 1, "not a .txt file": 1,
                            "outside a class folder": 1}  # fmt: skip
    lines = {line["id"]: line for line in map(json.loads, (out / "dropped.jsonl").read_text().splitlines())}
    assert lines["tech/picture.txt"]["reason"] == "binary"
    assert "byte" in lines["tech/broken.txt"]["detail"]
    assert lines["sports/notes.pdf"]["step"] == "read"
    kept = {id for name in card.splits for id in pq.read_table(out / f"{name}.parquet")["id"].to_pylist()}
    assert kept.isdisjoint(lines)


def test_too_many_broken_files_are_fatal_and_named(source, run):
    for i in range(3):
        (source / "tech" / f"picture{i}.txt").write_bytes(PICTURE)
    with refused("too_many_broken", "3 of 33", "tech/picture0.txt (binary", "max_broken = 0.05"):
        run(source)
    assert read_step(run(source, max_broken=0.1)[0]).reasons == {"binary": 3}


def test_one_broken_file_is_fatal_at_max_broken_0(source, run):
    (source / "tech" / "picture.txt").write_bytes(PICTURE)
    with refused("too_many_broken", "1 of 31"):
        run(source, max_broken=0.0)


def test_files_that_are_no_documents_do_not_count_as_broken(source, run):
    for i in range(5):
        (source / "tech" / f"{i}.json").write_text("{}")
    (source / "tech" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (source / "tech" / "more").mkdir()
    (source / ".git").mkdir()
    step = read_step(run(source, max_broken=0.0)[0])
    assert step.reasons == {"not a .txt file": 6, "a folder within a class folder": 1, "outside a class folder": 1}


def test_fifo_is_not_read(source, run):
    os.mkfifo(source / "tech" / "pipe.txt")
    assert read_step(run(source)[0]).reasons == {"not a regular file": 1}


def test_file_name_that_is_not_utf8(source, run):
    path = Path(os.fsdecode(os.fsencode(source / "tech") + b"/caf\xe9.txt"))
    path.write_text("A café in Paris has opened a second branch in Lyon.")
    card, out = run(source)
    ids = {id for name in card.splits for id in pq.read_table(out / f"{name}.parquet")["id"].to_pylist()}
    assert r"tech/caf\xe9.txt" in ids


def test_link_out_of_the_folder(source, run, tmp_path):
    (tmp_path / "secret.txt").write_text("not part of the source, but it looks like a document")
    (source / "tech" / "link.txt").symlink_to(tmp_path / "secret.txt")
    with refused("link_outside", "tech/link.txt", "secret.txt"):
        run(source)


def test_class_folder_that_is_a_link_out_of_the_folder(source, run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (source / "weather").symlink_to("../elsewhere")
    with refused("link_outside", "weather"):
        run(source)


def test_link_within_the_folder_is_a_duplicate(source, run):
    (source / "tech" / "link.txt").symlink_to("001.txt")
    assert run(source)[0].steps[2].examples == ("tech/link.txt",)


def test_expected_label_that_does_not_exist(source, run):
    with refused("unknown_label", "'sport' does not exist", "did you mean 'sports'?", "'sports' is in the source"):
        run(source, expect_labels=("business", "sport", "tech"))


def test_expected_labels_that_exist(source, run):
    assert run(source, expect_labels=("tech", "sports", "business"))[0].labels == ("business", "sports", "tech")


def test_tokenizer_artifact_without_tokenizer(source, run, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with refused("no_tokenizer", "tokenizer.json", "config.json"):
        run(source, folder, tokenize=Tokenize("sha256:x"))


def test_tokenizer_that_is_none(source, run, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with refused("invalid_tokenizer", "tokenizer.json"):
        run(source, tmp_path, tokenize=Tokenize("sha256:x"))


def test_no_room_for_tokens(source, run, tokenizer):
    with refused("invalid", "tokenize.max_tokens: 2"):
        run(source, tokenizer, tokenize=Tokenize("sha256:x", max_tokens=2))


def test_split_shares_that_leave_nothing(source, run):
    with refused("invalid_split", "validation 0.6 and test 0.6"):
        run(source, split=Split(validation=0.6, test=0.6))


def test_same_text_under_two_labels_is_told_apart(source, run):
    (source / "tech" / "stray.txt").write_bytes((source / "business" / "001.txt").read_bytes())
    step = run(source)[0].steps[2]
    assert step.reasons == {"duplicate under another label": 1}
    assert step.examples == ("tech/stray.txt",)
