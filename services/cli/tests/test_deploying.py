"""What `kernelm model import` and `deploy` take, and what they ask for."""

import io
from pathlib import Path

import pytest

from kernelm_cli.app import execute
from kernelm_cli.chat import Talk
from kernelm_cli.deploying import Replicas, _check_importable, _known, _require_plugin, job_of, plugin_of
from kernelm_cli.session import Common
from kernelm_cli.shadowing import percent
from kernelm_contracts.deployments import DeployRequest, KnownAnswer
from kernelm_contracts.server import GenerateRequest
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import LoadedPlugin, Manifest, SystemState

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(("text", "share"), [("10", 10), ("10%", 10), (" 99 % ", 99), ("1", 1)])
def test_a_share_is_a_whole_percentage(text: str, share: int) -> None:
    assert percent("--canary", text, 99) == share


@pytest.mark.parametrize("text", ["0", "100", "-5", "1.5%", "ten", "%", "150%"])
def test_a_wrong_share_is_named(text: str) -> None:
    with pytest.raises(ClientFault, match="--canary"):
        percent("--canary", text, 99)


def test_memory_is_asked_for_by_the_size_of_the_model() -> None:
    asked = DeployRequest("chat", DIGEST, "generator", canary=10, watch_s=60.0)
    spec = job_of(asked, Replicas(replicas=0, maximum=2, idle=30.0), 200.0)
    assert (spec.resources.cpu, spec.resources.memory_mb) == (0.5, 1024 + 250)
    wanted = {"name": "chat", "model": DIGEST, "plugin": "generator", "instances": 1, "minimum": 0, "maximum": 2, "idle_s": 30.0,
              "canary": 10, "watch_s": 60.0}  # fmt: skip
    assert spec.request.items() >= wanted.items()
    spec = job_of(asked, Replicas(replicas=3, memory=700), 200.0)
    assert spec.resources.memory_mb == 700
    assert (spec.request["instances"], spec.request["minimum"], spec.request["maximum"]) == (3, 1, 0)


@pytest.mark.parametrize(("card", "config", "plugin"), [
    ({"structure": "encoder"}, {"architectures": ["BertModel"]}, "encoder"),
    ({"structure": "token-classification"}, {}, "encoder"),
    ({"structure": "causal-lm"}, {"architectures": ["LlamaForCausalLM"]}, "generator"),
    ({}, {"architectures": ["LlamaForCausalLM"]}, "generator"),
    ({}, {"architectures": ["BertModel"]}, "encoder"),
    ({}, {"architectures": ["RobertaForSequenceClassification"]}, "encoder"),
    ({}, {"architectures": ["BertForTokenClassification"]}, "encoder"),
    ({}, {"architectures": ["ViTForImageClassification"]}, ""),
    ({"structure": "seq2seq-lm"}, {"architectures": ["T5ForConditionalGeneration"]}, "generator"),
    ({}, {"architectures": ["MarianMTModel"]}, "generator"),
    ({}, {}, ""),
])  # fmt: skip
def test_the_plugin_follows_from_the_models_files(card: dict[str, str], config: dict[str, list[str]], plugin: str) -> None:
    assert plugin_of(card, config) == plugin


def test_known_answers_are_read_by_line(tmp_path: Path) -> None:
    file = tmp_path / "known.jsonl"
    file.write_text('{"text": "a", "expect": "b"}\n{"text": "c", "expect": "d"}\n')
    assert _known(file) == (KnownAnswer("a", "b"), KnownAnswer("c", "d"))
    assert _known(None) == ()
    file.write_text('{"text": "a", "expect": "b"}\n{"text": "c"}\n')
    with pytest.raises(ClientFault, match=r"known\.jsonl:2: .*expect"):
        _known(file)


def test_what_is_no_model_is_not_stored(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path, words in ((tmp_path, "notes.txt"), (tmp_path / "notes.txt", "no model"), (tmp_path / "none", "does not exist")):
        with pytest.raises(ClientFault, match=words):
            _check_importable(path)
    for names in (("config.json", "a.safetensors"), ("a.gguf",), ("model.json",)):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        _check_importable(folder)


def test_a_plugin_that_is_nowhere_is_not_waited_for() -> None:
    plugins = tuple(LoadedPlugin(Manifest(n, "1", "", (c,), f"{n}:X")) for n, c in (("mine", "server/1"), ("data", "data/1")))
    state = SystemState((), (), (), 1, plugins=plugins)
    _require_plugin("mine", state)
    _require_plugin("", state)
    for name in ("nobody", "data"):
        with pytest.raises(ClientFault, match=f"--plugin '{name}'") as caught:
            _require_plugin(name, state)
        assert "mine" in caught.value.remedy.split(";")[0]


@pytest.mark.parametrize(("line", "code", "says"), [
    ("model deploy chat", 2, "MODEL"),
    ("model deploy chat m --canary 150%", 2, "150%"),
    ("model deploy chat m --checks absent.jsonl", 2, "absent.jsonl is no file"),
    ("model rollback chat --canary 10%", 1, "kernelm up"),
    ("model rollback chat --canary 150%", 2, "150%"),
    ("model deploy chat m", 1, "kernelm up"),
    ("model promote chat", 1, "kernelm up"),
    ("model history chat", 1, "kernelm up"),
    ("model import absent", 2, "absent does not exist"),
    ("chat chat hello", 1, "kernelm up"),
])  # fmt: skip
def test_faults_end_in_a_panel_and_the_right_code(line: str, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("KERNELM_HOME", str(tmp_path / "home"))
    assert execute(line.split()) == code
    assert says in capsys.readouterr().err


def test_a_talk_goes_on_after_ctrl_c_and_ends_with_its_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    asked = []

    async def answer(self: Talk, turns: tuple[object, ...], add: object) -> None:
        asked.append([turn.content for turn in turns])  # type: ignore[attr-defined]
        add("an answer")  # type: ignore[operator]
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Talk, "_answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/new\nthree\n"))
    assert execute(["chat", "m", "--system", "Be brief.", "--home", str(tmp_path)]) == 0
    assert asked == [["Be brief.", "one"], ["Be brief.", "one", "an answer", "two"], ["Be brief.", "three"]]
    assert Talk(Common(tmp_path), "m", GenerateRequest(), "")._turns == ()
    assert ">" not in capsys.readouterr().out
