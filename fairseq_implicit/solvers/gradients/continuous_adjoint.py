"""Gradients that do not store the solve: the continuous adjoint.

Optimise-then-discretise: with a(T) the gradient of the loss, the state and its adjoint are integrated backward,

    dy/dt = f(t, y),    da/dt = -(∂f/∂y)ᵀ a,    dL/dθ = ∫ (∂f/∂θ)ᵀ a dt

(Pontryagin; Chen et al., arXiv 1806.07366). Memory does not grow with the steps (one state is kept at the end of each
smooth piece of the field), but the gradient is exact only to the
tolerance and only where the flow can be run backward: on strongly contracting fields the reconstructed state drifts
away (Gholami et al., arXiv 1902.10298). Recomputation (``checkpoint-step``) is exact; prefer it where it
fits.

The noise of the field is drawn before the solve, so the adjoint sees the forward pass's field and is as sound with
dropout as without. Parameter gradients are integrated alongside with the weights of the accepted steps and do not
enter the error norm (Kidger et al., *"Hey, that's not an ODE"*, arXiv 2009.09457).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fairseq_implicit.layout import Layout
from fairseq_implicit.solvers.adaptive import Adaptive, AdaptiveSolution, embedded_pair
from fairseq_implicit.solvers.gradients.accumulation import accumulate
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.gradients.trajectory import Direct
from fairseq_implicit.solvers.precision import Autocast, in_state_precision
from fairseq_implicit.solvers.solver import Piece, Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import Time, VectorField


@dataclass(frozen=True)
class ContinuousAdjoint(Direct):
    """State and adjoint integrated backward, to the tolerance of the forward solve.

    Its backward pass raises an ``ArithmeticError`` where it does not reach the start of the interval.
    """

    name: ClassVar[str] = "adjoint"
    serves: ClassVar[tuple[str, ...]] = ("adaptive",)
    condition: ClassVar[str] = "is for adaptive solves and needs `backend` own: set `tolerance`"
    along_the_way: ClassVar[bool] = False

    def update_cost(self, forward, backward):
        return forward + 3 * backward, "solve + 3 x adjoint"

    def solve(self, solver, f, x, span, layout, parameters, record, *, pieces=(), **options):
        if not torch.is_grad_enabled():
            return solver.integrate(f, x, span, layout, pieces=pieces, **options)
        results: list[AdaptiveSolution] = []
        pieces = tuple(pieces) or (Piece(f, span.start + span.length),)
        record = AdjointRecord() if record is None else record
        state = _ContinuousAdjoint.apply(pieces, x, span, solver, layout, record, results, *parameters)
        return replace(results[0], state=state)


class _ContinuousAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pieces, y, span, config, layout, record, results, *parameters):
        ctx.autocast = Autocast(y.device)
        result = config.integrate(pieces[0].field, y, span, layout, pieces=pieces)
        results.append(replace(result, state=None, piece_states=()))
        ctx.save_for_backward(*(state.to(y.dtype) for state in result.piece_states), *parameters)
        ctx.pieces, ctx.config, ctx.layout, ctx.start = pieces, config, layout, span.start
        ctx.record, ctx.status = record, result.status
        return result.state

    @staticmethod
    def backward(ctx, gradient):
        if ctx.status is not Status.CONVERGED:
            raise ArithmeticError(
                f"The forward solve stopped early ({ctx.status.value}), so the adjoint has no end point to start "
                "from: raise max_evaluations or the tolerance, or use the gradient checkpoint-step."
            )
        states, parameters = ctx.saved_tensors[: len(ctx.pieces)], ctx.saved_tensors[len(ctx.pieces) :]
        wanted = [p for p in parameters if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(wanted)
        to_state, evaluations = gradient, 0
        starts = (ctx.start,) + tuple(piece.end for piece in ctx.pieces[:-1])
        with ctx.autocast.on():
            for piece, start, state in reversed(list(zip(ctx.pieces, starts, states, strict=True))):
                span = Span(start, piece.end - start)
                to_state, parts, spent = _integrate_backward(
                    piece.field, state, to_state, span, ctx.config, ctx.layout, wanted
                )
                accumulate(totals, parts)
                evaluations += spent
        ctx.record.evaluations = evaluations
        gradients = iter(totals)
        return (None, to_state) + (None,) * 5 + tuple(next(gradients) if p.requires_grad else None for p in parameters)


def _integrate_backward(
    f: VectorField,
    state: Tensor,
    gradient: Tensor,
    span: Span,
    config: Adaptive,
    layout: Layout,
    wanted: list[Tensor],
) -> tuple[Tensor, list[Tensor | None], int]:
    """State, adjoint and parameter gradients from the end of the interval to its start, in the time s = end - t."""
    g, dtype = in_state_precision(f, state.dtype)
    dim, end = state.shape[-1], span.start + span.length
    # Scaled to the size of the state: a tolerance that means something for y would let tiny adjoints pass unmeasured.
    size = gradient.to(dtype).square().mean().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    augmented = torch.cat([state.to(dtype), gradient.to(dtype) / size], dim=-1)
    weights = embedded_pair(config.scheme)[0].b_values
    totals: list[Tensor | None] = [None] * len(wanted)
    stages: list[tuple[Tensor | None, ...]] = []
    # Parameter gradients are summed over the batch: they need one step size for all samples.
    config = replace(config, step_control="batch", gradient=Direct())

    def augmented_field(s: Time, both: Tensor) -> Tensor:
        z, a = both[..., :dim].detach().requires_grad_(), both[..., dim:]
        with torch.enable_grad():
            dz = g(end - s, z)
            parts: tuple[Tensor | None, ...] = (None,) * (1 + len(wanted))
            if dz.requires_grad:
                parts = torch.autograd.grad(dz, [z] + wanted, a, allow_unused=True)
        stages.append(parts[1:])
        pulled = torch.zeros_like(a) if parts[0] is None else parts[0]
        return torch.cat([-dz.detach(), pulled], dim=-1)

    def on_trial(accepted: bool, step: float) -> None:
        if accepted:
            for weight, parts in zip(weights, stages, strict=True):
                accumulate(totals, parts, weight * step)
            del stages[:-1]
        else:
            del stages[1:]

    with torch.no_grad():
        result = config.watched(augmented_field, augmented, Span(0.0, span.length), layout, on_trial)
    if result.status is not Status.CONVERGED:
        raise ArithmeticError(
            f"The adjoint solve failed on its way back ({result.status.value}): this flow cannot be run backward at "
            "this tolerance; use the gradient checkpoint-step."
        )
    totals = [None if total is None else (total * size).to(p.dtype) for total, p in zip(totals, wanted, strict=True)]
    return (result.state[..., dim:] * size).to(gradient.dtype), totals, result.field_calls
