"""``bptt-K``: no solver, K tracked steps from the start, a weight-tied K-layer network."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fairseq_implicit.layout import UNPADDED
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.equilibrium import Equilibrium, EquilibriumGradient, damped, verdict
from fairseq_implicit.solvers.precision import field_dtype


@dataclass(frozen=True)
class Unrolled(EquilibriumGradient):
    """Backpropagation through all K steps."""

    kind: ClassVar[str] = "bptt"
    counted: ClassVar[bool] = True
    uses_solver: ClassVar[bool] = False
    needs_equilibrium: ClassVar[bool] = False

    def budget(self, solver: FixedPointConfig) -> int:
        return self.steps

    def update_cost(self, forward, adjoint):
        return 3 * self.steps, "3 K"

    def equilibrium(
        self, f, z0, solver, layout=UNPADDED, record=None, depends_on=(), sources=None, capture=()
    ) -> Equilibrium:
        if record is not None:
            record.evaluations = self.steps if torch.is_grad_enabled() else 0
        z, iterates = z0, {}
        for count in range(1, self.steps + 1):
            f_z = f(z)
            before, z = z, damped(z, f_z, self.damping)
            if count in capture:
                iterates[count] = z
        for count in set(capture) - iterates.keys():
            iterates[count] = z
        result = verdict(before, f_z, self.steps, solver, layout, z, field_dtype(z0))
        return Equilibrium(z, result, None, iterates)
