"""Adaptive explicit Runge-Kutta: embedded pairs, PI step control, one step size per sample.

The first trial step is the whole interval unless told otherwise, so a block of unit depth costs one step (bosh3: 4
evaluations, dopri5 and tsit5: 7) instead of the two evaluations that starting-step heuristics spend before they begin.
Over a depth of many layers an error estimate is worth little at such a step: there the caller gives the first step.

An error estimate supposes a smooth field. One with kinks or jumps in time (weights interpolated between knots) is
handed over as its smooth pieces, and steps end where a piece does: a step across a kink can miss it altogether.

Sources: Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, II.4 (error norm, step control);
Gustafsson, ACM TOMS 17 (1991) (PI control); Pal et al., arXiv 2105.03918 (the error estimate as a regulariser).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.coefficients import Combination
from fairseq_implicit.solvers.gradients.trajectory import Direct
from fairseq_implicit.solvers.precision import entered_in, in_state_precision, state_dtype
from fairseq_implicit.solvers.solver import NOTHING, Keep, Piece, Solution, Solver, Span
from fairseq_implicit.solvers.status import Status
from fairseq_implicit.solvers.tableau import Tableau, get_tableau
from fairseq_implicit.solvers.vector_field import Time, VectorField

PAIRS = ("bosh3", "dopri5", "tsit5")
STEP_CONTROLS = ("sample", "batch")
# A tolerance under this many rounding units asks the estimate to resolve noise: steps shrink without end.
FLOOR_IN_ROUNDING_UNITS = 10.0
# Steps below this share of the interval (in rounding units of the state) no longer move it.
SMALLEST_STEP_IN_ROUNDING_UNITS = 16.0
# Called with whether a trial was accepted and its step.
OnTrial = Callable[[bool, float], None]
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Adaptive(Solver):
    """An embedded pair that chooses its steps: what it may spend and how exact it has to be.

    Attributes:
        scheme: embedded pair, one of ``PAIRS``.
        rtol, atol: each accepted step keeps its error estimate below ``atol + rtol * |state|`` (rms over a sample).
        max_evaluations: evaluations that one sample may cost before the solve stops with ``Status.BUDGET_SPENT``.
        step_control: ``"sample"``: every sample has its own step size, so that batch mates change neither its answer
            nor its evaluations; the field then sees a ``(batch,)`` tensor of times whenever the samples differ.
            ``"batch"``: one step size for all, ruled by the sample with the largest error.
        first_step: first trial step in the units of time; ``None``: the whole interval.
        gradient: how its gradient is formed.
        state_float32: return a half-precision state in float32, for the next block of a stack.

    Raises:
        OptionError: unknown scheme or step control, tolerance or first step not positive, budget under one step.
    """

    kind: ClassVar[str] = "adaptive"
    adaptive: ClassVar[bool] = True

    scheme: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    max_evaluations: int = 1000
    step_control: str = "sample"
    first_step: float | None = None
    gradient: Direct = Direct()
    state_float32: bool = False

    def __post_init__(self):
        self.check_gradient()
        stages = embedded_pair(self.scheme)[0].stages
        check_choice("step_control", self.step_control, STEP_CONTROLS)
        for name, tolerance in (("rtol", self.rtol), ("atol", self.atol)):
            if not (tolerance > 0 and math.isfinite(tolerance)):
                raise OptionError(name, f"a tolerance must be a positive number, got {tolerance}.")
        if self.first_step is not None and not 0 < self.first_step < math.inf:
            raise OptionError("first_step", f"the first step must be a positive time, got {self.first_step}.")
        if self.max_evaluations < stages:
            raise OptionError(
                "max_evaluations",
                f"the budget is {self.max_evaluations}, but the first step of {self.scheme} takes {stages}: raise it "
                f"to at least {stages}.",
            )

    def combination(self, dim: int, norm: Callable[[int], nn.LayerNorm] = nn.LayerNorm) -> Combination:
        """The weights of the stages: always the tableau's b, whose error is estimated."""
        return Combination(embedded_pair(self.scheme)[0])

    def update_cost(self, forward, backward, solves):
        # The last evaluation of a solve is for its error, or for a next step that never comes.
        through = 0 if not self.gradient.along_the_way else solves
        return self.gradient.update_cost(forward - through, backward)[0] + through

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
    ) -> AdaptiveSolution:
        """See :meth:`Solver.integrate`. A half-precision state is carried in float32 and returned in its own dtype.

        Args:
            layout: of the batch; padding does not enter the error norm.
            pieces: every sample ends a step at the end of each piece and waits there for the others, so that all of
                them are always in the same piece.

        Returns:
            the state with its costs. A solve that runs out of evaluations or into non-finite values returns the last
            accepted state of each sample and says so in ``status``; the sample with the worst ending decides.

        Raises:
            OptionError: the tolerance is below the rounding floor of the state.
        """
        if dtype not in (None, x.dtype):
            f = entered_in(f, dtype)
        solve = _Solve(self, x, span, layout, keep)
        for piece in pieces or (Piece(f, span.start + span.length),):
            solve.over(piece)
        return solve.result()

    def watched(self, f: VectorField, x: Tensor, span: Span, layout: Layout, on_trial: OnTrial) -> AdaptiveSolution:
        """:meth:`integrate`, with ``on_trial(accepted, step)`` called after each trial; batch control only."""
        solve = _Solve(self, x, span, layout, NOTHING, on_trial)
        solve.over(Piece(f, span.start + span.length))
        return solve.result()


@dataclass(frozen=True)
class AdaptiveSolution(Solution):
    """A :class:`Solution` with the history of the step control.

    Attributes:
        accepted_steps: ``(time, step)`` of each accepted step under batch control, the grid that a later
            solve can replay; empty under sample control.
        piece_states: the state at the end of each piece of the field when they were asked for.
    """

    accepted_steps: Sequence[tuple[float, float]] = ()
    piece_states: Sequence[Tensor] = ()


@cache
def embedded_pair(scheme: str) -> tuple[Tableau, tuple[float, ...], int]:
    """The tableau of that name, the weights of its error estimate (b minus b-hat), and the estimate's order in h.

    Raises:
        OptionError: the scheme has no embedded weights, or its last stage is not its new state (the loop takes the
            last stage of a step as the first of the next one).
    """
    tableau = get_tableau(scheme)
    b_hats, order = tableau.b_hat_values, tableau.embedded_order
    if b_hats is None or order is None or not tableau.first_same_as_last:
        raise OptionError(
            "scheme",
            f"{scheme!r} has no embedded error estimate for adaptive steps: choose one of {', '.join(PAIRS)}, or take "
            "fixed steps with `tolerance` 0.",
        )
    weights = tuple(b - b_hat for b, b_hat in zip(tableau.b_values, b_hats, strict=True))
    return tableau, weights, min(tableau.order, order) + 1


def check_tolerance(config: Adaptive, dtype: torch.dtype) -> None:
    """Raises:
    OptionError: the tolerance is below what the dtype of the state can resolve.
    """
    floor = FLOOR_IN_ROUNDING_UNITS * torch.finfo(dtype).eps
    if config.rtol < floor:
        raise OptionError(
            "tolerance", f"{config.rtol:g} is below the floor of a {str(dtype)[6:]} state ({floor:.1e}): raise it."
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
    for row, c in zip(tableau.a_values[1:], tableau.c_values[1:], strict=True):
        z = y
        for coefficient, k in zip(row, stages, strict=True):
            if coefficient:
                z = _advance(z, k, h * coefficient)
        stages.append(g(t + h * c, z))
    (first, k), *others = ((weight, k) for weight, k in zip(error_weights, stages, strict=True) if weight)
    # Multiplied first and never added to the state: cancellation would drown a small estimate.
    error = k * first
    for weight, k in others:
        error = torch.add(error, k, alpha=weight)
    return z, stages[-1], error * (h.view(-1, 1, 1) if isinstance(h, Tensor) else h)


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


def _trial(
    config: Adaptive, layout: Layout, penalties: bool, g: VectorField, t: Time, h: Time, y: Tensor, k1: Tensor
) -> tuple[Tensor, ...]:
    """New state, field there, scaled error ``(batch,)``; with ``penalties`` also their parts in this step."""

    def mean_square(x: Tensor) -> Tensor:
        return layout.sample_mean(x.square())

    y_new, k_new, error = embedded_step(g, config.scheme, t, h, y, k1)
    with torch.no_grad():
        scale = torch.maximum(y.abs(), y_new.abs()).mul_(config.rtol).add_(config.atol)
        ratio = mean_square(error / scale).sqrt()
    if not penalties:
        return y_new, k_new, ratio
    # Trapezoid over the end points: the pairs' own weights are negative in places, and training would exploit it.
    energy = (mean_square(k1) + mean_square(k_new)) * (0.5 * h)
    return y_new, k_new, ratio, energy, (mean_square(error) + torch.finfo(y.dtype).tiny).sqrt()


class _Solve:
    """One adaptive solve: the state, its progress in time, and what is kept of the way."""

    def __init__(
        self, config: Adaptive, y: Tensor, span: Span, layout: Layout, keep: Keep, on_trial: OnTrial | None = None
    ):
        self.config, self.layout, self.keep, self.on_trial = config, layout, keep, on_trial
        self.returned_dtype, dtype = y.dtype, state_dtype(y.dtype)
        check_tolerance(config, dtype)
        tableau, _, self.exponent = embedded_pair(config.scheme)
        self.stages = tableau.stages
        self.y, self.start = y.to(dtype), span.start
        # The field at the state, once it has been evaluated.
        self.k1, self.evaluated = self.y, False
        self.smallest = SMALLEST_STEP_IN_ROUNDING_UNITS * torch.finfo(dtype).eps * span.length
        self.per_sample = config.step_control == "sample"
        first_step = span.length if config.first_step is None else min(config.first_step, span.length)
        self.progress = [_Progress(span.start, first_step) for _ in range(y.shape[0] if self.per_sample else 1)]
        # Of what the graph may hold: not of the solve, whose state holds the graph.
        trial = partial(_trial, config, layout, keep.penalties)
        self.step = config.gradient.around_step(trial, replay_random=False)
        self.calls = 0
        self.energy = self.local_error = self.y.new_zeros(y.shape[0]) if keep.penalties else None
        self.states: list[Tensor] = [self.y]
        self.times: list[Time] = [span.start]
        self.piece_states: list[Tensor] = []

    def over(self, piece: Piece) -> None:
        """Go on to the end of ``piece``."""
        g, _ = in_state_precision(piece.field, self.returned_dtype)
        self._enter(g, piece)
        while any(active := [one.status is None for one in self.progress]):
            t, h = _times_and_steps(self.progress, active, self.y)
            new = self.step(g, t, h, self.y, self.k1)
            self.calls += self.stages - 1
            accepted = self._judge(new[2], active, piece.end)
            if any(accepted):
                self._accept(new, accepted)
        self.piece_states.append(self.y)
        self.start = piece.end

    def _enter(self, g: VectorField, piece: Piece) -> None:
        """Evaluate the field where the piece begins, unless the step before has done it."""
        anew = not (self.evaluated and piece.continues)
        for one in self.progress:
            one.enter(piece.end)
            one.spend(int(anew), self.stages - 1, self.config.max_evaluations)
        if anew and any(one.status is None for one in self.progress):
            self.k1, self.evaluated = g(self.start, self.y), True
            self.calls += 1
            finite = torch.isfinite(self.k1).flatten(1).all(1).tolist()
            for row, one in enumerate(self.progress):
                if one.status is None and not (finite[row] if self.per_sample else all(finite)):
                    one.status = Status.NON_FINITE

    def _judge(self, scaled_errors: Tensor, active: list[bool], end: float) -> list[bool]:
        """Which of the samples accept a trial of that scaled error; the others, and these, get their next step."""
        ratios: list[float] = scaled_errors.tolist()
        if not self.per_sample:
            ratios = [math.nan if any(map(math.isnan, ratios)) else max(ratios)]
        broken = [on and not math.isfinite(ratio) for on, ratio in zip(active, ratios, strict=True)]
        accepted = [False] * len(self.progress)
        for row, one in enumerate(self.progress):
            # A trial with non-finite numbers in one sample is dropped for all: kept in the graph, they would reach
            # every parameter's gradient as 0 * nan. The others repeat their step unchanged, free of charge.
            if active[row] and (broken[row] or not any(broken)):
                step = one.h
                accepted[row] = one.record(ratios[row], end, self.exponent, self.stages, self.smallest)
                one.spend(0, self.stages - 1, self.config.max_evaluations)
                if self.on_trial is not None:
                    self.on_trial(accepted[row], step)
        return accepted

    def _accept(self, new: tuple[Tensor, ...], accepted: list[bool]) -> None:
        """Take the trial's state where it is accepted."""
        if all(accepted):
            self.y, self.k1 = new[0], new[1]
        else:
            chosen = torch.tensor(accepted, device=self.y.device).view(-1, 1, 1)
            self.y, self.k1 = torch.where(chosen, new[0], self.y), torch.where(chosen, new[1], self.k1)
        if self.energy is not None and self.local_error is not None:
            mask = torch.tensor(accepted, device=self.y.device)
            self.energy = torch.where(mask, self.energy + new[3], self.energy)
            self.local_error = torch.where(mask, self.local_error + new[4], self.local_error)
        if self.keep.states:
            self.states.append(self.y)
            reached = {one.t for one in self.progress}
            self.times.append(
                reached.pop() if len(reached) == 1 else self.y.new_tensor([one.t for one in self.progress])
            )

    def result(self) -> AdaptiveSolution:
        y, alone = self.y, self.per_sample
        progress = self.progress if alone else self.progress * y.shape[0]
        return AdaptiveSolution(
            state=y.to(self.returned_dtype),
            evaluations=_per_sample([one.evaluations for one in progress], y),
            residual=y.new_tensor([one.largest_ratio for one in progress]),
            status=Status.worst(one.status for one in progress if one.status is not None),
            accepted=_per_sample([one.accepted for one in progress], y),
            rejected=_per_sample([one.rejected for one in progress], y),
            field_calls=self.calls,
            reached=tuple(one.t for one in progress),
            states=self.states if self.keep.states else (),
            times=self.times if self.keep.states else (),
            energy=self.energy,
            local_error=self.local_error,
            weights=(embedded_pair(self.config.scheme)[0].b_values,),
            accepted_steps=() if alone else tuple(progress[0].steps) if progress else (),
            piece_states=self.piece_states,
        )


def _times_and_steps(progress: list[_Progress], active: list[bool], y: Tensor) -> tuple[Time, Time]:
    """Floats when every sample stands at the same time with the same step, else ``(batch,)`` tensors."""
    if all(active) and all(one.t == progress[0].t and one.h == progress[0].h for one in progress):
        return progress[0].t, progress[0].h
    steps = [one.h if on else 0.0 for one, on in zip(progress, active, strict=True)]
    return y.new_tensor([one.t for one in progress]), y.new_tensor(steps)


def _per_sample(counts: list[int], like: Tensor) -> int | Tensor:
    return counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=like.device)
