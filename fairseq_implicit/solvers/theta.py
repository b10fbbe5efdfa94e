"""Implicit one-step schemes on the fixed-point solvers and their implicit gradient.

=================  =====================================================  =====================
theta              ``z = x + h [(1 − θ) f(t, x) + θ f(t + h, z)]``        order 1; 2 at θ = 1/2
implicit midpoint  ``z = x + h f(t + h/2, (x + z)/2)``                    order 2, symmetric
=================  =====================================================  =====================

θ = 0 is the ordinary residual layer, θ = 1/2 the trapezoid, θ = 1 backward Euler. With h = 1 backward Euler is a
deep equilibrium ``z = x + f(z)`` whose input is injected by addition.

Source: Hairer and Wanner, *Solving Ordinary Differential Equations II*, §IV.3 and §IV.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.fixed_point import FixedPointConfig
from fairseq_implicit.solvers.gradients.equilibrium import Equilibrium, EquilibriumGradient
from fairseq_implicit.solvers.gradients.implicit import Implicit
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.solver import Solution, Solver, Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import VectorField

SCHEMES = ("theta", "implicit-midpoint")


@dataclass(frozen=True)
class Theta(Solver):
    """An implicit scheme in equal steps.

    Attributes:
        scheme: ``theta`` or ``implicit-midpoint``.
        theta: θ in [0, 1]; the midpoint rule has none.
        steps: number of sub-steps, at least 1.
        solver: root solver of each step.
        gradient: gradient of each step.

    Raises:
        OptionError: an option is out of range, or the gradient solves no equation.
    """

    implicit: ClassVar[bool] = True
    keeps: ClassVar[bool] = False

    scheme: str = "theta"
    theta: float = 1.0
    steps: int = 1
    solver: FixedPointConfig = FixedPointConfig()
    gradient: EquilibriumGradient = Implicit()

    def __post_init__(self):
        check_choice("scheme", self.scheme, SCHEMES)
        if not 0.0 <= self.theta <= 1.0:
            raise OptionError("theta", f"{self.theta} is outside [0, 1] (0 the explicit layer, 1 backward Euler).")
        if self.steps < 1:
            raise OptionError("steps", f"{self.steps} steps per solve; give at least 1.")
        if self.solver.compact:
            raise OptionError("compact", "an implicit step keeps all samples of its batch; leave it out.")
        if self.gradient.reconstructs:
            raise OptionError("gradient", f"{self.gradient.name} solves no implicit step; take ift or phantom-K.")

    @property
    def explicit(self) -> bool:
        """Whether it solves nothing after all."""
        return self.scheme == "theta" and self.theta == 0.0

    def update_cost(self, forward, backward, solves):
        if self.explicit:
            return 3 * forward
        steps = solves * self.steps
        explicit = steps if self.scheme == "theta" and self.theta < 1.0 else 0  # an evaluation of each step
        equations = self.gradient.update_cost((forward - explicit) / steps, backward / steps)[0] * steps
        return equations + 3 * explicit

    def plain_layers(self, span: Span) -> int:
        return self.steps if self.explicit and span.length == self.steps else 0

    def solve(
        self,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout: Layout = UNPADDED,
        *,
        parameters: Sequence[Tensor] = (),
        record: AdjointRecord | None = None,
        records: list[AdjointRecord] | None = None,
        **options: Any,
    ) -> Solution:
        """See :meth:`Solver.solve`.

        Args:
            parameters, record, options: not needed: each step has a gradient, and a record, of its own.
            records: receives one :class:`AdjointRecord` per implicit step, filled by the backward pass.

        Returns:
            The state; evaluations per sample, of the root solver and the explicit half (an ``int`` for θ = 0); the
            worst residual and the worst status of the steps.
        """
        h = span.length / self.steps
        if self.explicit:
            z = x
            for step in range(self.steps):
                z = torch.add(z, f(span.start + step * h, z), alpha=h)
            return Solution(z, self.steps, field_calls=self.steps)

        z, status = x, Status.COMPLETED
        evaluations: int | Tensor = 0
        residual: Tensor | None = None
        converged: Tensor | None = None
        reused = 0
        for step in range(self.steps):
            own = AdjointRecord()
            solved, explicit = _implicit_step(f, z, span.start + step * h, h, self, layout, own)
            if records is not None:
                records.append(own)
            z = solved.state
            evaluations = evaluations + solved.solve.evaluations + explicit
            residual = solved.solve.residual if residual is None else torch.maximum(residual, solved.solve.residual)
            converged = solved.solve.converged if converged is None else converged & solved.solve.converged
            status = Status.worst((status, solved.solve.status))
            reused += int(solved.reused)
        return Solution(z, evaluations, residual, status, converged=converged, reused=reused)


def _implicit_step(
    f: VectorField, x: Tensor, t: float, h: float, config: Theta, layout: Layout, record: AdjointRecord
) -> tuple[Equilibrium, int]:
    """One step: the equilibrium and the evaluations spent on its explicit half."""
    if config.scheme == "implicit-midpoint":

        def midpoint_map(z: Tensor) -> Tensor:
            return torch.add(x, f(t + h / 2, (x + z) / 2), alpha=h)

        return config.gradient.equilibrium(midpoint_map, x, config.solver, layout, record), 0

    theta = config.theta
    base, start, explicit = x, x, 0
    if theta < 1.0:
        increment = f(t, x)
        base = torch.add(x, increment, alpha=h * (1 - theta))
        start = torch.add(x, increment, alpha=h)  # Euler's answer costs nothing here and is close
        explicit = 1

    def step_map(z: Tensor) -> Tensor:
        return torch.add(base, f(t + h, z), alpha=h * theta)

    # Unrolled steps are differentiated from their start on; a solve forgets where it began.
    if config.gradient.uses_solver:
        start = start.detach()
    return config.gradient.equilibrium(step_map, start, config.solver, layout, record), explicit
