"""Solves in one line: the solver, what is solved and over which span."""

from dataclasses import dataclass, replace
from typing import Any

from fairseq_implicit.layout import UNPADDED
from fairseq_implicit.solvers.gradients.continuous_adjoint import ContinuousAdjoint
from fairseq_implicit.solvers.gradients.trajectory import CheckpointStep
from fairseq_implicit.solvers.names import GRADIENTS
from fairseq_implicit.solvers.reversible import ReversibleHeun
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Keep, Span


@dataclass(frozen=True)
class Explicit:
    """Fixed steps over a time; the gradient by its name."""

    scheme: str = "euler"
    steps: int = 1
    total_time: float = 1.0
    gradient: str = "autograd"
    state_float32: bool = False
    residual_in_field: bool = False
    kind: Any = RungeKutta

    @property
    def solver(self):
        gradient = GRADIENTS[self.gradient]
        own = {"residual_in_field": True} if self.residual_in_field else {}
        return self.kind(self.scheme, self.steps, gradient, self.state_float32, **own)


def solve_explicit(f, x, config, combination=None, t0=0.0, field_dtype=None, **options):
    span = Span(t0, config.total_time)
    return config.solver.solve(f, x, span, UNPADDED, dtype=field_dtype, combination=combination, **options)


def solve_adaptive(
    f, y, duration, solver, layout=UNPADDED, start=0.0, keep_states=False, penalties=False, recompute=False, **options
):
    if recompute:
        solver = replace(solver, gradient=CheckpointStep())
    return solver.solve(f, y, Span(start, duration), layout, keep=Keep(keep_states, penalties), **options)


def solve_adjoint(f, y, duration, solver, parameters, layout=UNPADDED, start=0.0, record=None, pieces=()):
    solver = replace(solver, gradient=ContinuousAdjoint())
    return solver.solve(f, y, Span(start, duration), layout, parameters=parameters, record=record, pieces=pieces)


def solve_reversible(f, y, duration, steps, parameters=(), start=0.0):
    return ReversibleHeun(steps).solve(f, y, Span(start, duration), parameters=parameters)
