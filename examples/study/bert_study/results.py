"""Everything a report needs, gathered from the folders of a study."""

import math
import os
from dataclasses import dataclass

from bert_study.estimates import Spread, cumulative_cost, floating_point_operations
from bert_study.logs import Curve, read_curve
from bert_study.plan import Flags, Model, Plan, Run
from bert_study.training import failure, is_finished, run_folder

DIVERGED_MARGIN = 0.05  # nats


@dataclass(frozen=True)
class Text:
    """Nats per token of the validation text, and the training tokens."""

    unigram: float
    bigram: float
    tokens: int

    @property
    def plateau(self) -> float:
        """The loss at which a run counts as off the plateau: half of the way from the unigram to the bigram entropy."""
        return (self.unigram + self.bigram) / 2


@dataclass(frozen=True)
class FinalRun:
    """One finished run of the comparison."""

    run: Run
    flags: Flags
    curve: Curve

    @property
    def loss(self) -> float:
        return self.curve.last["loss"]

    @property
    def steady(self) -> int:
        """The update after which a schedule's warm-up is over."""
        return int(self.flags.get("deq-warmup-updates", 0))

    @property
    def diverged(self) -> bool:
        """A loss that is no number, or that ends above its own best by a margin."""
        best = min(record["loss"] for record in self.curve.validations.values())
        return not self.loss <= best + DIVERGED_MARGIN


@dataclass(frozen=True)
class ModelResult:
    """A model's runs, by seed."""

    model: Model
    rate: float
    runs: tuple[FinalRun, ...]
    sets: int
    tokens_per_update: int

    @property
    def losses(self) -> dict[int, float]:
        return {found.run.seed: found.loss for found in self.runs}

    def spread(self, quantity) -> Spread:
        """Of a function of a run, over the seeds."""
        return Spread.of([quantity(found) for found in self.runs])

    def by_update(self, metric: str) -> dict[int, Spread]:
        """A metric of the validations that all seeds have."""
        updates = sorted(set.intersection(*(set(found.curve.validations) for found in self.runs)))
        return {
            update: Spread.of([found.curve.validations[update][metric] for found in self.runs]) for update in updates
        }

    def operations_by_update(self, parameters: int) -> dict[int, float]:
        """Floating-point operations of the depth up to each logged update, mean over the seeds."""
        curves = [cumulative_cost(found.curve.intervals, found.flags) for found in self.runs]
        updates = sorted(set.intersection(*(set(curve) for curve in curves)))
        return {
            update: floating_point_operations(
                sum(curve[update] for curve in curves) / len(curves), parameters, self.sets, self.tokens_per_update
            )
            for update in updates
        }


def grid_losses(plan: Plan, out: str) -> dict[str, dict[float, float]]:
    """The last validation loss of every trial that ended, by model and rate; inf where it failed or is no number."""
    found: dict[str, dict[float, float]] = {}
    for run in plan.trials():
        loss = math.nan
        if is_finished(out, run):
            loss = _curve(out, run).last["loss"]
        elif failure(out, run) is None:
            continue
        found.setdefault(run.model.name, {})[run.rate] = loss if math.isfinite(loss) else math.inf
    return found


def best_rates(plan: Plan, losses: dict[str, dict[float, float]]) -> dict[str, float]:
    """The rate of the lowest loss, for every model whose grid is complete and has a finite loss; untried ones, too."""
    if not plan.grid.updates:
        return dict.fromkeys(plan.models, plan.grid.rates[0])
    return {
        name: min(by_rate, key=by_rate.get)
        for name, by_rate in losses.items()
        if len(by_rate) == len(plan.grid.rates) and math.isfinite(min(by_rate.values()))
    }


def failures(plan: Plan, rates: dict[str, float], out: str) -> dict[str, str]:
    """The sentences of the runs that failed, by name."""
    found = {run.name: failure(out, run) for run in plan.trials() + plan.finals(rates)}
    return {name: sentence for name, sentence in found.items() if sentence is not None}


def results(plan: Plan, rates: dict[str, float], out: str) -> dict[str, ModelResult]:
    """Every model with at least one finished run."""
    by_model: dict[str, list[FinalRun]] = {}
    for run in plan.finals(rates):
        if is_finished(out, run):
            by_model.setdefault(run.model.name, []).append(FinalRun(run, plan.flags(run), _curve(out, run)))
    tokens = plan.training["tokens-per-sample"] * plan.training["batch-size"] * plan.training.get("update-freq", 1)
    return {
        name: ModelResult(model, rates[name], tuple(by_model[name]), plan.evaluated_sets(model), tokens)
        for name, model in plan.models.items()
        if name in by_model
    }


def first_runs(found: dict[str, ModelResult]) -> dict[str, Run]:
    """One finished run of each model, to measure."""
    return {name: result.runs[0].run for name, result in found.items()}


def text_of(data: str) -> Text:
    """Entropies and size of a data folder."""
    from fairseq_implicit.evaluation.entropies import folder_entropies
    from fairseq_implicit.text.token_files import MappedTokens

    entropies = folder_entropies(data)
    return Text(entropies.unigram, entropies.bigram, MappedTokens(os.path.join(data, "train")).token_count)


def _curve(out: str, run: Run) -> Curve:
    return read_curve(os.path.join(run_folder(out, run), "train.log"))
