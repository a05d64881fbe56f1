"""A small dataset of real articles, a tiny BERT with random weights, and a recording observer."""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertModel

HERE = Path(__file__).parent


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


newsdata = _beside("newsdata")
_beside("textdata")


class Recorder:
    """Keeps what it is told; `stop_after` checkpoints it ends the training as a crash would."""

    class Stopped(Exception):
        pass

    def __init__(self, keep: Path, stop_after: int = 0) -> None:
        self.keep, self.stop_after = keep, stop_after
        self.reports: list[tuple[float, str, str, dict[str, float]]] = []
        self.checkpoints: list[Path] = []
        self.lasting: list[int] = []  # which of them
        self.anew: list[str] = []

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        self.reports.append((fraction, phase, message, metrics))

    def save(self, folder: Path, lasting: bool = False) -> None:
        kept = self.keep / str(len(self.checkpoints))
        shutil.copytree(folder, kept)
        self.lasting += [len(self.checkpoints)] if lasting else []
        self.checkpoints.append(kept)
        if len(self.checkpoints) == self.stop_after:
            raise self.Stopped

    def begins_anew(self, why: str) -> None:
        self.anew.append(why)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer with 800 pieces, learned from a few articles: it keeps the tiny BERT tiny."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = BertWordPieceTokenizer()
    made.train_from_iterator((text for _, text, _ in newsdata.articles(20)), vocab_size=800, show_progress=False)
    made.post_processor = BertProcessing(*((piece, made.token_to_id(piece)) for piece in ("[SEP]", "[CLS]")))
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def news(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """30 articles of each of the 5 classes of BBC News, 48 tokens each."""
    return newsdata.write_dataset(tmp_path_factory.mktemp("news"), newsdata.articles(30), tokenizer, max_tokens=48)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Two layers of 32 units: a base folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    config = BertConfig(vocab_size=800, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=64)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    shutil.copy(tokenizer, folder)
    shutil.copy(newsdata.minilm() / "tokenizer_config.json", folder)
    return folder


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "kept")


@pytest.fixture
def recorder_class() -> type[Recorder]:
    return Recorder


@pytest.fixture
def copy(tmp_path: Path):
    """A writable copy of a folder."""
    def make(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return make
