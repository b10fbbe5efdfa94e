"""What every gradient of an equilibrium ``z* = f(z*)`` has in common.

The parameters' gradient always arises from ordinary tracked calls in the caller's own graph, so hooks on parameters
(data parallelism) fire once, and two forward passes before one backward, a repeated backward over a retained graph,
and cells shared between places all give the sums they should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.fixed_point import FixedPointConfig, FixedPointResult, solve
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.precision import field_dtype, state_dtype
from fairseq_implicit.solvers.status import Status


@dataclass(frozen=True)
class Equilibrium:
    """An equilibrium with its gradient attached.

    Attributes:
        state: ``(batch, time, dim)``, tracked.
        solve: how the forward pass went.
        point: the state at which ``state = f(point)``, detached; ``None`` for the schemes without a solver.
        iterates: evaluation number -> tracked ``f`` of the state of that evaluation, for the numbers asked for.
        reused: whether the gradient starts from the solve's last evaluation, so that no other was made for it.
    """

    state: Tensor
    solve: FixedPointResult
    point: Tensor | None
    iterates: dict[int, Tensor]
    reused: bool = False


@dataclass(frozen=True)
class EquilibriumGradient:
    """How the gradient of an equilibrium is formed. A subclass overrides :meth:`equilibrium`, or :meth:`attach` where
    it starts from a fixed point, and declares what is true of it.

    Attributes:
        kind: how it is called; with ``counted``, a number of steps follows.
        counted: whether its cost is a number of steps K of its own.
        uses_solver: whether the forward pass looks for a fixed point at all.
        recomputable: whether the map's activations can be recomputed in the backward pass: it must differentiate each
            evaluation once.
        keeps_iterates: whether states on the way can be handed out.
        needs_equilibrium: whether it means nothing where the map has no fixed point.
        reconstructs: whether its backward pass comes back to states that were not kept, so that it must be told every
            tensor that the map depends on, and may miss them: see :class:`AdjointRecord`.
        damped: whether it takes damped steps.
        steps: K where it is counted.
        damping: τ of its steps, where it is damped.
        adjoint: solver of ``w = Jᵀw + g``, where it solves that; its tolerance is relative to ‖g‖.

    Raises:
        OptionError: an option is out of range.
    """

    kind: ClassVar[str]
    counted: ClassVar[bool] = False
    uses_solver: ClassVar[bool] = True
    recomputable: ClassVar[bool] = True
    keeps_iterates: ClassVar[bool] = True
    needs_equilibrium: ClassVar[bool] = True
    reconstructs: ClassVar[bool] = False
    damped: ClassVar[bool] = True
    #: damping where none is given.
    usual_damping: ClassVar[float] = 1.0

    steps: int = 1
    damping: float = 1.0
    adjoint: FixedPointConfig = FixedPointConfig()

    def __post_init__(self):
        if self.steps < 1:
            raise OptionError("gradient", f"{self.kind}-{self.steps} takes no step; give at least {self.kind}-1.")
        if not 0.0 < self.damping <= 1.0:
            raise OptionError("gradient_damping", f"{self.damping} is outside (0, 1].")
        if self.adjoint.compact:
            raise OptionError("compact", "the adjoint equation keeps all samples of its batch; leave it out.")

    @property
    def name(self) -> str:
        """The spelling that :func:`fairseq_implicit.solvers.gradients.names.parse_gradient` reads."""
        return f"{self.kind}-{self.steps}" if self.counted else self.kind

    def budget(self, solver: FixedPointConfig) -> int:
        """Evaluations that the forward pass may spend."""
        return solver.max_iter

    def check_budget(self, max_iter: int) -> None:
        """Refuse a budget whose gradient would be lost, for whoever trains: an answer is as good as ever.

        Raises:
            OptionError: naming the option and the most that can be.
        """

    def update_cost(self, forward: Any, adjoint: Any) -> tuple[Any, str]:
        """Cost of one update in evaluations of the map, and how it is made up.

        An evaluation costs 1, a product with the Jacobian 1, a full backward pass 2.

        Args:
            forward: evaluations of the forward solve.
            adjoint: products with the Jacobian of the adjoint solve; only ``ift`` has one.
        """
        raise TypeError(f"{type(self).__name__} does not say what it costs")

    def equilibrium(
        self,
        f: Callable[[Tensor], Tensor],
        z0: Tensor,
        solver: FixedPointConfig,
        layout: Layout = UNPADDED,
        record: AdjointRecord | None = None,
        depends_on: Sequence[Tensor] = (),
        sources: Sequence[Tensor] | None = None,
        capture: Sequence[int] = (),
    ) -> Equilibrium:
        """Solve ``z = f(z)`` and attach the gradient.

        Args:
            f: deterministic map ``(batch, time, dim) -> (batch, time, dim)``, zero at padding.
            z0: start, ``(batch, time, dim)``.
            solver: forward solver; one that is not used gives its budget, tolerance and criterion for the verdict.
            layout: of the batch.
            record: filled by the backward pass.
            depends_on: every tensor that ``f`` depends on and whose gradient is wanted (parameters, injections), none
                of them computed from another; for a gradient that ``reconstructs``.
            sources: where the gradient of each of ``depends_on`` goes, where that is another tensor: what a leaf of
                ``f`` was detached from, so that the pieces of the graph end there.
            capture: evaluation numbers for ``iterates``.

        Raises:
            OptionError: see :func:`fairseq_implicit.solvers.fixed_point.solve`, and the gradient's own conditions.
        """
        training = torch.is_grad_enabled()
        if training:
            self.check_precision(field_dtype(z0))
        result = solve(f, z0, solver, layout, capture=capture, track=training)
        tracked, result = result.tracked, replace(result, tracked=None)
        iterates = {count: f(state) for count, state in result.iterates.items()}
        point = result.state
        if not training:
            return Equilibrium(f(point), result, point, iterates)
        reused = tracked is not None
        if tracked is None:
            anchor = point.detach().requires_grad_()
            tracked = anchor, f(anchor)
        record = AdjointRecord() if record is None else record
        state = self.attach(f, *tracked, layout, field_dtype(z0), record)
        return Equilibrium(state, result, point, iterates, reused)

    def check_precision(self, dtype: torch.dtype) -> None:
        """Refuse, before the solve, what cannot be in the middle of the backward pass.

        Args:
            dtype: what the map computes in.

        Raises:
            OptionError: naming the option.
        """

    def attach(
        self,
        f: Callable[[Tensor], Tensor],
        anchor: Tensor,
        state: Tensor,
        layout: Layout,
        precision: torch.dtype,
        record: AdjointRecord,
    ) -> Tensor:
        """The tracked equilibrium.

        Args:
            anchor: the fixed point, a leaf.
            state: ``f(anchor)`` with its graph.
            precision: what ``f`` computes in.
        """
        raise TypeError(f"{type(self).__name__} attaches no gradient")


def damped(z: Tensor, f_z: Tensor, damping: float) -> Tensor:
    """``z + τ (f(z) − z)``."""
    return f_z if damping == 1.0 else z + damping * (f_z - z)


@torch.no_grad()
def verdict(
    z: Tensor,
    f_z: Tensor,
    evaluations: int,
    solver: FixedPointConfig,
    layout: Layout,
    state: Tensor,
    dtype: torch.dtype,
) -> FixedPointResult:
    """The result of a fixed number of steps, judged by the solver's tolerance.

    Args:
        z, f_z: the last state that the map was given and what it gave, ``(batch, time, dim)``.
        evaluations: how many there were.
        state: the answer.
        dtype: what the map computes in.
    """
    wide = state_dtype(z.dtype)
    residual = solver.metric(layout, f_z, f_z.to(wide) - z.to(wide))
    tol = solver.tolerance_for(dtype)
    converged = residual < tol
    return FixedPointResult(
        state=state.detach(),
        evaluations=torch.full_like(converged, evaluations, dtype=torch.long),
        residual=residual.to(state_dtype(state.dtype)),
        status=Status.COMPLETED,
        converged=converged,
        tolerance=tol,
    )
