"""What is taken from the folders of runs: learning rates, losses, failures, divergence."""

import math

import pytest
from bert_study import results
from bert_study.plan import Grid, Model, Plan
from bert_study.training import run_folder


@pytest.fixture
def plan():
    shape = {"encoder-layers": 2, "encoder-embed-dim": 8, "encoder-ffn-embed-dim": 16}
    models = {name: Model(name, name, "ode_bert") for name in ("one", "two", "three")}
    training = {"tokens-per-sample": 10, "batch-size": 3, "update-freq": 2}
    return Plan(
        "own", "about", 64, shape, training, 20, 2, (1, 2), Grid((0.1, 0.2, 0.3), 4), models, (), "one"
    )  # fmt: skip


def write(out, run, *bits, finished=True, failed=None):
    """A run's folder whose validations logged these losses, 10 updates apart."""
    import os

    folder = run_folder(str(out), run)
    os.makedirs(folder)
    with open(os.path.join(folder, "train.log"), "w") as log:
        for number, loss in enumerate(bits, 1):
            numbers = f'"valid_num_updates": "{10 * number}", "valid_loss": "{loss}", "valid_accuracy": "5"'
            log.write(f"2026-01-01 00:00:00 | INFO | valid | {{{numbers}}}\n")
    if finished:
        open(os.path.join(folder, "finished"), "w").close()
    if failed:
        with open(os.path.join(folder, "failed"), "w") as file:
            file.write(failed)


def test_the_best_rate_of_a_complete_grid(plan, tmp_path):
    losses = {"one": (3.0, 2.0, 2.5), "two": (3.0, math.nan, None), "three": (2.0, 3.0)}
    for run in plan.trials():
        place = plan.grid.rates.index(run.rate)
        if place < len(losses[run.model.name]):
            loss = losses[run.model.name][place]
            if loss is None:
                write(tmp_path, run, finished=False, failed="RuntimeError: out of something")
            else:
                write(tmp_path, run, loss)
    grid = results.grid_losses(plan, str(tmp_path))
    assert grid["one"] == pytest.approx({0.1: 3 * math.log(2), 0.2: 2 * math.log(2), 0.3: 2.5 * math.log(2)})
    assert grid["two"][0.2] == grid["two"][0.3] == math.inf  # no number, and failed
    # The third has not tried all rates yet: its choice must wait.
    assert results.best_rates(plan, grid) == {"one": 0.2, "two": 0.1}
    assert results.failures(plan, {"one": 0.2}, str(tmp_path)) == {
        "two/grid-lr0.3": "RuntimeError: out of something"
    }  # fmt: skip


def test_a_model_that_fails_at_every_rate_has_none(plan, tmp_path):
    for run in plan.trials():
        write(tmp_path, run, finished=False, failed="FloatingPointError: nan")
    assert results.best_rates(plan, results.grid_losses(plan, str(tmp_path))) == {}


def test_final_runs_by_seed(plan, tmp_path):
    for run, bits in zip(
        plan.finals({"one": 0.1, "two": 0.2}), ((4.0, 3.0), (4.0, 4.5), (5.0, 3.5), (4.0, math.nan)), strict=True
    ):
        write(tmp_path, run, *bits)
    found = results.results(plan, {"one": 0.1, "two": 0.2}, str(tmp_path))
    assert list(found) == ["one", "two"]
    assert found["one"].losses == pytest.approx({1: 3 * math.log(2), 2: 3.5 * math.log(2)})
    assert found["one"].by_update("loss")[10].mean == pytest.approx(4.5 * math.log(2))
    assert found["one"].tokens_per_update == 60
    assert [run.diverged for run in found["one"].runs] == [False, False]
    assert [run.diverged for run in found["two"].runs] == [True, True]  # above its own best; no number
