"""The schedule of an equilibrium as a function of the update number."""

import pytest

from fairseq_implicit.depth.schedule import PhaseConfig, phase_at
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.reversible_iteration import ReversibleIteration
from fairseq_implicit.solvers.gradients.unrolled import Unrolled

SOLVER, GRADIENT = FixedPointConfig(max_iter=24, tol=1e-3), Implicit()


def names(config, updates, gradient=GRADIENT):
    return [phase_at(update, config, SOLVER, gradient).gradient.name for update in updates]


def test_unrolled_then_phantom_then_exact():
    config = PhaseConfig(warmup_updates=3, warmup_steps=2, phantom_updates=2, phantom_steps=5)
    assert names(config, range(7)) == ["bptt-2"] * 3 + ["phantom-5"] * 2 + ["ift"] * 2


def test_without_schedule_every_update_is_the_last_phase():
    phase = phase_at(0, PhaseConfig(), SOLVER, GRADIENT)
    assert (phase.solver, phase.gradient, phase.jacobian_weight) == (SOLVER, GRADIENT, 0.0)


def test_budget_ramps_linearly_and_tolerance_geometrically_after_the_warmup():
    config = PhaseConfig(warmup_updates=10, ramp_updates=20, start_max_iter=4, start_tol=1e-1)
    middle = phase_at(20, config, SOLVER, GRADIENT).solver
    assert phase_at(10, config, SOLVER, GRADIENT).solver.max_iter == 4
    assert phase_at(10, config, SOLVER, GRADIENT).solver.tol == pytest.approx(1e-1)
    assert middle.max_iter == 14 and middle.tol == pytest.approx(1e-2)
    assert phase_at(30, config, SOLVER, GRADIENT).solver == phase_at(99, config, SOLVER, GRADIENT).solver
    assert phase_at(99, config, SOLVER, GRADIENT).solver.tol == pytest.approx(1e-3)


def test_jitter_is_seeded_bounded_and_covers_its_range():
    config = PhaseConfig(budget_jitter=2, seed=7)
    budgets = [phase_at(update, config, SOLVER, GRADIENT).solver.max_iter for update in range(200)]
    assert set(budgets) == {22, 23, 24, 25, 26}
    assert budgets == [phase_at(update, config, SOLVER, GRADIENT).solver.max_iter for update in range(200)]
    other = PhaseConfig(budget_jitter=2, seed=8)
    assert budgets != [phase_at(update, other, SOLVER, GRADIENT).solver.max_iter for update in range(200)]


def test_the_penalty_is_drawn_at_its_frequency_and_grows():
    config = PhaseConfig(
        jacobian_weight=0.5, jacobian_frequency=0.3, jacobian_weight_step=0.1, jacobian_weight_interval=1000
    )
    weights = [phase_at(update, config, SOLVER, GRADIENT).jacobian_weight for update in range(2000)]
    assert 0.25 < sum(weight > 0 for weight in weights) / 2000 < 0.35
    assert {round(weight, 6) for weight in weights[:1000]} == {0.0, 0.5}
    assert {round(weight, 6) for weight in weights[1000:]} == {0.0, 0.6}


@pytest.mark.parametrize(
    "options, option",
    [
        ({"warmup_updates": -1}, "warmup_updates"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"phantom_steps": 0}, "phantom_steps"),
        ({"ramp_updates": 5}, "ramp_updates"),
        ({"start_max_iter": 5}, "start_max_iter"),
        ({"start_tol": 0.1}, "start_tol"),
        ({"ramp_updates": 5, "start_max_iter": 0}, "start_max_iter"),
        ({"ramp_updates": 5, "start_tol": -1.0}, "start_tol"),
        ({"jacobian_weight": -1.0}, "jacobian_weight"),
        ({"jacobian_frequency": 0.0}, "jacobian_frequency"),
        ({"jacobian_weight": 1.0, "jacobian_weight_step": 0.1}, "jacobian_weight_step"),
        ({"jacobian_weight_step": 0.1, "jacobian_weight_interval": 5}, "jacobian_weight_step"),
    ],
)
def test_impossible_options_are_named(options, option):
    with pytest.raises(OptionError) as caught:
        PhaseConfig(**options)
    assert caught.value.option == option


@pytest.mark.parametrize(
    "options, solver, gradient, option",
    [
        ({"ramp_updates": 5, "start_max_iter": 30}, SOLVER, GRADIENT, "start_max_iter"),
        ({"ramp_updates": 5, "start_tol": 1e-4}, SOLVER, GRADIENT, "start_tol"),
        ({"ramp_updates": 5, "start_tol": 1e-1}, FixedPointConfig(), GRADIENT, "start_tol"),
        ({"budget_jitter": 24}, SOLVER, GRADIENT, "budget_jitter"),
        ({"budget_jitter": 1}, SOLVER, Unrolled(4), "budget_jitter"),
        ({"phantom_updates": 5}, SOLVER, Unrolled(4), "phantom_updates"),
        ({"phantom_updates": 5}, SOLVER, ReversibleIteration(damping=0.5), "phantom_updates"),
    ],
)
def test_schedules_that_contradict_their_end_are_named(options, solver, gradient, option):
    with pytest.raises(OptionError) as caught:
        PhaseConfig(**options).check(solver, gradient)
    assert caught.value.option == option
