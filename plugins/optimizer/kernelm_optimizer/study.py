"""A search's trials: what is tried next, what is given up early, what is best. Optuna decides; no kernelm I/O.

Durable is the list of trials (`Trial`), which the search's checkpoint holds. Optuna's study lives in memory and is built again
from that list. A sampler gets a new seed for each trial, from the search's seed and the trial's number, so that a search which
was interrupted suggests what it would have suggested without. (1,000 trials of two parameters at random take 19.8 s of a processor
with Optuna's SQLite, 2.3 s with its journal file, and 0.7 s with the list written to a file and synced every 8 trials.)
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec
import numpy as np
import optuna
from msgspec import Struct
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial as Asked
from optuna.trial import TrialState, create_trial

from kernelm_contracts.optimizer import Dimension, Search, Value
from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import TrainRequest
from kernelm_optimizer.choice import beats
from kernelm_optimizer.space import Space, invalid
from kernelm_sdk.checkpoints import invalid_checkpoint

NAME = "search"  # Hyperband derives a trial's bracket from it
STATES = {"running": TrialState.RUNNING, "done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL,
          "late": TrialState.FAIL}  # fmt: skip
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Trial(Struct):
    """One trial, as the checkpoint and the report hold it."""

    number: int
    parameters: dict[str, Value]
    state: Literal["running", "done", "pruned", "failed", "late"] = "running"
    values: tuple[float, ...] = ()  # one an objective
    excess: dict[str, float] = {}  # limit -> by how much it is overstepped; 0 or less for not
    reports: dict[int, float] = {}  # step -> what was reported then, for the pruner
    attributes: dict[str, Any] = {}  # Optuna's own
    job: str = ""  # that trains it
    model: str = ""  # digest
    measuring: str = ""  # the job that measures it
    measurement: Measurement | None = None  # by that job, not side by side with others
    why: str = ""  # of what failed or was given up

    @property
    def name(self) -> str:
        return f"trial-{self.number}"

    @property
    def feasible(self) -> bool:
        return self.state == "done" and all(by <= 0 for by in self.excess.values())


class Study:
    """The trials of one search, new or as an earlier attempt left them. Not thread-safe."""

    def __init__(self, search: Search, dataset: str, trials: Iterable[Trial] = ()) -> None:
        self.search, self.space = search, Space(search, dataset)
        _check(search)
        self._points = self.space.grid() if search.sampler == "grid" else []
        self.most = min(search.trials, len(self._points)) if self._points else search.trials
        self._study = optuna.create_study(
            study_name=NAME, directions=["maximize" if o == "accuracy" else "minimize" for o in search.objectives],
            sampler=self._sampler(0), pruner=_pruner(search))  # fmt: skip
        self.trials = list(trials)
        for trial in self.trials:
            self._study.add_trial(_frozen(trial, self.space))
        self._asked: dict[int, Asked] = {}

    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "running"]

    def request(self, trial: Trial) -> TrainRequest:
        return self.space.request(trial.parameters)

    def ask(self, count: int) -> list[Trial]:
        """Up to `count` further trials."""
        asked = []
        for _ in range(min(count, self.most - len(self.trials))):
            number = len(self.trials)
            self._study.sampler = self._sampler(number)
            if self._points:
                self._study.enqueue_trial({name: _scalar(value) for name, value in self._points[number].items()})
            suggested = self._study.ask()
            with warnings.catch_warnings():  # a sampler that can't draw a conditional dimension draws it at random, and says so
                warnings.simplefilter("ignore", UserWarning)
                parameters = self.space.parameters(_draw(suggested))
            self._asked[number] = suggested
            self.trials.append(Trial(number, parameters, attributes=self._attributes(number)))
            asked.append(self.trials[-1])
        return asked

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """Take what a trial has reached at `step`; whether it is to be given up."""
        if self.search.pruner == "none" or step in trial.reports:
            return False
        trial.reports = {**trial.reports, step: value}
        asked = self._trial(trial.number)
        asked.report(value, step)
        hopeless = asked.should_prune()
        trial.attributes = self._attributes(trial.number)
        return hopeless

    def tell(self, trial: Trial, state: Literal["done", "pruned", "failed", "late"], values: tuple[float, ...] = (),
             why: str = "") -> None:  # fmt: skip
        """Put an end to a trial; `values` in the order of the objectives, of one that is "done"."""
        trial.state, trial.values, trial.why = state, values, why
        asked = self._trial(trial.number)
        for limit, excess in trial.excess.items():
            asked.set_constraint(limit, excess)
        self._study.sampler = self._sampler(trial.number)
        self._study.tell(asked, values if state == "done" else None, STATES[state])
        trial.attributes = self._attributes(trial.number)

    def best(self, count: int) -> list[Trial]:
        """The best `count` trials within all limits; those of the Pareto front come first."""
        done = [trial for trial in self.trials if trial.feasible]
        signs = np.array([-1.0 if o == "accuracy" else 1.0 for o in self.search.objectives])
        costs = [tuple(signs * trial.values) for trial in done]
        beaten = [any(beats(other, own) for other in costs) for own in costs]
        order = sorted(range(len(done)), key=lambda i: (beaten[i], costs[i], i))
        return [done[i] for i in order[:count]]

    def _trial(self, number: int) -> Asked:
        """Optuna's own object, of this attempt or of an earlier one."""
        if number not in self._asked:
            self._asked[number] = Asked(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        return self._asked[number]

    def _attributes(self, number: int) -> dict[str, Any]:
        return dict(self._study.get_trials(deepcopy=False)[number].system_attrs)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence((self.search.seed, number)).generate_state(1)[0])
        return SAMPLERS[self.search.sampler](seed, any(d.only for d in self.search.space))


def _tpe(seed: int, conditional: bool) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=conditional, constant_liar=True)


SAMPLERS: dict[str, Callable[[int, bool], optuna.samplers.BaseSampler]] = {
    "tpe": _tpe,
    "gp": lambda seed, _: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
    "cmaes": lambda seed, _: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed, _: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed, _: optuna.samplers.RandomSampler(seed=seed),  # its points are enqueued, so that conditions hold
}


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    """Asynchronous successive halving is Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2020), algorithm 2."""
    match search.pruner:
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(search.train.epochs, 3), reduction_factor=3)
    return optuna.pruners.NopPruner()


def _draw(suggested: Asked) -> Callable[[str, Dimension, bool], Value]:
    def draw(name: str, dimension: Dimension, whole: bool) -> Value:
        value = suggested._suggest(name, distribution(dimension, whole))
        if dimension.values:
            return next(v for v in dimension.values if _scalar(v) == value)
        return value.item() if isinstance(value, np.generic) else value  # type: ignore[no-any-return]

    return draw


def distribution(dimension: Dimension, whole: bool) -> BaseDistribution:
    """The dimension in Optuna's terms."""
    if dimension.values:
        return CategoricalDistribution([_scalar(value) for value in dimension.values])
    if whole:
        return IntDistribution(round(dimension.low), round(dimension.high), dimension.log, round(dimension.step) or 1)
    return FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step or None)


def _scalar(value: Value) -> str | int | float | bool:
    """A value as Optuna takes it: it knows no lists."""
    return msgspec.json.encode(value).decode() if isinstance(value, tuple) else value


def _frozen(trial: Trial, space: Space) -> optuna.trial.FrozenTrial:
    state = STATES[trial.state]
    drawn = {name: _scalar(value) for name, value in trial.parameters.items()}
    return create_trial(
        state=state, values=list(trial.values) if state == TrialState.COMPLETE else None, params=drawn,
        distributions={name: distribution(space.dimensions[name], space.whole[name]) for name in drawn},
        system_attrs=trial.attributes, intermediate_values=trial.reports)  # fmt: skip


def _check(search: Search) -> None:
    for field in ("trials", "parallel", "finalists"):
        if not 1 <= getattr(search, field) <= 100_000:
            raise invalid(f"{field} is {getattr(search, field)}", "give a number from 1 to 100000")
    listed = ", ".join(search.objectives) or "none"
    if not search.objectives or len(set(search.objectives)) < len(search.objectives):
        raise invalid(f"objectives are {listed}", "give one or more different ones")
    if search.pruner != "none" and search.objectives != ("accuracy",):
        raise invalid(f"pruner {search.pruner!r} goes by accuracy alone, and the objectives are {listed}", 'set it to "none"')
    if len(search.objectives) > 1 and search.sampler == "cmaes":
        raise invalid(f"sampler 'cmaes' knows one objective, and they are {listed}", "take tpe, gp, random or grid")
    if search.seed < 0:
        raise invalid(f"seed is {search.seed}", "give one from 0")


def decoded(body: bytes) -> list[Trial]:
    """The trials of a checkpoint. ClientFault "invalid_checkpoint" if they are none."""
    try:
        return msgspec.json.decode(body, type=list[Trial])
    except msgspec.DecodeError as error:
        raise invalid_checkpoint("search.json: trials", error) from None
