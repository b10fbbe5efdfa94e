"""Gradients that do not store the solve: the continuous adjoint.

Optimise-then-discretise: with a(T) the gradient of the loss, the state and its adjoint are integrated backward,

    dy/dt = f(t, y),    da/dt = -(∂f/∂y)ᵀ a,    dL/dθ = ∫ (∂f/∂θ)ᵀ a dt

(Pontryagin; Chen et al., arXiv 1806.07366). Memory does not grow with the steps (one state is kept at the end of each
smooth piece of the field), but the gradient is exact only to the
tolerance and only where the flow can be run backward: on strongly contracting fields the reconstructed state drifts
away (Gholami et al., arXiv 1902.10298). Recomputation (``solve_adaptive(recompute=True)``) is exact; prefer it where it
fits.

The noise of the field is drawn before the solve, so the adjoint sees the forward pass's field and is as sound with
dropout as without. Parameter gradients are integrated alongside with the weights of the accepted steps and do not
enter the error norm (Kidger et al., *"Hey, that's not an ODE"*, arXiv 2009.09457).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import (
    AdaptiveConfig,
    AdaptiveResult,
    Piece,
    embedded_pair,
    in_state_precision,
    solve_adaptive,
)
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.vector_field import VectorField


class Surroundings:
    """Autocast as it was in the forward pass, for evaluations in a backward pass (which runs without it)."""

    def __init__(self, device: torch.device):
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)

    def __enter__(self):
        self._context = torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)
        return self._context.__enter__()

    def __exit__(self, *exception):
        return self._context.__exit__(*exception)


def accumulate(totals: list[Tensor | None], parts: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """Adds ``factor * parts`` to ``totals`` in place; ``None`` stands for zero on both sides."""
    for i, part in enumerate(parts):
        if part is None or factor == 0.0:
            continue
        if totals[i] is None:
            totals[i] = part * factor
        else:
            totals[i].add_(part, alpha=factor)


def solve_adjoint(
    f: VectorField,
    y: Tensor,
    duration: float,
    config: AdaptiveConfig,
    parameters: Sequence[Tensor],
    layout: Layout = UNPADDED,
    start: float = 0.0,
    on_backward: Callable[[int], None] | None = None,
    pieces: Sequence[Piece] = (),
) -> AdaptiveResult:
    """:func:`solve_adaptive` with the gradient of the continuous adjoint.

    Args:
        parameters: every tensor with gradient that ``f`` reads, other than its arguments: those left out receive none.
        on_backward: called at the end of each backward pass with its evaluations of the field.

    Raises:
        ArithmeticError: in the backward pass, when the adjoint solve does not reach the start of the interval.
    """
    results: list[AdaptiveResult] = []
    pieces = tuple(pieces) or (Piece(f, start + duration),)
    state = _ContinuousAdjoint.apply(pieces, y, duration, config, layout, start, on_backward, results, *parameters)
    return replace(results[0], state=state)


class _ContinuousAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pieces, y, duration, config, layout, start, on_backward, results, *parameters):
        ctx.surroundings = Surroundings(y.device)
        result = solve_adaptive(
            pieces[0].field, y, duration, config, layout, start, pieces=pieces, keep_piece_states=True
        )
        results.append(replace(result, state=None, piece_states=()))
        ctx.save_for_backward(*(state.to(y.dtype) for state in result.piece_states), *parameters)
        ctx.pieces, ctx.config, ctx.layout, ctx.start = pieces, config, layout, start
        ctx.on_backward, ctx.status = on_backward, result.status
        return result.state

    @staticmethod
    def backward(ctx, gradient):
        if ctx.status is not Status.CONVERGED:
            raise ArithmeticError(
                f"The forward solve stopped early ({ctx.status.value}), so the adjoint has no end point to start "
                f"from: raise --ode-max-evaluations or --ode-tolerance, or use --ode-gradient checkpoint-step."
            )
        states, parameters = ctx.saved_tensors[: len(ctx.pieces)], ctx.saved_tensors[len(ctx.pieces) :]
        wanted = [p for p in parameters if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(wanted)
        to_state, evaluations = gradient, 0
        starts = (ctx.start,) + tuple(piece.end for piece in ctx.pieces[:-1])
        with ctx.surroundings:
            for piece, start, state in reversed(list(zip(ctx.pieces, starts, states))):
                to_state, parts, spent = _integrate_backward(
                    piece.field, state, to_state, piece.end - start, ctx.config, ctx.layout, start, wanted
                )
                accumulate(totals, parts)
                evaluations += spent
        if ctx.on_backward is not None:
            ctx.on_backward(evaluations)
        gradients = iter(totals)
        return (None, to_state) + (None,) * 6 + tuple(next(gradients) if p.requires_grad else None for p in parameters)


def _integrate_backward(
    f: VectorField,
    state: Tensor,
    gradient: Tensor,
    duration: float,
    config: AdaptiveConfig,
    layout: Layout,
    start: float,
    wanted: list[Tensor],
) -> tuple[Tensor, list[Tensor | None], int]:
    """State, adjoint and parameter gradients from the end of the interval to its start, in the time s = end - t."""
    g, dtype = in_state_precision(f, state.dtype)
    dim, end = state.shape[-1], start + duration
    # Scaled to the size of the state: a tolerance that means something for y would let tiny adjoints pass unmeasured.
    size = gradient.to(dtype).square().mean().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    augmented = torch.cat([state.to(dtype), gradient.to(dtype) / size], dim=-1)
    weights = embedded_pair(config.scheme)[0].b_values
    totals: list[Tensor | None] = [None] * len(wanted)
    stages: list[tuple[Tensor | None, ...]] = []
    # Parameter gradients are summed over the batch: they need one step size for all samples.
    config = replace(config, step_control="batch")

    def augmented_field(s: float, both: Tensor) -> Tensor:
        z, a = both[..., :dim].detach().requires_grad_(), both[..., dim:]
        with torch.enable_grad():
            dz = g(end - s, z)
            parts = (None,) * (1 + len(wanted))
            if dz.requires_grad:
                parts = torch.autograd.grad(dz, [z] + wanted, a, allow_unused=True)
        stages.append(parts[1:])
        pulled = torch.zeros_like(a) if parts[0] is None else parts[0]
        return torch.cat([-dz.detach(), pulled], dim=-1)

    def on_trial(accepted: bool, step: float) -> None:
        if accepted:
            for weight, parts in zip(weights, stages):
                accumulate(totals, parts, weight * step)
            del stages[:-1]
        else:
            del stages[1:]

    with torch.no_grad():
        result = solve_adaptive(augmented_field, augmented, duration, config, layout, on_trial=on_trial)
    if result.status is not Status.CONVERGED:
        raise ArithmeticError(
            f"The adjoint solve failed on its way back ({result.status.value}): this flow cannot be run backward at "
            f"this tolerance; use --ode-gradient checkpoint-step."
        )
    totals = [None if total is None else (total * size).to(p.dtype) for total, p in zip(totals, wanted)]
    return (result.state[..., dim:] * size).to(gradient.dtype), totals, result.field_calls
