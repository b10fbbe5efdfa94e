"""``neumann-K``: the first K terms of the adjoint's series, K − 1 products on one graph."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fairseq_implicit.solvers.gradients.adjoint_equation import AdjointEquation, neumann_sum
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient


@dataclass(frozen=True)
class Neumann(EquilibriumGradient):
    """The first K terms of ``w = Σ (Jᵀ)ⁱ g``."""

    kind: ClassVar[str] = "neumann"
    counted: ClassVar[bool] = True
    recomputable: ClassVar[bool] = False

    def update_cost(self, forward, adjoint):
        return forward + 1 + self.steps - 1 + 2, "solve + 1 + (K - 1) + 2"

    def attach(self, f, anchor, state, layout, precision, record):
        return AdjointEquation(state, anchor, layout, precision, record).solved_by(self._sum)

    def _sum(self, equation: AdjointEquation, g: Tensor) -> Tensor:
        equation.record.evaluations = self.steps - 1
        return neumann_sum(equation.vjp, g, self.steps, self.damping)
