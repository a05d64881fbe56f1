"""A frozen encoder under a linear classifier: every document is embedded once, then only the head is fitted."""

import shutil
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_trainer import checkpoint, encoder, linear
from kernelm_trainer.corpus import Corpus
from kernelm_trainer.encoder import Classifier
from kernelm_trainer.observer import Meter, Observer

CHUNK = 128  # documents between two chances to write a checkpoint


class Embedded(Struct, forbid_unknown_fields=True):
    """state.json of a checkpoint; embeddings.safetensors beside it holds `embeddings` [documents so far, hidden]."""

    fingerprint: str
    documents: int = 0  # embedded so far, in the order of the splits
    elapsed_s: float = 0.0  # spent by all attempts


class FrozenLinear:
    """One training of a head, new or resumed from the checkpoint in the folder `resume`."""

    def __init__(self, request: TrainRequest, corpus: Corpus, base: Path, work: Path, observer: Observer,
                 resume: Path | None) -> None:  # fmt: skip
        self.request, self.corpus, self.work, self.observer = request, corpus, work, observer
        torch.manual_seed(request.seed)
        self.model: Classifier = encoder.load(base, corpus, request.layers, dropout=0.0).eval()
        hidden = self.model.head.in_features
        self.state = Embedded(checkpoint.fingerprint(request, self.model))
        self.embeddings = np.empty((0, hidden), np.float32)
        if resume is not None:
            try:
                self.state, self.embeddings = _read(resume, self.state.fingerprint, hidden)
            except checkpoint.Misfit as error:
                observer.begins_anew(str(error))
        self.rows = [row for split in corpus.splits.values() for row in split.input_ids]
        done = sum(map(len, self.rows[: self.state.documents]))
        self.tokens = sum(map(len, self.rows)) - done  # to embed in this attempt
        self.meter = Meter(observer, 1.05 * (done + self.tokens), done)  # the fit is a small rest
        self.started = time.monotonic() - self.state.elapsed_s
        self.tokens_per_s = 0.0

    def run(self) -> tuple[Classifier, dict[str, NDArray[np.float32]]]:
        """The model with its fitted head, and the logits of each split."""
        began = saved_at = time.monotonic()
        pad = self.model.encoder.config.pad_token_id or 0
        while self.state.documents < len(self.rows):
            chunk = self.rows[self.state.documents : self.state.documents + CHUNK]
            values = encoder.run(self.model.pool, chunk, 32, pad, lambda tokens: self.meter.advance(
                tokens, "embed", f"{self.state.documents}/{len(self.rows)} documents"))  # fmt: skip
            self.embeddings = np.concatenate([self.embeddings, values])
            self.state.documents += len(chunk)
            if time.monotonic() - saved_at >= self.request.checkpoint_every_s:
                self.save()
                saved_at = time.monotonic()
        self.tokens_per_s = self.tokens / max(time.monotonic() - began, 1e-9)
        splits = dict(zip(self.corpus.splits, np.split(self.embeddings, self._bounds()), strict=True))
        head = self.fit(splits["train"])
        with torch.no_grad():
            self.model.head.weight.copy_(torch.from_numpy(head.weight))
            self.model.head.bias.copy_(torch.from_numpy(head.bias))
        return self.model, {name: head.logits(x) for name, x in splits.items()}

    def fit(self, x: NDArray[np.float32]) -> linear.Linear:
        """A head on standardized embeddings, with the standardization divided into it again."""
        mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
        request, labels = self.request, self.corpus.splits["train"].labels
        raw = linear.fit((x - mean) / deviation, labels, self.corpus.labels, request.algorithm, request.regularization,
                         request.seed, lambda done, of: self.meter.advance(0.0, "fit", f"fit {done + 1}/{of}"))  # fmt: skip
        weight = (raw.weight / deviation).astype(np.float32)
        return linear.Linear(weight, (raw.bias - weight @ mean).astype(np.float32), raw.temperature)

    def save(self) -> None:
        folder = self.work / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.state.elapsed_s = time.monotonic() - self.started
        save_file({"embeddings": np.ascontiguousarray(self.embeddings)}, folder / "embeddings.safetensors")
        (folder / "state.json").write_bytes(msgspec.json.encode(self.state))
        self.observer.save(folder)
        shutil.rmtree(folder)

    def _bounds(self) -> list[int]:
        return np.cumsum([len(split.labels) for split in self.corpus.splits.values()])[:-1].tolist()


def _read(folder: Path, expected: str, hidden: int) -> tuple[Embedded, NDArray[np.float32]]:
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=Embedded)
        if state.fingerprint != expected:
            raise checkpoint.misfit()
        embeddings = load_file(folder / "embeddings.safetensors")["embeddings"]
        if embeddings.shape != (state.documents, hidden):
            raise ValueError(f"embeddings {embeddings.shape} of {state.documents} documents and {hidden} units")
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise invalid_checkpoint("state.json, embeddings.safetensors", error) from None
    return state, embeddings
