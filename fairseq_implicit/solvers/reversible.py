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

from typing import Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_implicit.solvers.adaptive import Field, in_state_precision
from fairseq_implicit.solvers.sensitivity import Surroundings, accumulate
from fairseq_implicit.solvers.status import SolveResult

# 64-bit integers in units of 2^-44: a resolution of 6e-14 for states up to 5e5.
UNITS = float(2**44)


def solve_reversible(
    f: Field, y: Tensor, duration: float, steps: int, parameters: Sequence[Tensor] = (), start: float = 0.0
) -> SolveResult:
    """Integrates ``dy/dt = f(t, y)`` over ``steps`` equal steps; ``steps + 1`` evaluations, as many again backward.

    Args:
        f: field, deterministic during the solve and in the backward pass.
        y: ``(batch, time, dim)``, magnitudes below 5e5.
        parameters: every tensor with gradient that ``f`` reads, other than its arguments: those left out receive none.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"The reversible scheme needs at least one step, got {steps}.")
    g, dtype = in_state_precision(f, y.dtype)
    state = _ReversibleHeun.apply(g, y.to(dtype), duration / steps, steps, start, *parameters)
    return SolveResult(state.to(y.dtype), steps + 1)


def _integers(x: Tensor) -> Tensor:
    return (x.double() * UNITS).round().to(torch.int64)


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.double() / UNITS).to(dtype)


class _ReversibleHeun(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Callable, y: Tensor, h: float, steps: int, start: float, *parameters: Tensor) -> Tensor:
        ctx.surroundings = Surroundings(y.device)
        dtype = y.dtype
        exact = _integers(y)
        companion = exact
        half = _integers(g(start, _numbers(companion, dtype)) * (h / 2))
        for n in range(1, steps + 1):
            companion = 2 * exact - companion + 2 * half
            following = _integers(g(start + n * h, _numbers(companion, dtype)) * (h / 2))
            exact = exact + half + following
            half = following
        ctx.save_for_backward(exact, companion, *parameters)
        ctx.g, ctx.h, ctx.steps, ctx.start = g, h, steps, start
        return _numbers(exact, dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        exact, companion, *parameters = ctx.saved_tensors
        h, dtype = ctx.h, gradient.dtype
        wanted = [p for p in parameters if p.requires_grad]
        totals = [None] * len(wanted)
        to_y, to_companion, to_half = gradient, torch.zeros_like(gradient), torch.zeros_like(gradient)

        def evaluate(n: int) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
            """Half an increment at the companion of step ``n`` and the product of its transposed Jacobian."""
            z = _numbers(companion, dtype).requires_grad_()
            with torch.enable_grad(), ctx.surroundings:
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
        return (None, to_y, None, None, None) + tuple(next(gradients) if p.requires_grad else None for p in parameters)
