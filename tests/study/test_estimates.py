"""Curves out of logs, paired differences and the cost model, against scipy and against sums by hand."""

import math

import numpy as np
import pytest
from bert_study.estimates import (
    Spread,
    cumulative_cost,
    floating_point_operations,
    goal_met,
    paired_difference,
    update_cost,
)
from bert_study.logs import last_sentence, read_curve
from bert_study.plan import Comparison
from scipy import stats


def line(tag, **values):
    numbers = ", ".join(f'"{name}": "{value}"' for name, value in values.items())
    return f"2026-01-01 00:00:00 | INFO | {tag} | {{{numbers}}}\n"


@pytest.fixture
def log(tmp_path):
    """A run that was killed while it wrote, and resumed from update 10, for a time under an earlier version's names."""
    path = tmp_path / "train.log"
    path.write_text(
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | Namespace()\n"
        + line("train_inner", num_updates=10, gnorm=2, evaluations=2)
        + line("valid", valid_num_updates=10, valid_loss=4.0, valid_accuracy=10)
        + line("train_inner", num_updates=20, gnorm=9, evaluations=9)
        + line("valid", valid_num_updates=20, valid_loss=9.0, valid_accuracy=1)
        + line("train_inner", num_updates=30, gnorm=1)[:50]
        + "\n"
        + line("train_inner", num_updates=20, gnorm=4, evaluations_forward=4)
        + line("valid", valid_num_updates=20, valid_loss=3.0, valid_accuracy=20)
        + line("train_inner", num_updates=40, gnorm=6, evaluations=1)
        + line("valid", valid_num_updates=40, valid_loss=2.0, valid_accuracy=30)
        + "ValueError: the end\n\n",
        encoding="utf-8",
    )
    return str(path)


def test_curve_of_a_resumed_run(log):
    curve = read_curve(log)
    bit = math.log(2)
    assert {update: record["loss"] for update, record in curve.validations.items()} == pytest.approx(
        {10: 4 * bit, 20: 3 * bit, 40: 2 * bit}
    )
    assert curve.last["accuracy"] == 30
    # Weighted by the length of the intervals: 10 updates, 10 and 20.
    assert curve.mean("gnorm") == pytest.approx((2 * 10 + 4 * 10 + 6 * 20) / 40)
    assert curve.mean("evaluations", after=10) == pytest.approx((4 * 10 + 1 * 20) / 30)
    assert math.isnan(curve.mean("absent"))
    assert last_sentence(log) == "ValueError: the end"


def test_crossing_of_a_level(log):
    curve = read_curve(log)
    bit = math.log(2)
    assert curve.first_below(2.5 * bit) == pytest.approx(30)
    assert curve.first_below(4.5 * bit) == 10
    assert math.isnan(curve.first_below(1.0 * bit))


def test_paired_difference_is_students():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(3.0, 0.1, 5), rng.normal(3.1, 0.1, 5)
    found = paired_difference(dict(enumerate(ours)), {**dict(enumerate(theirs)), 99: 0.0})
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.count) == pytest.approx((np.mean(ours - theirs), low, high, 5))


def test_verdicts():
    seeds = range(4)
    lower = paired_difference({s: 1.0 + s for s in seeds}, {s: 1.5 + s + 0.01 * s for s in seeds})
    unclear = paired_difference({s: 1.0 + s for s in seeds}, {s: 1.0 + s + 0.1 * (-1) ** s for s in seeds})
    single = paired_difference({1: 1.0}, {1: 2.0})
    assert (lower.verdict, unclear.verdict) == ("lower", "not told apart")
    assert single.mean == -1.0 and math.isnan(single.low) and single.verdict == "one seed: no interval"
    below, within = Comparison("a", "b", "", "below"), Comparison("a", "b", "", "within", 0.01)
    assert goal_met(below, lower, 1.5) is True and goal_met(below, unclear, 1.5) is False
    assert goal_met(below, single, 1.5) is None  # one seed shows nothing
    above = paired_difference({s: 1.02 for s in seeds}, {s: 1.0 for s in seeds})
    assert goal_met(within, above, 1.0) is False and goal_met(within, above, 3.0) is True
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3)
    assert math.isnan(Spread.of([1.0, math.nan]).mean) and math.isnan(Spread.of([1.0, math.nan]).deviation)


def test_cost_model():
    """An evaluation 1, a product with the Jacobian 1, a full backward pass 2."""
    stack = {"evaluations": 8.0}
    cell = {"evaluations": 12.0, "evaluations_backward": 12.0, "evaluation_budget": 30.0}
    assert update_cost(stack, {}, 5) == 8 * (1 + 2)
    assert update_cost(cell, {}, 5) == 12 + 1 + 12 + 2
    assert update_cost(cell, {"deq-gradient": "phantom-4"}, 5) == 12 + 4 * 3
    assert update_cost({**cell, "evaluations_backward": 0.0}, {"deq-gradient": "bptt-12"}, 5) == 12 * 3
    assert update_cost(cell, {"deq-gradient": "jfb"}, 5) == 12 + 3
    assert update_cost(cell, {"deq-gradient": "reversible"}, 5) == 4 * 12
    warm = {"evaluations": 4.0, "evaluations_backward": 0.0, "evaluation_budget": 4.0}
    flags = {"deq-warmup-updates": 10}
    assert cumulative_cost({10: warm, 15: cell}, flags) == {10: 10 * 12.0, 15: 10 * 12.0 + 5 * 27.0}
    # Three layers of 100 parameters, an evaluation of each and the way back, on 7 tokens.
    assert floating_point_operations(9.0, 300, 3, 7) == 2 * 9 * 100 * 7
