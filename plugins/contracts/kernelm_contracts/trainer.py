r"""`trainer/1`: a dataset becomes a model.

A model is an artifact of kind "model". It always holds `model.json` (a `ModelCard`) and `evaluation.json` (split ->
`Scores`); `confusion.png` and `card.md`, for people, where the trainer makes them. Pickles are never written nor read. A
model turns a text into one logit a label, in the order of `ModelCard.labels`; their softmax gives probabilities (already
calibrated). By structure:

"encoder", "frozen-linear"
    config.json, model.safetensors   the encoder alone, without pooler: a folder for transformers' `AutoModel`
                                     (`id2label`, `label2id` in config.json), float32
    tokenizer.json, tokenizer_config.json   `Tokenizer.from_file`; truncation is set to `ModelCard.max_tokens`, padding
                                     is off: the server pads a batch to its longest (id `pad_token_id` of config.json)
    head.safetensors                 `weight` [labels, hidden], `bias` [labels], float32
    logits = mean @ weight.T + bias, where mean [batch, hidden] is the mean of `last_hidden_state` over the tokens whose
    `attention_mask` is 1 ([CLS] and [SEP] count), not normalized. `token_type_ids` are 0. Dropout in training only.
    An embedding is `mean` divided by its L2 norm.
    After optimization model.onnx stands in place of model.safetensors and head.safetensors: inputs `input_ids`,
    `attention_mask` [batch, tokens] int64; output `logits` [batch, labels] float32.

"tfidf-linear"
    vocabulary.json                  term -> column
    linear.safetensors               `idf` [terms], `weight` [labels, terms], `bias` [labels], float32; int8 weights
                                     come with `scale` [labels] float32: weight = scale[:, None] * int8
    tokens = re.findall(r"(?u)\b\w\w+\b", text.lower()); terms are the 1..n-grams of tokens joined by one space, n
    being `ModelCard.request["ngrams"]`; terms that are not in the vocabulary are ignored. For a term that occurs
    c > 0 times, x[column] = (1 + ln c) * idf[column]; x is divided by its L2 norm (a text without terms stays 0);
    logits = weight @ x + bias. All in float32. There is no tokenizer and no embedding.
"""

from typing import Any, ClassVar, Literal

from msgspec import Struct

from kernelm_sdk.contract import Contract, job, unary
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import ArtifactName

Structure = Literal["encoder", "frozen-linear", "tfidf-linear"]
Algorithm = Literal["sgd", "momentum", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon", "liblinear", "lbfgs"]


class TrainRequest(Struct, frozen=True, forbid_unknown_fields=True):
    dataset: str  # digest
    base: str = ""  # digest of the encoder to start from; not for "tfidf-linear"
    structure: Structure = "encoder"
    layers: int = 0  # keep only the first so many transformer layers; 0 for all
    algorithm: Algorithm = "adamw"
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 0.0  # peak of the schedule; 0 for the algorithm's own (kernelm_trainer.algorithms)
    warmup: float = 0.1  # share of the steps with a rising rate; then it falls linearly to 0
    weight_decay: float = 0.01  # of the algorithms that have one
    max_grad_norm: float = 1.0  # L2 norm of all gradients, to which larger ones are scaled down
    dropout: float = 0.1  # probability; in training only
    regularization: float = 1.0  # C of the linear classifiers
    ngrams: int = 2  # "tfidf-linear": word n-grams up to this length
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # "auto": bf16 where the processor has it
    checkpoint_every_s: float = 30.0
    seed: int = 0
    require_private_clean: Literal["off", "warn", "refuse"] = "off"  # what if the dataset holds private data, or nobody looked
    report_test: bool = True  # False in a search: the test split is then not even evaluated, `Trained.test` is None


class Scores(Struct, frozen=True):
    """Quality of a classifier on one split."""

    split: str
    documents: int
    accuracy: float
    macro_recall: float
    macro_f1: float
    loss: float = 0.0  # mean cross-entropy, nats
    per_label: dict[str, dict[str, float]] = {}  # label -> precision, recall, f1, support
    confusion: tuple[tuple[int, ...], ...] = ()  # rows: true label


class ModelCard(Struct, frozen=True):
    """`model.json`: what the model is, where it comes from and how good it is."""

    name: str
    task: Literal["text-classification"]
    structure: Structure
    labels: tuple[str, ...]
    max_tokens: int
    format: Literal["safetensors", "onnx"] = "safetensors"
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    algorithm: str = ""
    parameters: int = 0
    dataset: str = ""
    base: str = ""
    request: dict[str, Any] = {}  # the settings it was trained with
    scores: dict[str, Scores] = {}  # split -> scores
    trained_s: float = 0.0
    hidden: int = 0  # size of the embedding; 0 where there is none
    warnings: tuple[str, ...] = ()  # what a person should know before they serve it


class Trained(Struct, frozen=True):
    model: str  # digest
    structure: Structure
    algorithm: str
    parameters: int
    validation: Scores
    test: Scores | None = None  # None when the request came from a search: the test split is looked at once
    took_s: float = 0.0
    tokens_per_s: float = 0.0


class ModelTrained(Event, frozen=True):
    """A model is in the store."""

    TYPE: ClassVar[str] = "model.trained"
    model: str
    structure: str
    accuracy: float  # on the validation split


class Trainer(Contract, name="trainer", major=1):
    """Trains, checkpoints, resumes and evaluates models."""

    events = (ModelTrained,)

    @job
    async def train(self, request: TrainRequest, job: Job) -> Trained:
        """Train on the train split, select by the validation split, report both and the test split."""
        ...

    @unary
    async def describe(self, request: ArtifactName, call: Any) -> ModelCard:
        """The card of a stored model."""
        ...
