"""Distillation: a student is taught by a teacher's logits beside the labels (Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015, section 2)."""

from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import kl_div

from kernelm_contracts.trainer import ModelCard, Teacher, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import encoder, pretrained
from kernelm_trainer.corpus import Corpus


class Lessons:
    """What a teacher says of a batch. No module, so that its parameters are none of the student's."""

    def __init__(self, model: nn.Module, teacher: Teacher) -> None:
        self.model, self.weight, self.temperature = model.eval().requires_grad_(False), teacher.weight, teacher.temperature

    def mixed(self, loss: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of the labels, summed over rows, with that of the teacher's logits [rows, classes] by their weight. Gradients of
        softened probabilities shrink with the temperature squared, which is made up for."""
        t = self.temperature
        given, wanted = ((logits.float() / t).log_softmax(-1) for logits in (student, teacher))
        soft = kl_div(given, wanted, reduction="sum", log_target=True)
        return (1 - self.weight) * loss + self.weight * t * t * soft


def classifier(request: TrainRequest, folder: Path | None, corpus: Corpus) -> Lessons | None:
    """The teacher of a classification, if there is one; ClientFault "invalid_teacher" if it can't teach this dataset."""
    if request.teacher is None or folder is None:
        return None
    card = _card(folder, request.structure)
    if card.labels != corpus.labels:
        raise _invalid(f"its labels are {', '.join(card.labels)}, the dataset's are {', '.join(corpus.labels)}")
    model = encoder.load(folder, corpus, 0, 0.0)
    try:
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _invalid(f"head.safetensors: {error}") from None
    return Lessons(model, request.teacher)


def language(request: TrainRequest, folder: Path | None, vocabulary: dict[str, int]) -> Lessons | None:
    """The teacher of a causal model, if there is one; ClientFault "invalid_teacher" if it has other tokens."""
    if request.teacher is None or folder is None:
        return None
    _card(folder, request.structure)
    pretrained.check_base(folder)
    if pretrained.tokenizer(folder).get_vocab() != vocabulary:
        raise _invalid("tokenizer.json has another vocabulary than the dataset's")
    plain = msgspec.structs.replace(request, adapter=None, layers=0, gradient_checkpointing=False)
    return Lessons(pretrained.load(plain, folder, max(vocabulary.values()) + 1), request.teacher)


def _card(folder: Path, structure: str) -> ModelCard:
    try:
        card = msgspec.json.decode((folder / "model.json").read_bytes(), type=ModelCard)
    except (OSError, msgspec.MsgspecError) as error:
        raise _invalid(f"model.json: {error}") from None
    if (card.structure, card.format, card.adapter) != (structure, "safetensors", False) or card.precision in ("int8", "int4"):
        raise _invalid(f"it is {card.precision} {card.structure} in {card.format}, the student {structure}")
    return card


def _invalid(why: str) -> ClientFault:
    return ClientFault("invalid_teacher", f"teacher: {why}",
                       "give a whole model of the student's structure, with its labels or tokens")  # fmt: skip
