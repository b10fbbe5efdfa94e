"""Gradients of a few tracked steps at the fixed point: ``phantom-K`` and ``jfb``."""

from dataclasses import dataclass
from typing import ClassVar

from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient, damped


@dataclass(frozen=True)
class Phantom(EquilibriumGradient):
    """K tracked damped steps from z* (Geng et al., arXiv 2111.05177)."""

    kind: ClassVar[str] = "phantom"
    counted: ClassVar[bool] = True

    def update_cost(self, forward, adjoint):
        return forward + 3 * self.steps, "solve + 3 K"

    def attach(self, f, anchor, state, layout, precision, record):
        state = damped(anchor, state, self.damping)
        for _ in range(self.steps - 1):
            state = damped(state, f(state), self.damping)
        return state


@dataclass(frozen=True)
class JacobianFree(EquilibriumGradient):
    """One tracked step, ``w = g`` (Fung et al., arXiv 2103.12803)."""

    kind: ClassVar[str] = "jfb"
    damped: ClassVar[bool] = False

    def update_cost(self, forward, adjoint):
        return forward + 3, "solve + 3"

    def attach(self, f, anchor, state, layout, precision, record):
        return state
