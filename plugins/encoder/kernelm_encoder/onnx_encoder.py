"""An encoder with its head as one ONNX graph, by ONNX Runtime, in fp32 or int8 as the graph has it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import onnxruntime

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import Document, Output, invalid_model, size_of
from kernelm_encoder.tokenizing import Tokenizer, pad

INPUTS = {"input_ids", "attention_mask"}


class OnnxEncoder:
    """Output `logits`; a graph that also has an output `embeddings` [batch, hidden] can embed."""

    extracts = False

    def __init__(self, card: ModelCard, size: int, tokenizer: Tokenizer, session: onnxruntime.InferenceSession) -> None:
        self.card, self.size, self.tokenize = card, size, tokenizer
        self._session = session
        self.embeds = "embeddings" in {output.name for output in session.get_outputs()}
        self._outputs = ["logits", "embeddings"] if self.embeds else ["logits"]

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        """See `Model.load`."""
        path = folder / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # A thread that spins for the next operator is a core that the broker and the other plugins don't have.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base
            raise invalid_model(path, f"ONNX Runtime can't load it: {error}") from None
        if (inputs := {value.name for value in session.get_inputs()}) != INPUTS:
            raise invalid_model(path, f"inputs are {sorted(inputs)}, expected {sorted(INPUTS)}")
        outputs = {output.name: output.shape for output in session.get_outputs()}
        if "logits" not in outputs:
            raise invalid_model(path, f"output `logits` is missing; there are {sorted(outputs)}")
        width = outputs["logits"][-1]
        if isinstance(width, int) and width != len(card.labels):
            raise invalid_model(path, f"`logits` has {width} columns, but model.json has {len(card.labels)} labels")
        return cls(card, size_of(folder), Tokenizer(folder, card.max_tokens), session)

    def run(self, documents: Sequence[Document]) -> Output:
        """See `Model.run`."""
        ids, mask = pad([document.features for document in documents])
        logits, *rest = self._session.run(self._outputs, {"input_ids": ids, "attention_mask": mask})
        return Output(logits, rest[0] if rest else None)
