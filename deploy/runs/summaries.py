"""Texts for summaries.toml: what functions and classes of installed packages do, as their authors have summed it up in a line.

    python deploy/runs/summaries.py [FOLDER] [--packages numpy scipy ...]

The first line of a docstring is its summary (PEP 257); the source is the signature and the prose below that line. Reads the
standard library and packages that kernelm's trainer is installed with; nothing is imported. Writes
FOLDER/texts/<train, validation, test>.jsonl, `build/summaries` by default: a line a pair, {"source": "...", "target": "..."}, and
FOLDER/base, a model that has learned nothing yet. A file with all its docstrings is in one split, and no text is in two.
"""

import argparse
import ast
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import untrained

LIBRARY = "python"  # the standard library's name here
PACKAGES = (LIBRARY, "numpy", "scipy", "sklearn", "torch", "transformers", "networkx", "sympy")
SUMMARY = range(3, 17)  # words
FEWEST, MOST = 15, 60  # words of the prose; what is behind is cut off
VOCABULARY = 6000  # tokens
TESTS = {"test", "tests", "testing", "idlelib", "site-packages", "dist-packages"}
SECTIONS = "Parameters|Args|Arguments|Returns?|Examples?|See Also|Notes?|References|Raises|Attributes"
END_OF_PROSE = re.compile(rf"({SECTIONS})\b|[:>.\-=+|*`@]")
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def folder_of(package: str) -> Path:
    """Where its sources are."""
    if package == LIBRARY:
        return Path(json.__file__).parents[1]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed: pip install {package}, or name others with --packages")
    return Path(next(iter(spec.submodule_search_locations)))


def files(packages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(its name in its package, path) of each source."""
    for package in packages:
        root = folder_of(package)
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if not TESTS & set(inside.parts):
                yield f"{package}/{inside}", path


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """(signature and prose, summary) of what has both in its docstring."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template, or of a newer Python
        return
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            summary, _, rest = text.partition("\n\n")
            words = prose(rest).split()
            if len(summary.split()) in SUMMARY and len(words) >= FEWEST:
                yield f"{signature(node)}: {' '.join(words[:MOST])}", " ".join(summary.split())


def prose(text: str) -> str:
    """The paragraphs before the first section, list or example."""
    held = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if not paragraph.strip() or END_OF_PROSE.match(paragraph.strip()):
            break
        held.append(paragraph)
    return " ".join(held)


def signature(node: Documented) -> str:
    """The name, and of a function the arguments'."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{node.name}({', '.join(name for name in names if name not in ('self', 'cls'))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[2] / "build" / "summaries")
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help=f"default {' '.join(PACKAGES)}")
    given = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)  # of others' sources
    seen: set[str] = set()
    pairs: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for name, path in files(given.packages):
        for source, target in documented(path):
            if not {source, target} & seen:
                pairs[untrained.split_of(name)].append((source, target))
            seen |= {source, target}
    untrained.write(given.folder, pairs, VOCABULARY)


if __name__ == "__main__":
    main()
