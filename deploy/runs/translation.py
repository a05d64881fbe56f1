"""Texts for translation.toml: what Home Assistant (Apache-2.0) says on its screens, in English and in another language.

    python -m pip download --no-deps --only-binary :all: --python-version 3.13 --dest build/translation homeassistant==2025.4.4
    python deploy/runs/translation.py [FOLDER] [--to de]

Reads FOLDER/homeassistant-*.whl, `build/translation` by default, which is not installed: its files are JSON. Writes
FOLDER/texts/<train, validation, test>.jsonl, a line a pair, {"source": "...", "target": "..."}, and FOLDER/base, a model that has
learned nothing yet. An integration with all its texts is in one split, and no English text is in two.
"""

import argparse
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import untrained

LONGEST = 160  # characters of a text
VOCABULARY = 4000  # tokens, of both languages together
FILE = re.compile(r"homeassistant/components/(\w+)/translations/([\w-]+)\.json")
SKIPPED = re.compile(r"https?://|\[%|\n|[<>]")  # links, references to other texts, markup, several lines

Texts = dict[str, dict[str, str]]  # integration -> place -> text


def flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(place, text) of each text in a file."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}/{name}")
        elif isinstance(value, str):
            yield f"{above}/{name}", " ".join(value.split()) if "\n" not in value.strip() else value


def read(wheel: Path, language: str) -> tuple[Texts, Texts]:
    """The English texts, and those of `language`."""
    found: dict[str, Texts] = {"en": {}, language: {}}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if (match := FILE.fullmatch(name)) and match[2] in found:
                found[match[2]][match[1]] = dict(flat(json.loads(archive.read(name))))
    if not found[language]:
        raise SystemExit(f"{wheel} has no texts in {language!r}: --to takes a code such as de, es, nl or zh-Hans")
    return found["en"], found[language]


def pairs(english: Texts, other: Texts) -> dict[str, list[tuple[str, str]]]:
    """split -> pairs; of several translations of a text in a split the most frequent one."""
    counted: dict[str, dict[str, Counter[str]]] = {"train": {}, "validation": {}, "test": {}}
    for integration in sorted(other):
        counts = counted[untrained.split_of(integration)]
        for place, target in other[integration].items():
            source = english.get(integration, {}).get(place, "")
            if all(0 < len(text) <= LONGEST and not SKIPPED.search(text) for text in (source, target)) and source != target:
                counts.setdefault(source, Counter())[target] += 1
    seen: set[str] = set()
    found: dict[str, list[tuple[str, str]]] = {}
    for split, counts in counted.items():
        found[split] = [(source, targets.most_common(1)[0][0]) for source, targets in counts.items() if source not in seen]
        seen |= counts.keys()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[2] / "build" / "translation")
    parser.add_argument("--to", default="de", help="the language; default de")
    given = parser.parse_args()
    wheels = sorted(given.folder.glob("homeassistant-*.whl"))
    if not wheels:
        raise SystemExit(f"{given.folder} has no homeassistant-*.whl, which this gets:\n{(__doc__ or '').splitlines()[2]}")
    untrained.write(given.folder, pairs(*read(wheels[-1], given.to)), VOCABULARY)


if __name__ == "__main__":
    main()
