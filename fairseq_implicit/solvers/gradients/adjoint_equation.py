"""The adjoint equation ``w = Jᵀw + g`` of an equilibrium, and how its solution becomes a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.gradients.equilibrium import damped
from fairseq_implicit.solvers.gradients.record import AdjointRecord


@dataclass
class AdjointEquation:
    """``w = Jᵀw + g`` on the graph from ``anchor`` to ``tracked = f(anchor)``."""

    tracked: Tensor
    anchor: Tensor
    layout: Layout
    precision: torch.dtype
    record: AdjointRecord

    def vjp(self, w: Tensor) -> Tensor:
        # Only the path to the anchor is walked, so no parameter's gradient hook fires here.
        (product,) = torch.autograd.grad(self.tracked, self.anchor, w.to(self.tracked.dtype), retain_graph=True)
        return product.to(w.dtype)

    def solved_by(self, method: Callable[[AdjointEquation, Tensor], Tensor]) -> Tensor:
        """``tracked`` whose gradient g becomes ``method(equation, g)``, the cotangent that the tracked call receives.

        Args:
            method: is given g in float32 or wider, zero at padding.
        """
        return _Adjoint.apply(self.tracked, self, method)


def neumann_sum(vjp: Callable[[Tensor], Tensor], g: Tensor, terms: int, damping: float = 1.0) -> Tensor:
    """``τ Σ_{i<K} (τ Jᵀ + (1 − τ) I)ⁱ g``: what K tracked damped steps at an exact equilibrium give."""
    term = total = g
    for _ in range(terms - 1):
        term = damped(term, vjp(term), damping)
        total = total + term
    return total if damping == 1.0 else damping * total


class _Adjoint(torch.autograd.Function):
    """Identity forward; backward turns ∂ℓ/∂z* into the adjoint state."""

    @staticmethod
    def forward(ctx, tracked: Tensor, equation: AdjointEquation, method: Callable) -> Tensor:
        ctx.equation, ctx.method = equation, method
        return tracked.view_as(tracked)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        wide = ctx.equation.layout.keep(g if g.dtype is torch.float64 else g.float())
        return ctx.method(ctx.equation, wide).to(g.dtype), None, None
