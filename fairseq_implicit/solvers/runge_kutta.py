"""One engine for every explicit Runge–Kutta scheme on a fixed grid; times and coefficients are Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.coefficients import Combination, Weight, check_coefficients, combine
from fairseq_implicit.solvers.fixed_steps import FixedSteps
from fairseq_implicit.solvers.solver import NOTHING, Keep, Piece, Solution, Span
from fairseq_implicit.solvers.tableau import Tableau, get_tableau
from fairseq_implicit.solvers.vector_field import Time, VectorField


@dataclass(frozen=True)
class RungeKutta(FixedSteps):
    """An explicit scheme in equal steps.

    Attributes:
        scheme: name or alias of a tableau.
        residual_in_field: integrate ``z + F(z)`` instead of ``F(z)``, as the original ODE-Transformer code does. It
            has a spurious exponential mode (a zero field multiplies the state by 2.7 per RK4 block); for compatibility.
        coefficients: how the stages are combined, see :mod:`fairseq_implicit.solvers.coefficients`.
        start: where learned coefficients start, ``tableau`` or ``ones``.
        scope: ``block``, ``model`` (one set for all blocks of a stack) or ``channel`` (per block and channel).
        stage_norm: normalise the state and each increment before they are added (PCformer's ``rk_norm``).

    Raises:
        OptionError: a value or a combination that has no meaning.
    """

    combines: ClassVar[bool] = True

    residual_in_field: bool = False
    coefficients: str = "fixed"
    start: str = "tableau"
    scope: str = "block"
    stage_norm: bool = False

    def __post_init__(self):
        check_coefficients(self.tableau, self.coefficients, self.start, self.scope)
        super().__post_init__()

    @property
    def tableau(self) -> Tableau:
        return get_tableau(self.scheme)

    @property
    def learns(self) -> bool:
        """Whether the weights of the stages are learned."""
        return self.coefficients != "fixed"

    def check_penalties(self, consistency: float, second_order: float) -> None:
        for name, weight in (("consistency_penalty", consistency), ("second_order_penalty", second_order)):
            if not 0 <= weight < math.inf:
                raise OptionError(name, f"the weight {weight} must be finite and not negative.")
            if weight > 0 and not self.learns:
                raise OptionError(name, "it needs learned `coefficients`, not fixed ones.")
        if second_order > 0 and self.tableau.stages == 1:
            raise OptionError("second_order_penalty", f"{self.scheme!r} has one stage; take two stages or more.")

    @property
    def evaluates_once(self) -> bool:
        return self.steps * self.tableau.stages == 1

    @property
    def shares_combination(self) -> bool:
        return self.scope == "model"

    def combination(self, dim: int, norm: Callable[[int], nn.LayerNorm] = nn.LayerNorm) -> Combination:
        channels = dim if self.scope == "channel" else None
        return Combination(self.tableau, self.coefficients, self.start, channels, dim, self.stage_norm, norm)

    def plain_layers(self, span: Span) -> int:
        plain = self.tableau.stages == 1 and not (self.learns or self.stage_norm or self.residual_in_field)
        return int(plain and self.steps == 1 and span.length == 1)

    def field(self, f: VectorField, dtype: torch.dtype) -> VectorField:
        return super().field(with_residual(f) if self.residual_in_field else f, dtype)

    def integrate(
        self,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout: Layout = UNPADDED,
        *,
        dtype: torch.dtype | None = None,
        pieces: Sequence[Piece] = (),
        keep: Keep = NOTHING,
        combination: Combination | None = None,
        carried: Tensor | None = None,
        mixture: Callable[[Tensor], Tensor] | None = None,
    ) -> Solution:
        """See :meth:`Solver.integrate`.

        Args:
            combination: weights of the stages; without it the tableau's b.
            carried: what the previous block of a stack gave as ``carried``, for schemes that reach back.
            mixture: of a predicted state with earlier blocks, for schemes that correct it.

        Raises:
            OptionError: ``combination`` was made for another scheme.
        """
        tableau = self.tableau
        if combination is not None and combination.tableau.name != tableau.name:
            raise OptionError(
                "coefficients", f"made for scheme {combination.tableau.name!r}, the solve uses {tableau.name!r}."
            )

        def step(g: VectorField, t: Time, y: Tensor, h: float) -> tuple[Tensor, tuple[Weight, ...]]:
            return explicit_step(g, t, y, h, tableau, combination)

        evaluations = sum(tableau.required if combination is None else combination.required)
        return self.march(step, evaluations, f, x, span, layout, dtype, pieces, keep)


def explicit_stages(
    f: VectorField, tableau: Tableau, t: Time, y: Tensor, h: float, required: Sequence[bool]
) -> list[Tensor | None]:
    """The increments ``F_i = f(t + c_i h, y + h Σ_j a_ij F_j)``; ``None`` for a stage that is not required.

    Args:
        f: the prepared field.
        tableau: the scheme.
        t: time at the start of the step.
        y: state ``(batch, time, dim)``.
        h: step size.
        required: for each stage, whether to evaluate it (``tableau.required`` or ``Combination.required``).
    """
    stages: list[Tensor | None] = []
    for row, node, wanted in zip(tableau.a_values, tableau.c_values, required, strict=True):
        stages.append(f(t + node * h, combine(y, stages, row, h)) if wanted else None)
    return stages


def explicit_step(
    f: VectorField, t: Time, y: Tensor, h: float, tableau: Tableau, combination: Combination | None = None
) -> tuple[Tensor, tuple[Weight, ...]]:
    """One step: the new state ``(batch, time, dim)`` and the weights of its stages.

    Without ``combination`` the weights are the tableau's b.
    """
    if combination is None:
        stages = explicit_stages(f, tableau, t, y, h, tableau.required)
        return combine(y, stages, tableau.b_values, h), tableau.b_values
    return combination(y, explicit_stages(f, tableau, t, y, h, combination.required), h)


def embedded_error(tableau: Tableau, stages: Sequence[Tensor], h: float) -> Tensor:
    """Local error estimate ``h Σ (b_i − b̂_i) F_i`` of a step whose stages have all been evaluated.

    Raises:
        ValueError: the scheme has no embedded weights.
    """
    if tableau.b_hat_values is None:
        raise ValueError(f"scheme {tableau.name!r} has no embedded weights; heun2, bosh3, dopri5 and tsit5 have")
    differences = [b - b_hat for b, b_hat in zip(tableau.b_values, tableau.b_hat_values, strict=True)]
    return combine(torch.zeros_like(stages[0]), stages, differences, h)


def with_residual(f: VectorField) -> VectorField:
    """The field ``z + F(z)`` of the original ODE-Transformer code."""
    return lambda t, z: z + f(t, z)
