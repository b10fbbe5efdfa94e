"""Predictor–corrector steps: one more evaluation of the field at a predicted state.

Backward-Euler style: any explicit step predicts P, then ``y' = y + T F(t0 + T, P)``.

Adams pair: the increment of the previous block is a value that travels along the depth,

    P = y + h (3/2 F_l − 1/2 F_{l−1}),      y' = y + h/2 (F(P) + F_l),

and the first block, which has no predecessor, takes a step of Heun's method (the same with P = y + h F_l).

Sources: arXiv 2411.03042 (PCformer); Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*, III.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_implicit.solvers.coefficients import Combination
from fairseq_implicit.solvers.runge_kutta import (
    ExplicitConfig,
    ExplicitResult,
    recomputed,
    solve_explicit,
    solver_field,
    solver_state,
)
from fairseq_implicit.solvers.status import SolveResult
from fairseq_implicit.solvers.vector_field import VectorField


@dataclass(frozen=True)
class AdamsResult(SolveResult):
    """A solve's result with the increment ``F_l`` ``(batch, time, dim)`` that the next block needs."""

    increment: Tensor | None = None


def correct_by_backward_euler(
    f: VectorField, state: Tensor, prediction: Tensor, config: ExplicitConfig, t0: float, dtype: torch.dtype
) -> Tensor:
    """``state + T f(t0 + T, prediction)``, the field entered in ``dtype``; all states ``(batch, time, dim)``."""
    span = config.total_time
    evaluate = solver_field(f, config, dtype)

    def correct(state: Tensor, prediction: Tensor) -> Tensor:
        return torch.add(state, evaluate(t0 + span, prediction), alpha=span)

    step = recomputed(correct, config) if config.gradient == "checkpoint-step" else correct
    return step(state, prediction)


def solve_backward_euler_corrected(
    f: VectorField,
    x: Tensor,
    config: ExplicitConfig,
    combination: Combination | None = None,
    t0: float = 0.0,
    field_dtype: torch.dtype | None = None,
) -> ExplicitResult:
    """Predict by the explicit solve of ``config``, then ``y' = x + T f(t0 + T, P)``.

    One sweep of the fixed-point iteration for backward Euler, started at the explicit solution: the result has order 1
    whatever the predictor's order. Arguments and result as in ``solve_explicit``.
    """
    dtype = field_dtype or x.dtype
    predicted = solve_explicit(f, x, config, combination, t0, dtype)
    state = correct_by_backward_euler(f, solver_state(x, config), predicted.state, config, t0, dtype)
    return ExplicitResult(state, evaluations=predicted.evaluations + 1, weights=predicted.weights)


def solve_adams(
    f: VectorField,
    x: Tensor,
    config: ExplicitConfig,
    previous: Tensor | None = None,
    t0: float = 0.0,
    field_dtype: torch.dtype | None = None,
) -> AdamsResult:
    """One step of the AB2/AM2 pair over ``config.total_time``.

    Args:
        f: prepared field.
        x: state ``(batch, time, dim)``.
        config: one step; its scheme is Heun's, which starts the pair.
        previous: increment ``(batch, time, dim)`` of the previous block, at the same distance in time; ``None`` in the
            first block.
        t0: start time.
        field_dtype: dtype in which the field is entered; that of ``x`` by default.

    Raises:
        ValueError: ``config`` asks for several steps or for another starting scheme.
    """
    if config.steps != 1:
        raise ValueError(f"the Adams pair takes one step per block, not {config.steps}: set the steps to 1")
    if config.tableau.name != "heun2":
        raise ValueError(f"the Adams pair is started by scheme 'heun2', not by {config.scheme!r}: set the scheme to it")
    h = config.total_time
    evaluate = solver_field(f, config, field_dtype or x.dtype)

    def advance(state: Tensor, before: Tensor | None):
        increment = evaluate(t0, state)
        if before is None:
            predicted = torch.add(state, increment, alpha=h)
        else:
            predicted = torch.add(torch.add(state, increment, alpha=1.5 * h), before, alpha=-0.5 * h)
        corrected = torch.add(state, evaluate(t0 + h, predicted), alpha=0.5 * h)
        return torch.add(corrected, increment, alpha=0.5 * h), increment

    step = recomputed(advance, config) if config.gradient == "checkpoint-step" else advance
    state, increment = step(solver_state(x, config), previous)
    return AdamsResult(state, evaluations=2, increment=increment)
