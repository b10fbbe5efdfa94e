"""Adaptive explicit Runge-Kutta: embedded pairs, PI step control, one step size per sample.

The first trial step is the whole interval unless told otherwise, so a block of unit depth costs one step (bosh3: 4
evaluations, dopri5 and tsit5: 7) instead of the two evaluations that starting-step heuristics spend before they begin.
Over a depth of many layers an error estimate is worth little at such a step: there the caller gives the first step.

An error estimate supposes a smooth field. One with kinks or jumps in time (weights interpolated between knots) is
handed over as its smooth pieces, and steps end where a piece does: a step across a kink can miss it altogether.

Sources: Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, II.4 (error norm, step control);
Gustafsson, ACM TOMS 17 (1991) (PI control); Pal et al., arXiv 2105.03918 (the error estimate as a regulariser).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.status import SolveResult, Status
from fairseq_implicit.solvers.tableau import Tableau, get_tableau
from fairseq_implicit.solvers.vector_field import Time, VectorField

PAIRS = ("bosh3", "dopri5", "tsit5")
STEP_CONTROLS = ("sample", "batch")
# A tolerance under this many rounding units asks the estimate to resolve noise: steps shrink without end.
FLOOR_IN_ROUNDING_UNITS = 10.0
# Steps below this share of the interval (in rounding units of the state) no longer move it.
SMALLEST_STEP_IN_ROUNDING_UNITS = 16.0
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0


class Piece(NamedTuple):
    """A field on a stretch of time where it is smooth, both ends included.

    Attributes:
        field: ``f(t, z)`` for the times of the stretch.
        end: the time at which the stretch ends.
        continues: whether the field starts with the value that the piece before it ends with (a kink, not a jump).
    """

    field: VectorField
    end: float
    continues: bool = False


@dataclass(frozen=True)
class AdaptiveConfig:
    """What an adaptive solve may spend and how exact it has to be.

    Attributes:
        scheme: embedded pair, one of ``PAIRS``.
        rtol, atol: each accepted step keeps its error estimate below ``atol + rtol * |state|`` (rms over a sample).
        max_evaluations: evaluations that one sample may cost before the solve stops with ``Status.BUDGET_SPENT``.
        step_control: ``"sample"``: every sample has its own step size, so that batch mates change neither its answer
            nor its evaluations; the field then sees a ``(batch,)`` tensor of times whenever the samples differ.
            ``"batch"``: one step size for all, ruled by the sample with the largest error.
        first_step: first trial step in the units of time; ``None``: the whole interval.

    Raises:
        ValueError: unknown scheme or step control, tolerance or first step not positive, budget smaller than one step.
    """

    scheme: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    max_evaluations: int = 1000
    step_control: str = "sample"
    first_step: float | None = None

    def __post_init__(self):
        stages = embedded_pair(self.scheme)[0].stages
        if self.step_control not in STEP_CONTROLS:
            raise ValueError(f"Unknown step control '{self.step_control}': choose one of {', '.join(STEP_CONTROLS)}.")
        for name, tolerance in (("rtol", self.rtol), ("atol", self.atol)):
            if not (tolerance > 0 and math.isfinite(tolerance)):
                raise ValueError(f"The tolerance {name} must be a positive number, got {tolerance}.")
        if self.first_step is not None and not 0 < self.first_step < math.inf:
            raise ValueError(f"The first step must be a positive time, got {self.first_step}.")
        if self.max_evaluations < stages:
            raise ValueError(
                f"max_evaluations is {self.max_evaluations}, but the first step of {self.scheme} takes {stages}: "
                f"raise it to at least {stages}."
            )


@dataclass(frozen=True)
class AdaptiveResult(SolveResult):
    """A :class:`SolveResult` with the history of the step control.

    Attributes:
        accepted, rejected: trial steps per sample: an ``int`` when all samples agree, else a ``(batch,)`` tensor.
        field_calls: evaluations of the field on the whole batch, the number that time is proportional to.
        reached: the time that each sample reached; the end of the interval unless the solve stopped early.
        states: the states after the accepted steps when they were asked for, the initial one first.
        times: the time of each of ``states``, a ``(batch,)`` tensor where the samples differ.
        energy: ``(batch,)``, with gradient, the integral of the mean squared rate of change over the depth.
        local_error: ``(batch,)``, with gradient, the sum over accepted steps of the rms error estimate.
        accepted_steps: ``(time, step)`` of each accepted step under batch control, the grid that a later
            solve can replay; empty under sample control.
        piece_states: the state at the end of each piece of the field when they were asked for.
    """

    accepted: int | Tensor = 0
    rejected: int | Tensor = 0
    field_calls: int = 0
    reached: tuple[float, ...] = ()
    states: Sequence[Tensor] = ()
    times: Sequence[Time] = ()
    energy: Tensor | None = None
    local_error: Tensor | None = None
    accepted_steps: Sequence[tuple[float, float]] = ()
    piece_states: Sequence[Tensor] = ()


@cache
def embedded_pair(scheme: str) -> tuple[Tableau, tuple[float, ...], int]:
    """The tableau of that name, the weights of its error estimate (b minus b-hat), and the estimate's order in h.

    Raises:
        ValueError: the scheme has no embedded weights, or its last stage is not its new state (the loop takes the
            last stage of a step as the first of the next one).
    """
    tableau = get_tableau(scheme)
    if tableau.b_hat is None or not tableau.first_same_as_last:
        raise ValueError(
            f"'{scheme}' has no embedded error estimate for adaptive steps: choose one of {', '.join(PAIRS)}, or take "
            "fixed steps with --ode-tolerance 0."
        )
    weights = tuple(b - b_hat for b, b_hat in zip(tableau.b_values, tableau.b_hat_values))
    return tableau, weights, min(tableau.order, tableau.embedded_order) + 1


def in_state_precision(f: VectorField, dtype: torch.dtype) -> tuple[VectorField, torch.dtype]:
    """The field seen from a state of at least single precision.

    Half-precision states lose small updates (an error of 42 % of the update after four RK4 steps in bfloat16, 11 % with
    a float32 state), so the state stays in float32 and only the field computes in ``dtype``.

    Returns:
        the wrapped field and the dtype of the state.
    """
    state_dtype = torch.promote_types(dtype, torch.float32)
    if state_dtype == dtype:
        return (lambda t, z: f(t, z).to(state_dtype)), state_dtype
    return (lambda t, z: f(t, z.to(dtype)).to(state_dtype)), state_dtype


def check_tolerance(config: AdaptiveConfig, dtype: torch.dtype) -> None:
    """Raises:
    ValueError: the tolerance is below what the dtype of the state can resolve.
    """
    floor = FLOOR_IN_ROUNDING_UNITS * torch.finfo(dtype).eps
    if config.rtol < floor:
        raise ValueError(
            f"The tolerance {config.rtol:g} is below the floor of a {str(dtype)[6:]} state ({floor:.1e}): "
            f"raise --ode-tolerance."
        )


def _advance(z: Tensor, k: Tensor, factor: Time) -> Tensor:
    """``z + factor * k``; a tensor factor has one entry per sample."""
    if isinstance(factor, Tensor):
        return torch.addcmul(z, factor.view(-1, 1, 1), k)
    return torch.add(z, k, alpha=factor)


def embedded_step(
    g: VectorField, scheme: str, t: Time, h: Time, y: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One trial step of an embedded pair.

    Args:
        t, h: floats, or ``(batch,)`` tensors when the samples differ.
        y, k1: state and field at ``t``, ``(batch, time, dim)``.

    Returns:
        new state, field at the new state, error estimate: each ``(batch, time, dim)``.
    """
    tableau, error_weights, _ = embedded_pair(scheme)
    stages, z = [k1], y
    for row, c in zip(tableau.a_values[1:], tableau.c_values[1:]):
        z = y
        for coefficient, k in zip(row, stages):
            if coefficient:
                z = _advance(z, k, h * coefficient)
        stages.append(g(t + h * c, z))
    error = None
    for coefficient, k in zip(error_weights, stages):
        if coefficient:
            # Multiplied first and never added to the state: cancellation would drown a small estimate.
            error = k * coefficient if error is None else torch.add(error, k, alpha=coefficient)
    error = error * (h.view(-1, 1, 1) if isinstance(h, Tensor) else h)
    return z, stages[-1], error


@dataclass
class _Progress:
    """Step control of one sample (of the whole batch under batch control). Times in the units of the interval.

    ``h`` is the step to try, ``wish`` the one that the error asks for where the end of a piece does not cut it.
    """

    t: float
    wish: float
    h: float = 0.0
    previous_ratio: float = 1.0
    after_rejection: bool = False
    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0
    largest_ratio: float = 0.0
    status: Status | None = None
    steps: list[tuple[float, float]] = field(default_factory=list)

    def enter(self, end: float) -> None:
        """Go on over the piece that ends there, unless the solve of this sample has failed."""
        if self.status in (None, Status.CONVERGED):
            self.status, self.h = None, min(self.wish, end - self.t)

    def spend(self, evaluations: int, next_trial: int, limit: int) -> None:
        """Count evaluations, or stop where they and the next trial are not within the limit."""
        if self.status is not None:
            return
        if self.evaluations + evaluations + next_trial > limit:
            self.status = Status.BUDGET_SPENT
        else:
            self.evaluations += evaluations

    def record(self, ratio: float, end: float, exponent: int, stages: int, smallest: float) -> bool:
        """Takes the scaled error of a trial and chooses the next step. Returns whether the trial is accepted."""
        self.evaluations += stages - 1
        if not math.isfinite(ratio):
            self.rejected += 1
            self.after_rejection = True
            self.h *= SMALLEST_FACTOR
            if self.h < smallest:
                self.status = Status.NON_FINITE
            return False
        if ratio > 1.0:
            self.rejected += 1
            self.after_rejection = True
            self.h *= max(SMALLEST_FACTOR, SAFETY * ratio ** (-1.0 / exponent))
            if self.h < smallest:
                self.status = Status.STEP_UNDERFLOW
                self.largest_ratio = max(self.largest_ratio, ratio)
            return False
        self.accepted += 1
        self.steps.append((self.t, self.h))
        self.largest_ratio = max(self.largest_ratio, ratio)
        ratio = max(ratio, 1e-8)
        factor = SAFETY * ratio ** (-0.7 / exponent) * self.previous_ratio ** (0.4 / exponent)
        factor = min(1.0 if self.after_rejection else LARGEST_FACTOR, max(SMALLEST_FACTOR, factor))
        # A step that the end of a piece cut short says nothing against the longer one that was wished for.
        cut = self.h < self.wish and not self.after_rejection
        self.wish = max(self.h * factor, self.wish if cut else 0.0)
        self.previous_ratio, self.after_rejection = max(ratio, 1e-4), False
        if self.t + self.h >= end - smallest:
            self.t, self.h, self.status = end, 0.0, Status.CONVERGED
        else:
            self.t += self.h
            self.h = min(self.wish, end - self.t)
        return True


def solve_adaptive(
    f: VectorField,
    y: Tensor,
    duration: float,
    config: AdaptiveConfig,
    layout: Layout = UNPADDED,
    start: float = 0.0,
    keep_states: bool = False,
    penalties: bool = False,
    recompute: bool = False,
    on_trial: Callable[[bool, float], None] | None = None,
    pieces: Sequence[Piece] = (),
    keep_piece_states: bool = False,
) -> AdaptiveResult:
    """Integrates ``dy/dt = f(t, y)`` from ``start`` to ``start + duration``.

    Args:
        f: field, deterministic during the solve, zero at padding.
        y: ``(batch, time, dim)``; a half-precision state is carried in float32 and returned in its own dtype.
        layout: of the batch; padding does not enter the error norm.
        keep_states: return the states after the accepted steps.
        penalties: compute ``energy`` and ``local_error``.
        recompute: keep only the state at each step for the backward pass and evaluate the stages again there: exact
            gradients, memory of one step instead of ``stages`` times all steps.
        on_trial: called with ``(accepted, step)`` after each trial; batch control only.
        pieces: ``f`` cut at the times where it is not smooth; empty: it is smooth. Every sample ends a step at the end
            of each piece and waits there for the others, so that all of them are always in the same piece.
        keep_piece_states: return the states at the ends of the pieces.

    Returns:
        the state with its costs. A solve that runs out of evaluations or into non-finite values returns the last
        accepted state of each sample and says so in ``status``; the sample with the worst ending decides.

    Raises:
        ValueError: the tolerance is below the rounding floor of the state.
    """
    tableau, _, exponent = embedded_pair(config.scheme)
    stages, rows, returned_dtype = tableau.stages, y.shape[0], y.dtype
    dtype = torch.promote_types(y.dtype, torch.float32)
    check_tolerance(config, dtype)
    y = y.to(dtype)
    smallest = SMALLEST_STEP_IN_ROUNDING_UNITS * torch.finfo(dtype).eps * duration
    per_sample = config.step_control == "sample"
    first_step = duration if config.first_step is None else min(config.first_step, duration)
    progress = [_Progress(start, first_step) for _ in range(rows if per_sample else 1)]
    recompute = recompute and torch.is_grad_enabled()

    def mean_square(x: Tensor) -> Tensor:
        return layout.sample_mean(x.square())

    def trial(g, t, h, y, k1):
        y_new, k_new, error = embedded_step(g, config.scheme, t, h, y, k1)
        with torch.no_grad():
            scale = torch.maximum(y.abs(), y_new.abs()).mul_(config.rtol).add_(config.atol)
            ratio = mean_square(error / scale).sqrt()
        if not penalties:
            return y_new, k_new, ratio
        # Trapezoid over the end points: the pairs' own weights are negative in places, and training would exploit it.
        energy = (mean_square(k1) + mean_square(k_new)) * (0.5 * h)
        return y_new, k_new, ratio, energy, (mean_square(error) + torch.finfo(dtype).tiny).sqrt()

    calls, k1 = 0, None
    energy = local_error = y.new_zeros(rows) if penalties else None
    states: list[Tensor] = [y]
    times: list[Time] = [start]
    piece_states: list[Tensor] = []
    for piece in pieces or (Piece(f, start + duration),):
        g, _ = in_state_precision(piece.field, returned_dtype)
        anew = k1 is None or not piece.continues
        for one in progress:
            one.enter(piece.end)
            one.spend(int(anew), stages - 1, config.max_evaluations)
        if anew and any(one.status is None for one in progress):
            k1 = g(start, y)
            calls += 1
            finite = torch.isfinite(k1).flatten(1).all(1).tolist()
            for row, one in enumerate(progress):
                if one.status is None and not (finite[row] if per_sample else all(finite)):
                    one.status = Status.NON_FINITE
        while any(active := [one.status is None for one in progress]):
            t, h = _times_and_steps(progress, active, y)
            if recompute:
                new = checkpoint(trial, g, t, h, y, k1, use_reentrant=False, preserve_rng_state=False)
            else:
                new = trial(g, t, h, y, k1)
            calls += stages - 1
            ratios = new[2].tolist()
            if not per_sample:
                ratios = [math.nan if any(map(math.isnan, ratios)) else max(ratios)]
            broken = [on and not math.isfinite(ratio) for on, ratio in zip(active, ratios)]
            accepted = [False] * len(progress)
            for row, one in enumerate(progress):
                # A trial with non-finite numbers in one sample is dropped for all: kept in the graph, they would
                # reach every parameter's gradient as 0 * nan. The others repeat their step unchanged, free of charge.
                if active[row] and (broken[row] or not any(broken)):
                    step = one.h
                    accepted[row] = one.record(ratios[row], piece.end, exponent, stages, smallest)
                    one.spend(0, stages - 1, config.max_evaluations)
                    if on_trial is not None:
                        on_trial(accepted[row], step)
            if not any(accepted):
                continue
            if all(accepted):
                y, k1 = new[0], new[1]
            else:
                chosen = torch.tensor(accepted, device=y.device).view(-1, 1, 1)
                y, k1 = torch.where(chosen, new[0], y), torch.where(chosen, new[1], k1)
            if penalties:
                mask = torch.tensor(accepted, device=y.device)
                energy = torch.where(mask, energy + new[3], energy)
                local_error = torch.where(mask, local_error + new[4], local_error)
            if keep_states:
                states.append(y)
                reached = {one.t for one in progress}
                times.append(reached.pop() if len(reached) == 1 else y.new_tensor([one.t for one in progress]))
        if keep_piece_states:
            piece_states.append(y)
        start = piece.end

    if not per_sample:
        progress = progress * rows
    return AdaptiveResult(
        state=y.to(returned_dtype),
        evaluations=_per_sample([one.evaluations for one in progress], y),
        residual=y.new_tensor([one.largest_ratio for one in progress]),
        status=Status.worst(one.status for one in progress),
        accepted=_per_sample([one.accepted for one in progress], y),
        rejected=_per_sample([one.rejected for one in progress], y),
        field_calls=calls,
        reached=tuple(one.t for one in progress),
        states=states if keep_states else (),
        times=times if keep_states else (),
        energy=energy,
        local_error=local_error,
        accepted_steps=() if per_sample else tuple(progress[0].steps) if progress else (),
        piece_states=piece_states,
    )


def _times_and_steps(progress: list[_Progress], active: list[bool], y: Tensor) -> tuple[Time, Time]:
    """Floats when every sample stands at the same time with the same step, else ``(batch,)`` tensors."""
    if all(active) and all(one.t == progress[0].t and one.h == progress[0].h for one in progress):
        return progress[0].t, progress[0].h
    steps = [one.h if on else 0.0 for one, on in zip(progress, active)]
    return y.new_tensor([one.t for one in progress]), y.new_tensor(steps)


def _per_sample(counts: list[int], like: Tensor) -> int | Tensor:
    return counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=like.device)
