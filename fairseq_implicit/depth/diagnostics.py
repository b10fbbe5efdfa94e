"""What a state goes through on its way: size, direction, local error and cost, along the depth of one batch."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fairseq_implicit.depth.continuous import ContinuousDepth
from fairseq_implicit.depth.stack import BlockStack
from fairseq_implicit.fields.field import Increment
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import Adaptive, embedded_step
from fairseq_implicit.solvers.precision import in_state_precision, state_dtype
from fairseq_implicit.solvers.solver import Span

# Evaluations per sample and unit of time for the trajectory itself.
FINE_BUDGET = 50_000


@dataclass(frozen=True)
class Trajectory:
    """A batch along the depth, seen at N + 1 places with N intervals (blocks, or units of time) between them.

    Attributes:
        times: of the places, in units of one layer.
        rms: ``(N + 1, batch)`` root mean square of the state over real tokens.
        cosine: ``(N, batch)`` mean over real tokens of the cosine between successive states.
        local_error: ``(N, batch)`` error that one step of ``bosh3`` over the interval estimates for itself, relative to
            the state: what a low-order scheme loses there.
        evaluations: ``(batch,)`` evaluations that the depth spends on each sample as it is configured.
    """

    times: list[float]
    rms: Tensor
    cosine: Tensor
    local_error: Tensor
    evaluations: Tensor


@torch.no_grad()
def trace(depth: torch.nn.Module, x: Tensor, layout: Layout = UNPADDED) -> Trajectory:
    """Follow a batch through a depth in evaluation mode.

    Args:
        depth: a :class:`BlockStack` or :class:`ContinuousDepth`.
        x: embedding ``(batch, time, dim)``.
        layout: of the batch.

    Raises:
        ValueError: a depth of another kind, or one in training mode, whose noise would be part of the picture.
    """
    if depth.training:
        raise ValueError("a trajectory is traced in evaluation mode: call eval() first")
    if isinstance(depth, BlockStack):
        states, fields, duration, evaluations = _blocks(depth, x, layout)
    elif isinstance(depth, ContinuousDepth):
        states, fields, duration, evaluations = _units(depth, x, layout)
    else:
        raise ValueError(f"a {type(depth).__name__} has no trajectory in time: trace an ode_bert or a neural_ode_bert")
    wide = [state.to(state_dtype(state.dtype)) for state in states]
    errors = []
    for (f, start), state in zip(fields, wide[:-1], strict=True):
        g, _ = in_state_precision(f, x.dtype)
        _, _, error = embedded_step(g, "bosh3", start, duration, state, g(start, state))
        errors.append((layout.sample_mean(error.square()) / layout.sample_mean(state.square())).sqrt())
    cosines = [
        layout.sample_mean(torch.nn.functional.cosine_similarity(one, other, dim=-1).unsqueeze(-1))
        for one, other in pairwise(wide)
    ]
    return Trajectory(
        times=[index * duration for index in range(len(states))],
        rms=torch.stack([layout.sample_mean(state.square()).sqrt() for state in wide]),
        cosine=torch.stack(cosines),
        local_error=torch.stack(errors),
        evaluations=evaluations,
    )


Places = tuple[list[Tensor], list[tuple[Increment, float]], float, Tensor]


def _blocks(depth: BlockStack, x: Tensor, layout: Layout) -> Places:
    """The states between blocks, each block's field with its start, the time of a block, evaluations per sample."""
    output = depth(x, layout, return_hidden_states=True)
    states = output.hidden_states
    fields = [
        (depth.fields[block % len(depth.fields)].prepare(x, layout), float(block))
        for block in range(depth.config.layers)
    ]
    evaluations = torch.zeros(x.shape[0], device=x.device)
    solver, duration = depth.config.solver, depth.config.total_time
    if solver.adaptive:
        for (f, start), state in zip(fields, states[:-1], strict=True):
            evaluations = evaluations + solver.solve(f, state, Span(start, duration), layout).evaluations
    else:
        evaluations = evaluations + output.statistics["evaluations"]
    return states, fields, duration, evaluations


def _units(depth: ContinuousDepth, x: Tensor, layout: Layout) -> Places:
    """The same at whole units of time, whatever steps the depth itself takes."""
    config = depth.config
    intervals = max(1, round(config.duration))
    unit = config.duration / intervals
    f = depth.field.prepare(x, layout)
    fine = Adaptive("dopri5", 1e-4, 1e-4, FINE_BUDGET, depth.step_control)
    states = [x]
    for index in range(intervals):
        states.append(fine.solve(f, states[-1], Span(index * unit, unit), layout).state)
    evaluations = torch.zeros(x.shape[0], device=x.device) + depth.solve(f, x, layout).evaluations
    return states, [(f, index * unit) for index in range(intervals)], unit, evaluations
