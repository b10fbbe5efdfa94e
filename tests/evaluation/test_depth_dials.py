"""The dials of depth, on checkpoints that fairseq-train has just written: the rows that the commands print and draw."""

import itertools
from dataclasses import replace

import pytest
import torch

from fairseq_implicit.evaluation.checkpoints import open_checkpoint, stored
from fairseq_implicit.evaluation.depth_dials import Dial, budget_rows, depth_rows, settings
from fairseq_implicit.evaluation.masked_lm import Blocks, batches
from fairseq_implicit.models.ode_bert import OdeBertConfig
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig


def turned(path, blocks, **positions):
    """{label: averages} of a dial that has no other positions than those given."""
    dial = Dial(**{"schemes": [], "steps": [], "splits": [1], "pairs": [], "tolerances": [], **positions})
    rows = depth_rows(path, blocks, settings(stored(path)["cfg"]["model"], dial))
    return {setting.label: found for setting, found in rows}


def test_dial_of_a_stack(depth_checkpoints, toy_data):
    found = turned(
        depth_checkpoints["ode"], Blocks(toy_data, limit=2), schemes=["euler", "rk2"], steps=[1, 2], splits=[1, 2],
        pairs=["bosh3"], tolerances=["1e-2"],
    )  # fmt: skip
    assert list(found)[0] == "as trained" and len(found) == 10
    assert found["as trained"].loss == found["rk2, 1 step"].loss
    labels = [f"{scheme}, {steps}" for scheme in ("euler", "rk2") for steps in ("1 step", "2 steps")]
    assert [found[label].statistics["evaluations"] for label in labels] == [2, 4, 4, 8]
    assert found["as trained"].statistics["evaluations"] == 4
    # Half the time per block, or twice the steps: the same solve, of twice the cost.
    halves, twice = found["rk2, layers cut in 2, 1 step"], found["rk2, 2 steps"]
    assert halves.loss == pytest.approx(twice.loss, abs=2e-4)
    assert halves.statistics["evaluations"] == twice.statistics["evaluations"]
    assert found["bosh3, tolerance 1e-2"].statistics["evaluations"] == 8


def test_what_trained_a_loop_stands_in_no_position_of_its_dial():
    trained = OdeBertConfig(
        encoder_layers=1, ode_linear_part="diagonal", ode_scheme="etd2", ode_steps=4, ode_random_depth=3.0,
        ode_random_depth_max=9, ode_random_depth_gradient=2,
    )  # fmt: skip
    dial = Dial(["etd4", "rk4"], [1, 8], [1], ["bosh3"], ["1e-2"])
    positions = settings({**vars(trained), "_name": "ode_bert"}, dial)
    solvers = [replace(trained, **position.overrides).check().solver for position in positions]
    assert [(solver.scheme, solver.adaptive) for solver in solvers] == [
        *[("etd2", False), ("etd4", False), ("etd4", False), ("rk4", False), ("rk4", False), ("bosh3", True)]
    ]
    assert [solver.steps for solver in solvers[:5]] == [4, 1, 8, 1, 8]


def test_dial_of_a_continuum(depth_checkpoints, toy_data):
    found = turned(
        depth_checkpoints["neural"], Blocks(toy_data, limit=2), schemes=["rk4"], steps=[1, 3], pairs=["bosh3", "tsit5"],
        tolerances=["1e-3"],
    )  # fmt: skip
    assert found["rk4, 1 step"].statistics["evaluations"] == 4
    assert found["rk4, 3 steps"].statistics["evaluations"] == 12
    assert found["bosh3, tolerance 1e-3"].loss == pytest.approx(found["rk4, 3 steps"].loss, abs=1e-3)
    assert len(found) == 5


def test_dial_of_an_equilibrium(depth_checkpoints, toy_data):
    solvers = [FixedPointConfig(method, budget, 1e-5) for method in METHODS for budget in (1, 2, 12)]
    rows = list(budget_rows(depth_checkpoints["deq"], Blocks(toy_data, limit=2), solvers))
    assert len(rows) == 10 and rows[0][:2] == (None, 30)
    trained = rows[0][2]
    found = {(solver.method, budget): row for solver, budget, row in rows[1:]}
    for solver in ("picard", "anderson", "broyden"):
        residuals = [found[solver, budget].statistics["residual"] for budget in (1, 2, 12)]
        assert residuals[0] > residuals[1] > residuals[2]
        assert found[solver, 12].loss == pytest.approx(trained.loss, abs=2e-3)


def test_a_model_without_a_dial_is_refused(depth_checkpoints, toy_data):
    with pytest.raises(ValueError, match="holds deq_bert_tiny: the dial turns ode_bert and neural_ode_bert only"):
        turned(depth_checkpoints["deq"], Blocks(toy_data))
    with pytest.raises(ValueError, match="holds ode_bert_rk2_tiny, which has no equilibrium"):
        list(budget_rows(depth_checkpoints["ode"], Blocks(toy_data, limit=1), []))


def test_a_few_batches_are_spread_over_the_subset(depth_checkpoints, toy_data):
    """Batches go by length: the first ones alone would be the shortest blocks."""
    task = open_checkpoint(depth_checkpoints["ode"], toy_data).task
    everything = Blocks(toy_data, batch_size=1)
    ids = [sample["id"].tolist() for sample in batches(task, everything)]
    assert len(ids) > 8 and sorted(sum(ids, [])) == list(range(len(task.dataset("valid"))))
    few = [sample["id"].tolist() for sample in batches(task, everything._replace(limit=4))]
    places = [ids.index(one) for one in few]
    steps = [later - earlier for earlier, later in itertools.pairwise(places)]
    assert len(places) == 4 and max(steps) - min(steps) <= 1
    assert places[0] >= len(ids) // 8 and places[-1] >= 3 * len(ids) // 4
    whole = batches(task, everything)[places[1]]["net_input"]["src_tokens"]
    assert torch.equal(whole, batches(task, everything._replace(limit=4))[1]["net_input"]["src_tokens"])
