"""`optimizer/1.compress`: one model is made smaller by one method, and measured beside what it was made from. Effects only."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.optimizer import Change, Compressed, CompressRequest, Prune
from kernelm_contracts.server import Measurement
from kernelm_contracts.splits import batches
from kernelm_contracts.trainer import ModelCard, Teacher, Trained, TrainRequest
from kernelm_optimizer.auto import right_of
from kernelm_optimizer.children import Children, result_of
from kernelm_optimizer.folder import read_card, write_card
from kernelm_optimizer.measuring import Measuring, Unmeasured
from kernelm_optimizer.oneshot import SAMPLES, Scheme, missing
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Job

if TYPE_CHECKING:
    from kernelm_optimizer.plugin import OptimizerPlugin

STATE, FORMAT = "compression.json", 1  # of checkpoints: raise it when `_State` changes
INTEGERS = {"int8": 8, "int4": 4}
UNTRAINED = (*INTEGERS, "gguf", "gptq")  # methods that train nothing
METHODS = {"encoder": ("int8", "prune", "distill"), "tfidf-linear": ("int8",), "causal-lm": (*UNTRAINED, "prune", "distill")}
CALIBRATION = 64  # documents of the train split that show what of a model does least, or in which ranges it computes
MADE, TRAINED, MEASURED = 0.1, 0.7, 0.95  # where each phase ends, as a share of the job
Figured = tuple[dict[str, Measurement], dict[tuple[str, str], Change]]  # by role; by (role before, role after)


class _State(Struct, frozen=True):
    """The checkpoint: models that exist."""

    spent_s: float = 0.0
    models: dict[str, str] = {}  # "pruned", "after", "without" -> digest


def checked(request: CompressRequest) -> None:
    """ClientFault `invalid` that names the field which makes no sense; nothing has been started then."""
    if not request.model or not request.dataset:
        raise _invalid("model or dataset is empty", "give the digests of both")
    if not 0 < request.budget_s < float("inf"):
        raise _invalid(f"budget_s is {request.budget_s}", "give the seconds that trainings may take, above 0")
    if not 1 <= request.rounds <= 1000:
        raise _invalid(f"rounds is {request.rounds}", "give a number from 1 to 1000")
    shares = msgspec.structs.asdict(request.prune)
    if wrong := [name for name, share in shares.items() if not 0 <= share < 1]:
        raise _invalid(f"prune.{wrong[0]} is {shares[wrong[0]]}", "give a share from 0 to less than 1")
    if (request.method == "prune") != any(shares.values()):
        raise _invalid(f"method {request.method!r} with prune = {shares}", 'give a share with method "prune", and only there')
    if request.method in UNTRAINED and request.train:
        raise _invalid(f"method {request.method!r} trains nothing", "leave train out")
    if request.method != "gptq" and request.scheme != "W4A16":
        raise _invalid(f"method {request.method!r} with scheme {request.scheme!r}", 'leave scheme out: it is of method "gptq"')
    if request.method != "int8" and request.activations != "dynamic":
        raise _invalid(f"method {request.method!r} with activations {request.activations!r}", 'it is of method "int8"')
    if request.method == "distill" and request.train is None:
        raise _invalid('method "distill" has no train', "name the student by train.base or train.architecture")


class Compression:
    """One compression, new or resumed."""

    def __init__(self, plugin: "OptimizerPlugin", request: CompressRequest, job: Job) -> None:
        checked(request)
        self.context, self.settings, self.request, self.job = plugin.context, plugin.settings, request, job
        self.children = Children(job, self.settings.poll_max_s, self.settings.patience_s)
        self.begun, self.state = time.monotonic(), _State()

    async def run(self) -> Compressed:
        if self.request.method == "gptq" and (why := missing()):
            raise ClientFault("not_installed", f'compress: method "gptq": {why}', "give the optimizer one of its own: `kernelm "
                              "plugin replace optimizer/1 optimizer --runtime venv`; int8 and int4 need none")  # fmt: skip
        if folder := await self.job.resume(FORMAT):
            try:
                self.state = msgspec.json.decode((folder / STATE).read_bytes(), type=_State)
            except (OSError, msgspec.DecodeError) as error:
                raise invalid_checkpoint(STATE, error) from None
        source = await self.context.artifact(self.request.model)
        dataset = await self.context.artifact(self.request.dataset)
        card = read_card(source)
        if self.request.method not in (methods := METHODS.get(card.structure, ())):
            raise ClientFault("invalid_model", f"compress: a {card.structure} is not made smaller by {self.request.method!r}",
                              f"take {' or '.join(methods)}" if methods else f"give a model of structure {' or '.join(METHODS)}")
        if card.structure == "causal-lm" and self.request.activations == "static":
            raise ClientFault("invalid_model", "compress: the activations of a causal-lm in int8 stay bfloat16, without ranges",
                              'leave activations out, or take method "gptq" with scheme "W8A8"')  # fmt: skip
        await self._prepare(card, source, dataset)
        models = {"before": self.request.model, **self.state.models}
        if models.get("pruned") and "after" not in models:  # it does not recover
            models["after"] = models["pruned"]
        elif "pruned" in models:
            models["without"] = models["pruned"]
        models.pop("pruned", None)
        found, changes = await self._measure(card, models, dataset)
        return await self._finish(models["after"], found, changes)

    @property
    def deadline(self) -> float:
        """When the budget is spent, of `time.monotonic`."""
        return self.begun + self.request.budget_s - self.state.spent_s

    # ---- making ----------------------------------------------------------------------------------------------------

    async def _prepare(self, card: ModelCard, source: Path, dataset: Path) -> None:
        request = self.request
        if card.structure != "causal-lm" and request.method == "int8":
            shown = dataset if request.activations == "static" else None
            await self._once("after", _classifier, source, card, shown, self.settings.reduce_range)
        elif request.method in INTEGERS:
            await self._once("after", _integers, source, card, INTEGERS[request.method])
        elif request.method == "gguf":
            await self._once("after", _gguf, source, card)
        elif request.method == "gptq":
            await self._once("after", _gptq, source, card, request.scheme, dataset)
        elif request.method == "prune":
            await self._once("pruned", _pruned, source, card, request.prune, dataset)
            if request.train is not None:
                await self._train({"after": replace(request.train, base=self.state.models["pruned"])}, card)
        elif request.train is not None:
            teacher = request.train.teacher or Teacher(request.model)
            await self._train({"after": replace(request.train, teacher=replace(teacher, model=request.model)),
                               "without": replace(request.train, teacher=None)}, card)  # fmt: skip

    async def _once(self, role: str, make: Any, source: Path, card: ModelCard, *more: Any) -> None:
        """Make a model here and store it, unless an earlier attempt did."""
        if role in self.state.models:
            return
        self.job.progress(0.0, self.request.method, "making the model")
        target = self.job.scratch / role
        shutil.rmtree(target, ignore_errors=True)  # what an attempt that was killed has left
        await self.job.in_thread(make, source, target, card, *more)
        await self._keep(**{role: await self._store(target, read_card(target))})

    async def _train(self, requests: Mapping[str, TrainRequest], card: ModelCard) -> None:
        """Side by side, within the budget. ClientFault `budget_too_small` if one did not come to its end."""
        wanted = {role: replace(r, dataset=self.request.dataset, structure=card.structure, report_test=False)
                  for role, r in requests.items() if role not in self.state.models}  # fmt: skip
        jobs = {}
        for role, train in wanted.items():
            name = f"{self.request.method}-{role}"
            jobs[role] = (await self.children.submit(name, "trainer/1.train", train, self.settings.train)).id

        async def seen(records: Mapping[str, JobRecord]) -> None:
            share = sum(1.0 if r.state == "done" else r.progress.fraction for r in records.values()) / len(records)
            self.job.progress(MADE + (TRAINED - MADE) * share, "training", "; ".join(
                f"{role}: {r.progress.message or r.why or r.state}" for role, r in records.items()))  # fmt: skip

        if not jobs:
            return
        deadline = self.deadline
        records = await self.children.ended(jobs, seen, deadline)
        if late := [role for role, r in records.items() if r.state == "cancelled" and time.monotonic() >= deadline]:
            record = records[late[0]]
            why = f"was spent with {100 * record.progress.fraction:.0f} % of the training done"
            if not record.started and record.id in self.children.waited:
                why = f"was spent before the training began: {self.children.waited[record.id].text}"
            raise ClientFault("budget_too_small", f"compress: the budget of {self.request.budget_s:g} s {why}",
                              "raise budget_s, or give train fewer epochs or max_steps")  # fmt: skip
        await self._keep(**{role: result_of(record, Trained).model for role, record in records.items()})

    async def _keep(self, **models: str) -> None:
        self.state = _State(self.state.spent_s, self.state.models | models)
        folder = self.job.scratch / "checkpoint"
        folder.mkdir(exist_ok=True)
        spent = self.state.spent_s + time.monotonic() - self.begun
        (folder / STATE).write_bytes(msgspec.json.encode(replace(self.state, spent_s=spent)))
        await self.job.save(folder, format=FORMAT, passing=True)

    async def _store(self, folder: Path, card: ModelCard) -> str:
        metadata: dict[str, Any] = {"name": card.name, "structure": card.structure, "precision": card.precision}
        return await self.context.store(folder, "model", metadata=metadata, job=self.job.id, model=self.request.model,
                                        dataset=self.request.dataset)  # fmt: skip

    # ---- measuring -------------------------------------------------------------------------------------------------

    async def _measure(self, card: ModelCard, models: Mapping[str, str], dataset: Path) -> Figured:
        """All side by side, in turns; the changes from "before", and from "without", to "after"."""
        self.job.progress(TRAINED, "measuring", f"{len(models)} models in turns")
        pairs = [("before", "after"), *([("without", "after")] if "without" in models else [])]
        if card.structure == "causal-lm":
            folders = {role: await self.context.artifact(digest) for role, digest in models.items()}
            return await self.job.in_thread(_side_by_side, models, folders, dataset, self.request.rounds, pairs, self.job.threads)
        measuring = Measuring(self.children, self.settings, self.request.dataset, self.deadline)
        try:
            by_digest = await measuring.run("measuring", models.values(), self.request.rounds, lambda done, text: self.job.progress(
                TRAINED + (MEASURED - TRAINED) * done, "measuring", text))  # fmt: skip
        except Unmeasured as unmeasured:
            raise unmeasured.fault(f"compress: the model that was made ({models['after']}) is not measured: {unmeasured}") from None
        found = {role: by_digest[digest] for role, digest in models.items()}
        return found, {(one, two): _of_classifiers(found[one], found[two]) for one, two in pairs}

    async def _finish(self, model: str, found: Mapping[str, Measurement], changes: Mapping[tuple[str, str], Change]) -> Compressed:
        """The model again, with all of this in its card."""
        before, after, gain = found["before"], found["after"], changes.get(("without", "after"))
        folder = self.job.scratch / "final"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(await self.context.artifact(model), folder)
        card = read_card(folder)
        costs = (f"{before.bytes / 1e6:.2f} MB before, {after.bytes / 1e6:.2f} after; latency {before.latency_ms:.2f} ms before, "
                 f"{after.latency_ms:.2f} after")  # fmt: skip
        if after.energy_j:
            costs += f"; energy {1000 * before.energy_j:.3g} mJ before, {1000 * after.energy_j:.3g} after"
        notes = [f"{self.request.method} of {self.request.model}: {costs}", changes["before", "after"].text]
        if gain is not None:
            what = "before its recovery" if self.request.method == "prune" else "trained alike without a teacher"
            notes.append(f"beside the same model {what}: {gain.text}")
        card = replace(card, scores={**card.scores, "validation": after.scores}, notes=(*card.notes, *notes))
        write_card(folder, card)
        digest = await self._store(folder, card)
        return Compressed(digest, self.request.method, before, after, changes["before", "after"], found.get("without"), gain,
                          self.state.spent_s + time.monotonic() - self.begun)  # fmt: skip


# What follows runs in a thread: it imports torch, for which the bus can't wait.

def _classifier(source: Path, target: Path, card: ModelCard, shown: Path | None, reduce_range: bool) -> None:
    """`shown`: the dataset whose documents show the ranges of activations, if they are to be static."""
    from kernelm_optimizer.quantize import quantize

    found = batches(shown, "train", ("text",), rows=CALIBRATION) if shown else ()
    texts: list[str] = next((batch.column(0).to_pylist() for batch in found), [])
    if shown and not texts:
        raise _invalid("the split 'train' has no documents to show the ranges of activations", 'take activations = "dynamic"')
    quantize(source, target, reduce_range, texts)


def _integers(source: Path, target: Path, card: ModelCard, bits: int) -> None:
    from kernelm_optimizer.integers import integers

    integers(source, target, card, bits)


def _gguf(source: Path, target: Path, card: ModelCard) -> None:
    from kernelm_optimizer.gguf_export import export

    export(source, target, card)


def _gptq(source: Path, target: Path, card: ModelCard, scheme: Scheme, dataset: Path) -> None:
    from kernelm_optimizer.causal import rows
    from kernelm_optimizer.oneshot import gptq

    gptq(source, target, card, scheme, rows(dataset, "train", SAMPLES))


def _side_by_side(models: Mapping[str, str], folders: Mapping[str, Path], dataset: Path, rounds: int,
                  pairs: list[tuple[str, str]], threads: int) -> Figured:  # fmt: skip
    import torch

    from kernelm_optimizer import causal

    if threads:  # more than it was granted wait for each other
        torch.set_num_threads(threads)
    found = causal.measured({models[role]: folder for role, folder in folders.items()}, dataset, rounds)
    changes = {(one, two): causal.change(found[models[one]], found[models[two]]) for one, two in pairs}
    return {role: found[digest].measurement for role, digest in models.items()}, changes


def _pruned(source: Path, target: Path, card: ModelCard, share: Prune, dataset: Path) -> None:
    from kernelm_optimizer.causal import rows
    from kernelm_optimizer.pruning import prune

    prune(source, target, card, share, rows(dataset, "train", CALIBRATION))


def _of_classifiers(before: Measurement, after: Measurement) -> Change:
    from kernelm_contracts.comparison import compare

    found = compare(right_of(after.scores), right_of(before.scores))
    one, other = before.scores, after.scores
    text = (f"accuracy {one.accuracy:.4f} before, {other.accuracy:.4f} after, on {other.documents} documents: {found.first_alone} "
            f"won and {found.second_alone} lost, p = {found.p:.3f}, {'' if found.significant else 'not '}significant")  # fmt: skip
    return Change("accuracy", found.accuracy, found.interval.low, found.interval.high, found.significant, text)


def _invalid(message: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"compress: {message}", remedy)
