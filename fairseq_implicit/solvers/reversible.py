"""Reversible Heun with exact reconstruction: gradients with the memory of one state, whatever the number of steps.

One step from the pair of states (y, w) at t to t' = t + h, one evaluation each:

    w' = 2 y - w + h f(t, w),      y' = y + h/2 (f(t, w) + f(t', w'))

It is of order 2 and solvable backwards in closed form (Kidger et al., *Efficient and Accurate Gradients for Neural
SDEs*, arXiv 2105.13493, Algorithm 1). In floating point the way back accumulates rounding errors that the scheme's
parasitic mode does not damp. Here both states are fixed-point integers: sums of integers have an exact inverse, so the
backward pass meets the very states of the forward pass (the device of Levesque and Verlet 1993 for reversible
dynamics).

The scheme is stable on the imaginary axis only: with strongly contracting fields take small steps, or a scheme of
``runge_kutta.py`` with recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.gradients.accumulation import accumulate
from fairseq_implicit.solvers.gradients.trajectory import Direct
from fairseq_implicit.solvers.precision import Autocast, in_state_precision
from fairseq_implicit.solvers.solver import NOTHING, Solution, Solver, Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import VectorField

# 64-bit integers in units of 2^-44: a resolution of 6e-14, and sums that wrap beyond 5.2e5. A step adds up to five
# terms, so that none can wrap unnoticed while each of them stays below this.
UNITS = float(2**44)
LARGEST_STATE = 1e5


@dataclass(frozen=True)
class Reconstruction(Direct):
    """The backward pass meets the very states of the forward pass, which were not kept."""

    name: ClassVar[str] = "reversible"
    serves: ClassVar[tuple[str, ...]] = ("reversible",)
    condition: ClassVar[str] = "and `scheme` reversible-heun belong together, with `tolerance` 0"
    along_the_way: ClassVar[bool] = False

    def update_cost(self, forward, backward):
        return forward + 3 * forward, "solve + 3 x as much"

    def solve(self, solver, f, x, span, layout, parameters, record, **options):
        result = solver.integrate(f, x, span, layout, parameters=parameters, **options)
        if record is not None:
            record.evaluations = result.field_calls if torch.is_grad_enabled() else 0
        return result


@dataclass(frozen=True)
class ReversibleHeun(Solver):
    """Reversible Heun in equal steps; ``steps + 1`` evaluations, as many again backward.

    Raises:
        OptionError: fewer than one step.
    """

    kind: ClassVar[str] = "reversible"
    keeps: ClassVar[bool] = False
    remedy: ClassVar[str] = (
        f", or, where a state beyond {LARGEST_STATE:g} is no fault of the model's, take more steps, or another scheme "
        "with the gradient checkpoint-step"
    )

    steps: int = 1
    gradient: Direct = Reconstruction()

    def __post_init__(self):
        if self.steps < 1:
            raise OptionError("steps", f"the reversible scheme needs at least one step, got {self.steps}.")
        if self.kind not in self.gradient.serves:
            raise OptionError(
                "scheme", f"reversible-heun and `gradient` reversible belong together, got {self.gradient.name}."
            )

    def integrate(
        self,
        f: VectorField,
        x: Tensor,
        span: Span,
        layout=UNPADDED,
        *,
        dtype=None,
        pieces=(),
        keep=NOTHING,
        parameters=(),
    ) -> Solution:
        """See :meth:`Solver.integrate`; magnitudes of ``x`` are below ``LARGEST_STATE``.

        Returns:
            the state; with ``Status.NON_FINITE``, and NaN for each sample of which a state or an increment on the way
            was not finite or beyond ``LARGEST_STATE``. Reading that is the one synchronisation of the solve.
        """
        g, wide = in_state_precision(f, dtype or x.dtype)
        extremes, h = _Extremes(x), span.length / self.steps
        state = _ReversibleHeun.apply(g, x.to(wide), h, self.steps, span.start, extremes, *parameters)
        kept = extremes.largest < LARGEST_STATE
        status = Status.COMPLETED if bool(kept.all()) else Status.NON_FINITE
        if status is Status.NON_FINITE:
            state = state.masked_fill(~kept.view(-1, 1, 1), float("nan"))
        spent = self.steps + 1
        return Solution(state.to(x.dtype), spent, status=status, field_calls=spent, accepted=self.steps)


class _Extremes:
    """The largest magnitude that each sample has met, ``(batch,)``, NaN once anything was NaN.

    Integers have no NaN: whatever is converted to them is seen here before.
    """

    def __init__(self, y: Tensor):
        self.largest = torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)

    def see(self, x: Tensor) -> None:
        self.largest = torch.maximum(self.largest, x.detach().abs().flatten(1).amax(1).double())


def _integers(x: Tensor) -> Tensor:
    return (x.double() * UNITS).round().to(torch.int64)


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.double() / UNITS).to(dtype)


class _ReversibleHeun(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, g: Callable, y: Tensor, h: float, steps: int, start: float, extremes: _Extremes, *parameters: Tensor
    ) -> Tensor:
        ctx.autocast = Autocast(y.device)
        dtype = y.dtype

        def half_increment(t: float, z: Tensor) -> Tensor:
            extremes.see(z)
            increment = g(t, z) * (h / 2)
            extremes.see(increment)
            return _integers(increment)

        extremes.see(y)
        exact = companion = _integers(y)
        half = half_increment(start, _numbers(companion, dtype))
        for n in range(1, steps + 1):
            companion = 2 * exact - companion + 2 * half
            following = half_increment(start + n * h, _numbers(companion, dtype))
            exact = exact + half + following
            half = following
            extremes.see(_numbers(exact, dtype))
        ctx.save_for_backward(exact, companion, *parameters)
        ctx.g, ctx.h, ctx.steps, ctx.start = g, h, steps, start
        return _numbers(exact, dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        exact, companion, *parameters = ctx.saved_tensors
        h, dtype = ctx.h, gradient.dtype
        wanted = [p for p in parameters if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(wanted)
        to_y, to_companion, to_half = gradient, torch.zeros_like(gradient), torch.zeros_like(gradient)

        def evaluate(n: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            """Half an increment at the companion of step ``n`` and the product of its transposed Jacobian."""
            z = _numbers(companion, dtype).requires_grad_()
            with torch.enable_grad(), ctx.autocast.on():
                increment = ctx.g(ctx.start + n * h, z) * (h / 2)

            def pull_back(cotangent: Tensor) -> Tensor:
                if not increment.requires_grad:
                    return torch.zeros_like(cotangent)
                parts = torch.autograd.grad(increment, [z] + wanted, cotangent, allow_unused=True)
                accumulate(totals, parts[1:])
                return torch.zeros_like(cotangent) if parts[0] is None else parts[0]

            return _integers(increment.detach()), pull_back

        following, pull_back = evaluate(ctx.steps)
        for n in range(ctx.steps, 0, -1):
            to_companion = to_companion + pull_back(to_half + to_y)
            # Undo the step: the companion needs no evaluation, the state needs the one at the companion.
            companion = 2 * exact - companion - 2 * following
            half, pull_back = evaluate(n - 1)
            exact = exact - half - following
            following = half
            to_y, to_companion, to_half = to_y + 2 * to_companion, -to_companion, to_y + 2 * to_companion
        to_y = to_y + to_companion + pull_back(to_half)
        gradients = iter(totals)
        to_parameters = tuple(next(gradients) if p.requires_grad else None for p in parameters)
        return (None, to_y, None, None, None, None) + to_parameters
