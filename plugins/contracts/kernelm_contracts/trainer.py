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
    With several `ModelCard.request["views"]` (kernelm_contracts.terms) a term is "<view>:<term>"; the x of each view is
    divided by its own L2 norm, and all of x by the root of the number of views.

"causal-lm", "seq2seq-lm", "token-classification", "sentence-embedding"
    config.json, model.safetensors   a folder for transformers' `AutoModelForCausalLM`, `AutoModelForSeq2SeqLM`,
                                     `AutoModelForTokenClassification` (`id2label` are the entities' labels), `AutoModel`; float32
    tokenizer.json, tokenizer_config.json   as of the base or the dataset, a chat template included; nothing is truncated
    generation_config.json           where the architecture has one
    A causal-lm of format "gguf" is one file model.gguf in place of all these, for llama.cpp.
    A sentence's embedding is the mean of `last_hidden_state` over the tokens whose `attention_mask` is 1, divided by its L2 norm.

A model of a `problem` "multi-label" turns a text into one logit a label, too; the sigmoid of each is that label's probability.

An adapter is an artifact of kind "adapter": adapter_model.safetensors and adapter_config.json as peft's `PeftModel.from_pretrained`
reads them (LoRA), the tokenizer's files, and `model.json`, whose `base` is the digest of the model that it belongs to; no weights
of the base. It answers only on top of that base.

What a training reads, by structure, in a dataset's folder; `<split>` is train, validation or test:

"encoder", "frozen-linear", "tfidf-linear"
    as `data/1` writes it. For "multi-label" `<split>.parquet` has a column `labels` list<int32> in place of `label`.
"causal-lm"
    packed/<split>/<number>.parquet  packed token ids as `data/1` writes them, and tokenizer.json; or
    <split>.jsonl                    a line a chat: {"messages": [{"role": "user", "content": "..."}, ...]}; loss is on the tokens
                                     of the assistant's turns alone, by the base's chat template, or by ChatML where it has none
"seq2seq-lm"
    <split>.jsonl                    a line a pair: {"source": "...", "target": "..."}
"token-classification"
    <split>.jsonl                    a line a text: {"tokens": ["..."], "labels": ["B-person"]}, as many; a word's label is that of
                                     its first piece, the others have no loss
"sentence-embedding"
    <split>.jsonl                    a line a pair of texts that mean the same: {"anchor": "...", "positive": "..."}; the other
                                     positives of a batch are its negatives (van den Oord et al., 2018, "InfoNCE")
"""

from typing import Any, ClassVar, Literal

from msgspec import Struct

from kernelm_sdk.contract import Contract, job, unary
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import ArtifactName

Structure = Literal["encoder", "frozen-linear", "tfidf-linear", "causal-lm", "seq2seq-lm", "token-classification",
                    "sentence-embedding"]  # fmt: skip
Task = Literal["text-classification", "token-classification", "text-generation", "text2text-generation", "sentence-similarity"]
Algorithm = Literal["sgd", "momentum", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon", "liblinear", "lbfgs", "ridge"]
View = Literal["words", "stems", "lead", "names"]


class Adapter(Struct, frozen=True, forbid_unknown_fields=True):
    """LoRA: W + alpha / rank * B A, of which only A and B are trained (Hu et al., "LoRA", 2021, section 4.1)."""

    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # over the rank: what the product is multiplied by
    dropout: float = 0.0  # probability, of the input of A
    targets: tuple[str, ...] = ()  # last parts of the names of the linear maps that get one; () for all of the transformer's
    merge: bool = False  # store a whole model with the products added, in place of an artifact of kind "adapter"


class Privacy(Struct, frozen=True, forbid_unknown_fields=True):
    """DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", 2016): the model tells little about any one example."""

    epsilon: float = 8.0  # the budget, which the noise is chosen for
    delta: float = 1e-5  # probability that it is exceeded; less than one over the number of examples
    max_grad_norm: float = 1.0  # L2 norm to which the gradient of each example is scaled down


class Keep(Struct, frozen=True, forbid_unknown_fields=True):
    """What stays in the store: the last checkpoint, from which a job goes on, until it is done, and these. Others are erased once a
    later one is on record."""

    best: bool = True  # in each checkpoint, the parameters that were best on the validation split, which become the model
    every: int = 0  # a checkpoint each so many steps, whatever `checkpoint_every_s` says; 0 for none


class Teacher(Struct, frozen=True, forbid_unknown_fields=True):
    """Distillation: a student learns from a teacher's logits, too (Hinton et al., 2015)."""

    model: str  # digest: of the student's structure, with the same labels or the same tokens
    weight: float = 0.5  # of its logits in the loss, 0 to 1; the rest is that of the labels
    temperature: float = 2.0  # that both models' logits are divided by


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
    problem: Literal["multi-class", "binary", "multi-label"] = "multi-class"  # "binary": refused unless there are two labels
    architecture: dict[str, Any] = {}  # in place of `base`, from scratch: fields of transformers' config.json, `model_type` too
    adapter: Adapter | None = None  # train this in place of all parameters; not for the linear structures
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate, after the warmup; the first two end at 0
    micro_batch: int = 0  # rows that are computed at once, gradients are accumulated; 0 for `batch_size`, less if memory is short
    max_steps: int = 0  # steps of the optimizer, after which the training ends whatever `epochs` says; 0 for no limit
    evaluate_every: int = 0  # steps between two looks at the validation split; 0 for once an epoch
    block: int = 0  # tokens of a sequence, longer ones are cut; 0 for the dataset's, or what the model can take
    gradient_checkpointing: bool = False  # compute activations twice in place of keeping them
    compile: Literal["auto", "off", "on"] = "off"  # torch.compile; "auto": both are timed, where the training is long enough
    label_smoothing: float = 0.0  # share of the target that is spread over all labels; in training only
    privacy: Privacy | None = None
    keep: Keep = Keep()
    processes: int = 1  # of this instance (of each one of a gang), which share every batch
    sharding: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each has all parameters, or a part of them (FSDP2)
    views: tuple[View, ...] = ("words",)  # "tfidf-linear": what of a text is counted; each view weighs the same
    max_share: float = 1.0  # "tfidf-linear": terms in more than this share of the training documents are left out
    restarts: int = 3  # so often the processes are started again from the last checkpoint after one has died
    teacher: Teacher | None = None  # "encoder" and "causal-lm"


class Interval(Struct, frozen=True):
    """In 95% of the cases the figure lies between."""

    low: float  # in the unit of the figure
    high: float  # likewise


class Scores(Struct, frozen=True):
    """Quality of a model on one split. Of language models `accuracy` is that of the next token, and the macro figures are 0; of
    sentence embeddings it is the share of anchors whose own positive is the nearest of the split."""

    split: str
    documents: int
    accuracy: float
    macro_recall: float
    macro_f1: float
    loss: float = 0.0  # mean cross-entropy, nats
    per_label: dict[str, dict[str, float]] = {}  # label -> precision, recall, f1, support
    confusion: tuple[tuple[int, ...], ...] = ()  # rows: true label
    tokens: int = 0  # that count in loss and perplexity, of language models
    perplexity: float = 0.0  # exp(loss) of language models; 0 where there is none
    calibration: float = -1.0  # expected calibration error, 15 bins of confidence (Guo et al., 2017); -1 where there is none
    intervals: dict[str, Interval] = {}  # name of a figure -> by bootstrap over the documents
    right: str = ""  # of a measured classifier: a bit a document of the split, the last one lowest, 1 for right; in hexadecimal


class ModelCard(Struct, frozen=True):
    """`model.json`: what the model is, where it comes from and how good it is."""

    name: str
    task: Task
    structure: Structure
    labels: tuple[str, ...]
    max_tokens: int
    format: Literal["safetensors", "onnx", "gguf"] = "safetensors"
    precision: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    algorithm: str = ""
    parameters: int = 0
    dataset: str = ""
    base: str = ""
    request: dict[str, Any] = {}  # the settings it was trained with
    scores: dict[str, Scores] = {}  # split -> scores
    trained_s: float = 0.0
    hidden: int = 0  # size of the embedding; 0 where there is none
    warnings: tuple[str, ...] = ()  # what a person should know before they serve it
    problem: Literal["multi-class", "binary", "multi-label"] = "multi-class"  # of a classifier
    adapter: bool = False  # an artifact of kind "adapter": it needs `base`
    notes: tuple[str, ...] = ()  # what was decided on the way: a smaller micro batch, whether it was compiled
    epsilon: float = 0.0  # of differential privacy, spent; 0 where there is none
    delta: float = 0.0  # probability that it is exceeded


class Trained(Struct, frozen=True):
    model: str  # digest
    structure: Structure
    algorithm: str
    parameters: int
    validation: Scores
    test: Scores | None = None  # None when the request came from a search: the test split is looked at once
    took_s: float = 0.0
    tokens_per_s: float = 0.0
    adapter: bool = False  # `model` is the digest of an artifact of kind "adapter"


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
