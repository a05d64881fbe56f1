"""A Llama that was trained here becomes a GGUF that says the same: to transformers, and to llama.cpp itself."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kernelm.testing.parts import absent
from kernelm_optimizer import causal
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.gguf_export import FILE, export
from kernelm_sdk.errors import ClientFault

TEXT = "The government said on Tuesday that café prices   rose 3.5%,\nbut it's not the end."


@pytest.fixture(scope="module")
def exported(causal_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "model"
    export(causal_lm, target, read_card(causal_lm))
    return target


def test_transformers_reads_the_same_model_out_of_the_file(exported: Path, causal_lm: Path, corpus: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {FILE, "model.json", "evaluation.json"}
    card = read_card(exported)
    assert (card.format, card.precision, card.structure) == ("gguf", "int8", "causal-lm")
    whole = AutoModelForCausalLM.from_pretrained(causal_lm)
    less = AutoModelForCausalLM.from_pretrained(exported, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True),
                                                dtype=torch.float32)  # fmt: skip
    ids = causal.rows(corpus, "validation", 4)[0].unsqueeze(0)
    with torch.inference_mode():
        one, other = whole(ids).logits, less(ids).logits
    assert float((one - other).norm() / one.norm()) < 0.02
    tokens = [AutoTokenizer.from_pretrained(folder, **more).encode(TEXT, add_special_tokens=False)
              for folder, more in ((causal_lm, {}), (exported, {"gguf_file": FILE}))]  # fmt: skip
    assert tokens[0] == tokens[1]


def test_llama_cpp_goes_on_as_transformers_does(exported: Path, causal_lm: Path) -> None:
    if find_spec("xllamacpp") is None:
        absent("needs xllamacpp: pip install -r deploy/thirdparty.txt -c deploy/constraints.txt")
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.ui = str(exported / FILE), 64, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    tokenizer = AutoTokenizer.from_pretrained(causal_lm)
    answer = server.handle_completions({"prompt": TEXT[:40], "max_tokens": 1, "temperature": 0, "logprobs": 5})
    given = tokenizer(TEXT[:40], return_tensors="pt")["input_ids"]
    assert answer["usage"]["prompt_tokens"] == given.shape[1], "it reads the text as the same tokens"
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(causal_lm)(given).logits[0, -1].log_softmax(-1)
    (found,) = answer["choices"][0]["logprobs"]["content"]
    for candidate in found["top_logprobs"]:
        assert candidate["logprob"] == pytest.approx(float(wanted[candidate["id"]]), abs=0.1)


async def test_compress_makes_one_and_measures_what_it_cost(here: Any) -> None:
    found = await here.compress("gguf")
    folder = here.artifacts[found.model][1]
    assert (folder / FILE).is_file()
    assert found.after.bytes < 0.5 * found.before.bytes
    assert abs(found.change.difference) < 0.01
    assert found.change.text in read_card(folder).notes
    here.artifacts["sha256:model"] = here.artifacts[found.model]
    with pytest.raises(ClientFault, match="it is int8 already"):
        await here.compress("gguf")


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: changed(folder / "config.json", **changes)


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("change", "words"), [
    (config(model_type="mistral"), "model_type is 'mistral'"),
    (config(attention_bias=True), "attention_bias is True"),
    (config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope_type is 'linear'"),
    (lambda folder: changed(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"}), "splits texts as GPT-2 does"),
    (lambda folder: changed(folder / "tokenizer.json", normalizer={"type": "Lowercase"}), "splits texts as GPT-2 does"),
])  # fmt: skip
def test_what_llama_cpp_would_read_otherwise_is_refused(causal_lm: Path, tmp_path: Path, change: Any, words: str) -> None:
    shutil.copytree(causal_lm, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ClientFault, match=words) as raised:
        export(tmp_path / "model", tmp_path / "out", read_card(causal_lm))
    assert "convert_hf_to_gguf.py" in raised.value.remedy
    assert not (tmp_path / "out").exists()
    with pytest.raises(ClientFault, match="it is int4 already"):
        export(causal_lm, tmp_path / "out", msgspec.structs.replace(read_card(causal_lm), precision="int4"))
