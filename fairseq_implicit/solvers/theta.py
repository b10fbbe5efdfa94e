"""Implicit one-step schemes on the fixed-point solvers and their implicit gradient.

=================  =====================================================  =====================
theta              ``z = x + h [(1 − θ) f(t, x) + θ f(t + h, z)]``        order 1; 2 at θ = 1/2
implicit midpoint  ``z = x + h f(t + h/2, (x + z)/2)``                    order 2, symmetric
=================  =====================================================  =====================

θ = 0 is the ordinary residual layer, θ = 1/2 the trapezoid, θ = 1 backward Euler. With h = 1 backward Euler is a
deep equilibrium ``z = x + f(z)`` whose input is injected by addition.

Source: Hairer and Wanner, *Solving Ordinary Differential Equations II*, §IV.3 and §IV.8.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.fixed_point import FixedPointConfig, OptionError
from fairseq_implicit.solvers.implicit_grad import AdjointRecord, Equilibrium, GradientConfig, equilibrium
from fairseq_implicit.solvers.status import SolveResult, Status
from fairseq_implicit.solvers.vector_field import VectorField

SCHEMES = ("theta", "implicit-midpoint")


@dataclass(frozen=True)
class ThetaConfig:
    """An implicit solve: ``steps`` steps of size ``total_time / steps``.

    Attributes:
        scheme: ``theta`` or ``implicit-midpoint``.
        theta: θ in [0, 1]; ignored by the midpoint rule.
        steps: number of sub-steps, at least 1.
        total_time: length of the interval, positive.
        solver: root solver of each step.
        gradient: gradient of each step.

    Raises:
        OptionError: an option is out of range, or the gradient is ``reversible``, which solves no equation.
    """

    scheme: str = "theta"
    theta: float = 1.0
    steps: int = 1
    total_time: float = 1.0
    solver: FixedPointConfig = field(default_factory=FixedPointConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise OptionError("scheme", f"{self.scheme!r} is unknown; choose one of {', '.join(SCHEMES)}.")
        if not 0.0 <= self.theta <= 1.0:
            raise OptionError("theta", f"{self.theta} is outside [0, 1] (0 the explicit layer, 1 backward Euler).")
        if self.steps < 1:
            raise OptionError("steps", f"{self.steps} steps per solve; give at least 1.")
        if not 0.0 < self.total_time < float("inf"):
            raise OptionError("total_time", f"the interval {self.total_time} is not positive and finite.")
        if self.solver.compact:
            raise OptionError("compact", "an implicit step keeps all samples of its batch; leave it out.")
        if self.gradient.kind == "reversible":
            raise OptionError("gradient", "the reversible iteration solves no implicit step; take ift or phantom-K.")


@dataclass(frozen=True)
class ThetaResult(SolveResult):
    """A :class:`SolveResult` with ``converged``: ``(batch,)`` bool, whether every step met the tolerance; ``None`` for
    θ = 0."""

    converged: Tensor | None = None


def solve_theta(
    f: VectorField,
    x: Tensor,
    config: ThetaConfig,
    t0: float = 0.0,
    layout: Layout = UNPADDED,
    records: list[AdjointRecord] | None = None,
) -> ThetaResult:
    """Integrate ``dz/dt = f(t, z)`` from ``z(t0) = x`` over ``config.total_time``.

    Args:
        f: prepared field, ``f(t, z) -> dz``, zero at padding.
        x: ``(batch, time, dim)``.
        config: scheme, steps, root solver, gradient.
        t0: start time.
        layout: of the batch.
        records: receives one :class:`AdjointRecord` per implicit step, filled by the backward pass.

    Returns:
        The state at ``t0 + total_time``; evaluations per sample, of the root solver and the explicit half (an ``int``
        for θ = 0, which solves nothing); the worst residual and the worst status of the steps.
    """
    h = config.total_time / config.steps
    if config.scheme == "theta" and config.theta == 0.0:
        z = x
        for step in range(config.steps):
            z = torch.add(z, f(t0 + step * h, z), alpha=h)
        return ThetaResult(z, evaluations=config.steps)

    z, evaluations, residual, converged, status = x, 0, None, None, Status.COMPLETED
    for step in range(config.steps):
        record = AdjointRecord()
        solved, explicit = _implicit_step(f, z, t0 + step * h, h, config, layout, record)
        if records is not None:
            records.append(record)
        z = solved.state
        evaluations = evaluations + solved.solve.evaluations + explicit
        residual = solved.solve.residual if residual is None else torch.maximum(residual, solved.solve.residual)
        converged = solved.solve.converged if converged is None else converged & solved.solve.converged
        status = Status.worst((status, solved.solve.status))
    return ThetaResult(z, evaluations, residual, status, converged)


def _implicit_step(
    f: VectorField, x: Tensor, t: float, h: float, config: ThetaConfig, layout: Layout, record: AdjointRecord
) -> tuple[Equilibrium, int]:
    """One step: the equilibrium and the evaluations spent on its explicit half."""
    if config.scheme == "implicit-midpoint":

        def step_map(z: Tensor) -> Tensor:
            return torch.add(x, f(t + h / 2, (x + z) / 2), alpha=h)

        return equilibrium(step_map, x, config.solver, config.gradient, layout, record), 0

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
    return equilibrium(step_map, start, config.solver, config.gradient, layout, record), explicit
