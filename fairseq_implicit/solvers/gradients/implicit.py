"""``ift``: the exact gradient, by the implicit function theorem."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairseq_implicit.options import OptionError, named
from fairseq_implicit.solvers.fixed_point import solve
from fairseq_implicit.solvers.gradients.adjoint_equation import AdjointEquation, neumann_sum
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient


@dataclass(frozen=True)
class Implicit(EquilibriumGradient):
    """Solves ``w = Jᵀw + g`` (J the Jacobian of f at z*, g the incoming gradient).

    Attributes:
        fallback_terms: Neumann terms used for samples whose adjoint stalls.
        fallback_residual: relative adjoint residual from which an unconverged sample counts as stalled. Below 0.1 the
            unfinished solution points closer to the exact gradient than four Neumann terms; above it no longer.
    """

    kind: ClassVar[str] = "ift"
    recomputable: ClassVar[bool] = False
    damped: ClassVar[bool] = False

    fallback_terms: int = 4
    fallback_residual: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.fallback_terms < 1:
            raise OptionError("fallback_terms", f"{self.fallback_terms} Neumann terms make no gradient; give 1.")

    def update_cost(self, forward, adjoint):
        return forward + 1 + adjoint + 2, "solve + 1 + adjoint + 2"

    def check_precision(self, dtype: torch.dtype) -> None:
        with named("adjoint_{}".format):
            self.adjoint.tolerance_for(dtype)

    def attach(self, f, anchor, state, layout, precision, record):
        return AdjointEquation(state, anchor, layout, precision, record).solved_by(self._solve)

    def _solve(self, equation: AdjointEquation, g: Tensor) -> Tensor:
        layout, record, size = equation.layout, equation.record, equation.layout.norm(g)
        result = solve(
            lambda w: equation.vjp(w) + g,
            g,
            self.adjoint,
            layout,
            scale=size,
            precision=equation.precision,
            linear=True,
        )
        # A gradient that arrives non-finite leaves non-finite: the trainer must see the overflow.
        stalled = ~result.converged & size.isfinite() & ~(result.residual <= self.fallback_residual)
        record.evaluations = result.evaluations
        record.residual = result.residual
        record.fallbacks = stalled.sum()
        if not stalled.any():
            return result.state
        approximate = neumann_sum(equation.vjp, g, self.fallback_terms)
        finite = approximate.flatten(1).isfinite().all(1)[:, None, None]
        approximate = torch.where(finite, approximate, g)
        return torch.where(stalled[:, None, None], approximate, result.state)
