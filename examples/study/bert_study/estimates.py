"""Means, spreads and paired differences over seeds, and the cost model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bert_study.logs import Record
from bert_study.plan import Comparison, Flags
from fairseq_implicit.solvers.gradients.names import parse_gradient


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over ``count`` seeds; the deviation of a single one is nan."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        values = list(values)
        if not values:
            return cls(math.nan, math.nan, 0)
        # numpy's deviation, unlike the standard library's, lets a nan through.
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), deviation, len(values))


@dataclass(frozen=True)
class Difference:
    """Paired difference of two models over the seeds that both ran, with a 95 % confidence interval (Student's t).

    Runs of one seed share the order of the data and all masks, so that pairing takes that noise out.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        if not self.count > 1:
            return "one seed: no interval"
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "not told apart"


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """``ours - theirs``, each by seed. The interval is nan with fewer than two seeds in common."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
    spread = Spread.of(differences)
    if spread.count < 2:
        return Difference(spread.mean, math.nan, math.nan, spread.count)
    half = float(stats.t.ppf(0.975, spread.count - 1)) * spread.deviation / math.sqrt(spread.count)
    return Difference(spread.mean, spread.mean - half, spread.mean + half, spread.count)


def goal_met(comparison: Comparison, difference: Difference, reference_loss: float) -> bool | None:
    """Whether a comparison's goal is reached; None where it has none or cannot be judged.

    ``below`` asks for an interval that lies below 0 altogether; ``within`` for a mean of at most the margin.
    """
    if comparison.goal is None or difference.count == 0:
        return None
    if comparison.goal == "within":
        return difference.mean <= comparison.margin * reference_loss
    return difference.high < 0 if difference.count > 1 else None


def update_cost(record: Record, flags: Flags, update: int) -> float:
    """Evaluations' worth of one update: an evaluation of the field counts 1, a product with its Jacobian 1, a backward
    pass through an evaluation 2.

    Args:
        record: metrics of the interval that ends at ``update``.
        flags: the run's.
    """
    forward = record.get("evaluations", math.nan)
    if "evaluation_budget" not in record:  # what only an equilibrium has
        return 3 * forward
    if update <= flags.get("deq-warmup-updates", 0):
        return 3 * forward  # unrolled
    # The damping does not change the cost, but reversible needs one below 1.
    gradient = parse_gradient(flags.get("deq-gradient", "ift"))
    return gradient.update_cost(forward, record.get("evaluations_backward", 0.0))[0]


def cumulative_cost(intervals: dict[int, Record], flags: Flags) -> dict[int, float]:
    """Evaluations' worth of all updates up to the end of each interval."""
    total, start, found = 0.0, 0, {}
    for update, record in sorted(intervals.items()):
        total += update_cost(record, flags, update) * (update - start)
        start = update
        found[update] = total
    return found


def floating_point_operations(cost: float, parameters: int, sets: int, tokens: int) -> float:
    """Of ``cost`` evaluations' worth on ``tokens`` tokens: one multiplication and one addition for every parameter of
    the set that an evaluation uses. Embeddings, head and the attention's products of positions are not counted."""
    return 2.0 * cost * tokens * parameters / sets
