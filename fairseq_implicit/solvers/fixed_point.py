"""Fixed points ``z = f(z)``, sample by sample: damped Picard, Anderson and Broyden.

One batch is many independent problems. Every norm, Gram matrix and inner product is taken per sample and over real
tokens only, every decision (converged, stalled, diverged, damped) is a decision about one sample, and selections are
made with ``where``, never by multiplying with a mask, so that a NaN in one sample cannot reach its neighbours.

Sources: Walker and Ni 2011 (Anderson, constrained form); Broyden 1965 and Bai et al. 2019, arXiv 1909.01377 (limited
memory inverse updates for equilibrium models).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.anderson import Anderson
from fairseq_implicit.solvers.broyden import Broyden, columns_within
from fairseq_implicit.solvers.picard import Picard
from fairseq_implicit.solvers.precision import Autocast, field_dtype, state_dtype
from fairseq_implicit.solvers.status import SolveResult, Status
from fairseq_implicit.solvers.vector_field import StateMap

_TINY = torch.finfo(torch.float32).tiny

CRITERIA = ("relative", "rms", "absolute")

# A relative residual cannot fall below the rounding of one evaluation of the field; the floors leave a small margin.
TOLERANCE_FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
DEFAULT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# The ridge is relative to the mean squared residual in the window, so it keeps its meaning as residuals shrink.
DEFAULT_RIDGE = {torch.float64: 1e-8, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}

DIVERGENCE_FACTOR = 10.0  # a residual this many times its first value is a divergence, not a bad step
STAGNATION_SPREAD = 1.3  # max / min of the last residuals below which nothing moves any more ...
STAGNATION_MARGIN = 3.0  # ... which ends the solve only this close to the tolerance: rounding, not slowness
TRACKING_MARGIN = 2.0  # the next evaluation is tracked when it is predicted to end within this many tolerances
COMPACTION_SHARE = 0.5  # rows are compacted when fewer than this share of them is still active


@dataclass(frozen=True)
class FixedPointConfig:
    """How a fixed point is sought.

    Attributes:
        method: a name of `METHODS`.
        max_iter: evaluation budget per solve; every evaluation of the field counts, the first included.
        tol: tolerance in the chosen criterion; ``None`` takes the default of the field's precision
            (1e-6 in float64, 1e-3 in float32 and float16, 1e-2 in bfloat16).
        criterion: ``relative`` ‖f(z) − z‖ / ‖f(z)‖, ``rms`` ‖f(z) − z‖ / √(real tokens · dim), or ``absolute``.
        damping: Picard's τ in ``z + τ (f(z) − z)`` and Anderson's mixing β, in (0, 1].
        window: residuals that Anderson combines.
        ridge: Anderson's ridge, relative to the mean squared residual of the window; ``None`` by precision.
        memory: cap in MiB on Broyden's stored updates; when they are full the approximation restarts.
        freeze: rows stop moving once converged, so that a sample's answer does not depend on its batch mates.
        compact: drop converged rows from the evaluations when under half of them remain (needs ``freeze`` and a
            :class:`StateMap` that can be restricted to some of them).
        stagnation_window: residuals that must have stopped moving, near the tolerance, to end a sample.

    Raises:
        OptionError: an option is out of range or contradicts another.
    """

    method: str = "anderson"
    max_iter: int = 30
    tol: float | None = None
    criterion: str = "relative"
    damping: float = 1.0
    window: int = 6
    ridge: float | None = None
    memory: float = 1024.0
    freeze: bool = True
    compact: bool = False
    stagnation_window: int = 6

    def __post_init__(self):
        check_choice("solver", self.method, tuple(METHODS))
        check_choice("criterion", self.criterion, CRITERIA)
        if self.max_iter < 1:
            raise OptionError("max_iter", f"a budget of {self.max_iter} evaluations finds nothing; give at least 1.")
        if self.tol is not None and not (math.isfinite(self.tol) and self.tol > 0):
            raise OptionError("tol", f"the tolerance {self.tol} is not a positive number.")
        if not 0.0 < self.damping <= 1.0:
            raise OptionError("damping", f"{self.damping} is outside (0, 1].")
        if self.window < 1:
            raise OptionError("window", f"Anderson needs a window of at least 1 residual, got {self.window}.")
        if self.ridge is not None and self.ridge < 0:
            raise OptionError("ridge", f"the ridge {self.ridge} is negative.")
        if self.memory <= 0:
            raise OptionError("memory", f"a cap of {self.memory} MiB leaves Broyden no memory.")
        if self.compact and not self.freeze:
            raise OptionError("compact", "row compaction drops converged rows, so it needs frozen rows.")
        if self.stagnation_window < 2:
            raise OptionError("stagnation_window", f"{self.stagnation_window} residuals cannot show a trend; give 2.")

    def metric(self, layout: Layout, f_z: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        """What the tolerance is compared with, ``(batch,)`` float64.

        Args:
            layout: of the batch.
            f_z, residual: ``f(z)`` and ``f(z) - z``, ``(batch, time, dim)``.
            scale: ``(batch,)`` norms that replace ‖f(z)‖ in the relative criterion.
        """
        norm = layout.norm(residual)
        if self.criterion == "relative":
            return norm / ((layout.norm(f_z) if scale is None else scale.double()) + _TINY)
        return norm / layout.sizes(residual).clamp(min=1).double().sqrt() if self.criterion == "rms" else norm

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance for a field that computes in ``dtype``.

        Raises:
            OptionError: the tolerance lies below what ``dtype`` can resolve.
        """
        if self.tol is None:
            return DEFAULT_TOLERANCE[dtype]
        if self.criterion != "absolute" and self.tol < TOLERANCE_FLOOR[dtype]:
            raise OptionError(
                "tol",
                f"{self.tol:g} lies below the residual that {str(dtype).removeprefix('torch.')} can reach; "
                f"give at least {TOLERANCE_FLOOR[dtype]:g} or a wider dtype.",
            )
        return self.tol


@dataclass(frozen=True, kw_only=True)
class FixedPointResult(SolveResult):
    """A :class:`SolveResult` with per-sample verdicts.

    Attributes:
        evaluations, residual: ``(batch,)``.
        converged: ``(batch,)`` bool.
        tolerance: the tolerance that was applied.
        iterates: evaluation number -> the state it was given, for the numbers asked for.
        tracked: ``(anchor, f(anchor))`` with a graph, where the last evaluation was made with one and its state is
            the answer of every sample.
    """

    evaluations: Tensor
    residual: Tensor = field()  # without the default that the base gives it
    converged: Tensor
    tolerance: float
    iterates: dict[int, Tensor] = field(default_factory=dict)
    tracked: tuple[Tensor, Tensor] | None = None

    def sentence(self) -> str:
        """One sentence with the numbers: how many samples, how many evaluations, the worst residual."""
        return (
            f"{self.status.value}: {int(self.converged.sum())} of {self.converged.numel()} samples converged to "
            f"{self.tolerance:g}, worst residual {float(self.residual.max()):.2e} "
            f"after {int(self.evaluations.max())} evaluations"
        )


def _anderson(config: FixedPointConfig, z: Tensor, dtype: torch.dtype) -> Anderson:
    return Anderson(z, config.window, DEFAULT_RIDGE[dtype] if config.ridge is None else config.ridge)


def _broyden(config: FixedPointConfig, z: Tensor, dtype: torch.dtype) -> Broyden:
    columns = columns_within(config.memory, z)
    if columns < 1:
        need = 2 * z.numel() * z.element_size() / 2**20
        raise OptionError(
            "memory",
            f"one Broyden update of this batch takes {need:.1f} MiB and the cap is {config.memory:g} MiB; "
            "raise the cap, shrink the batch or take anderson.",
        )
    return Broyden(z, min(columns, config.max_iter))


#: What gives the next state, by the name of the method: ``(config, z, dtype of the field) -> `` an object for one solve
#: with the methods of `Picard`. A new method is one entry; ``--deq-solver`` and the implicit steps take it by its name.
METHODS: dict[str, Callable[[FixedPointConfig, Tensor, torch.dtype], Picard]] = {
    "picard": lambda config, z, dtype: Picard(),
    "anderson": _anderson,
    "broyden": _broyden,
}


@dataclass(slots=True)
class _Sample:
    """What the residuals of one sample have shown so far.

    Plain numbers: a decision about a sample is a few comparisons, and as operations on tensors of one number per sample
    they would cost more than the norms that they are about, on a CPU as on a GPU.

    Attributes:
        recent: its last residuals, infinite where one was not finite or there was none yet.
        residual: that of the best state met.
        first: its first finite residual.
        active: whether its state still moves.
        improved, diverged, hopeless: what its last evaluation was; hopeless: not finite, and nothing to return to.
        damping: halved by every divergence.
    """

    recent: list[float]
    residual: float = math.inf
    first: float = math.inf
    active: bool = True
    improved: bool = False
    diverged: bool = False
    hopeless: bool = False
    converged: bool = False
    stalled: bool = False
    broken: bool = False
    evaluations: int = 0
    damping: float = 1.0

    @property
    def settled(self) -> bool:
        return self.converged or self.stalled or self.hopeless

    def judge(self, metric: float, tol: float) -> None:
        """Take in the residual of an evaluation."""
        self.improved = self.diverged = False
        if not self.active:
            return
        finite, reached = math.isfinite(metric), metric < tol
        self.evaluations += 1
        self.recent = [*self.recent[1:], metric if finite else math.inf]
        if finite and math.isinf(self.first):
            self.first = metric
        self.improved = finite and metric < self.residual
        self.diverged = not reached and not (finite and metric <= DIVERGENCE_FACTOR * self.first)
        self.hopeless = self.diverged and not finite and math.isinf(self.residual)
        self.converged = self.converged or reached
        self.stalled = self.stalled or (not reached and self._moves_no_more(tol))
        if self.improved:
            self.residual = metric

    def _moves_no_more(self, tol: float) -> bool:
        highest, lowest = max(self.recent), min(self.recent)
        flat = math.isfinite(highest) and highest < STAGNATION_SPREAD * lowest
        return flat and lowest < STAGNATION_MARGIN * tol

    def is_about_to_end(self, tol: float) -> bool:
        """Whether the next residual, predicted by the rate of the last two, is near the tolerance or below."""
        previous, metric = self.recent[-2:]
        rate = metric / previous if metric < previous < math.inf else 1.0
        return metric * rate < TRACKING_MARGIN * tol


@torch.no_grad()
def solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    config: FixedPointConfig,
    layout: Layout = UNPADDED,
    scale: Tensor | None = None,
    capture: Sequence[int] = (),
    precision: torch.dtype | None = None,
    linear: bool = False,
    track: bool = False,
) -> FixedPointResult:
    """Find ``z = f(z)`` for every sample of a batch, without a graph.

    The state is iterated in float32 (float64 stays), whatever precision ``f`` computes in; autocast is off for the
    solver's own algebra and as the caller left it inside ``f``.

    Args:
        f: ``(batch, time, dim) -> (batch, time, dim)``; with ``config.compact`` a :class:`StateMap`.
        z0: start, ``(batch, time, dim)``. Padding is set to zero and stays there.
        config: method, budget, tolerance, safeguards.
        layout: of the batch.
        scale: ``(batch,)`` norms that replace ‖f(z)‖ in the relative criterion (an adjoint is measured against its
            right-hand side).
        capture: counts; the state handed to the evaluation of that number (1 is the start) is returned in
            ``iterates``. A solve that ends earlier gives its answer instead.

        precision: what ``f`` computes in, where ``z0`` and autocast do not show it.
        linear: ``f`` is affine and ``scale`` is given (an adjoint equation): the residual of Anderson's mixture is then
            known without evaluating it, which saves the evaluation that would only confirm it.
        track: evaluate with a graph when the solve is about to end, for ``tracked``: whoever needs ``f(z*)`` with a
            graph is spared evaluating it again. A wrong prediction costs a graph that is dropped at once.

    Returns:
        The iterate of smallest residual for each sample, in ``z0``'s dtype, and how it was reached. The residual is
        that of the returned state. Rows whose very first evaluation is not finite keep ``z0``.

    Raises:
        OptionError: the tolerance is out of the dtype's reach, or Broyden's cap holds not one update.
    """
    dtype = field_dtype(z0) if precision is None else precision
    tol = config.tolerance_for(dtype)
    autocast = Autocast(z0.device)

    def evaluate(function, state: Tensor) -> Tensor:
        if not autocast.enabled:
            return function(state.to(z0.dtype))
        with autocast.on():
            return function(state.to(z0.dtype))

    with autocast.off():
        start = z0.to(state_dtype(z0.dtype))
        iteration = _Iteration(f, start, config, tol, dtype, layout, scale, evaluate, linear, track, capture)
        best, iterates, tracked = iteration.run()
    samples, device = iteration.samples, z0.device
    return FixedPointResult(
        state=best.to(z0.dtype),
        evaluations=torch.tensor([sample.evaluations for sample in samples], dtype=torch.long, device=device),
        residual=torch.tensor([sample.residual for sample in samples], dtype=best.dtype, device=device),
        status=_status(samples),
        converged=torch.tensor([sample.converged for sample in samples], dtype=torch.bool, device=device),
        tolerance=tol,
        iterates={count: iterate.to(z0.dtype) for count, iterate in iterates.items()},
        tracked=tracked,
    )


def _status(samples: list[_Sample]) -> Status:
    if all(sample.converged for sample in samples):
        return Status.CONVERGED
    if any(sample.broken and not sample.converged for sample in samples):
        return Status.NON_FINITE
    settled = all(sample.converged or sample.stalled for sample in samples)
    return Status.STAGNATED if settled else Status.BUDGET_SPENT


class _Iteration:
    """One solve: the state, the samples still in it, and what is known about how it goes on.

    ``samples`` are those of the caller's batch, ``rows`` those that are still evaluated, ``index`` their places in it
    (``None`` while that is all of them), and ``best`` the best state met by each of the rows.

    Args:
        f: the map, see :func:`solve`, as are the others.
        z: the start in the solver's precision.
        tol: the tolerance for the field's precision ``dtype``.
        evaluate: ``(f, z) -> f(z)`` in the caller's surroundings.
    """

    def __init__(
        self,
        f: StateMap | Callable[[Tensor], Tensor],
        z: Tensor,
        config: FixedPointConfig,
        tol: float,
        dtype: torch.dtype,
        layout: Layout,
        scale: Tensor | None,
        evaluate: Callable[[Callable, Tensor], Tensor],
        linear: bool,
        track: bool,
        capture: Sequence[int],
    ):
        self.f, self.config, self.tol, self.layout, self.scale = f, config, tol, layout, scale
        self.evaluate, self.linear, self.track = evaluate, linear, track
        self.z = layout.keep(z)
        self.samples = [_Sample([math.inf] * config.stagnation_window) for _ in range(z.shape[0])]
        self.rows = self.samples
        self.index: Tensor | None = None
        self.best = self.answer = self.z
        self.acceleration = METHODS[config.method](config, self.z, dtype)
        self.damping = None if config.damping == 1.0 else self._damping()
        self.wanted = set(capture)
        self.iterates: dict[int, Tensor] = {}
        self.compact = config.compact and not self.wanted
        self.tracked: tuple[Tensor, Tensor] | None = None
        self.ending = config.max_iter == 1

    def run(self) -> tuple[Tensor, dict[int, Tensor], tuple[Tensor, Tensor] | None]:
        """The answers of all samples, the states asked for, and the last evaluation with its graph if it is theirs."""
        for count in range(1, self.config.max_iter + 1):
            if count in self.wanted:
                self.iterates[count] = self.z
            f_z = self._evaluated()
            residual = f_z - self.z
            self._judge(f_z, residual)
            if not self._moving() or count == self.config.max_iter:
                break
            if any(row.diverged for row in self.rows):
                following = self._restarted(f_z, residual)
            else:
                following = self.acceleration.step(self.z, f_z, residual, self.damping)
            if self.linear and self.acceleration.knows_residual:
                self._foresee(following)
            moving = self._moving()
            if not moving:
                break
            self.z = self._select([row.active for row in self.rows], following, self.z)
            self.ending = self.ending or count + 1 == self.config.max_iter
            if self.compact and len(moving) < COMPACTION_SHARE * len(self.rows):
                self._drop_all_but(torch.tensor(moving, device=self.z.device))
        return self._answers()

    def _moving(self) -> list[int]:
        return [place for place, row in enumerate(self.rows) if row.active]

    def _select(self, chosen: list[bool], these: Tensor, others: Tensor) -> Tensor:
        """``these`` states in the ``chosen`` rows, the ``others`` elsewhere; no copy where one of them is all."""
        if all(chosen):
            return these
        if not any(chosen):
            return others
        return torch.where(torch.tensor(chosen, device=these.device)[:, None, None], these, others)

    def _damping(self) -> Tensor:
        """``(batch, 1, 1)``."""
        return self.z.new_tensor([row.damping * self.config.damping for row in self.rows])[:, None, None]

    def _evaluated(self) -> Tensor:
        """``f(z)`` at real tokens, with a graph kept where the solve is about to end."""
        self.tracked = None  # dropped before the next graph is made
        if not (self.track and self.ending):
            return self.layout.keep(self.evaluate(self.f, self.z).to(self.z.dtype))
        with torch.enable_grad():
            anchor = self.z.detach().clone().requires_grad_()
            self.tracked = anchor, self.evaluate(self.f, anchor)
        return self.layout.keep(self.tracked[1].detach().to(self.z.dtype))

    def _restarted(self, f_z: Tensor, residual: Tensor) -> Tensor:
        """The next state where some rows go back to their best one, with half the damping and nothing remembered."""
        fallen = [row.diverged for row in self.rows]
        diverged = torch.tensor(fallen, device=self.z.device)
        for row in self.rows:
            row.damping = row.damping / 2 if row.diverged else row.damping
        self.damping = self._damping()
        self.acceleration.forget(diverged)
        f_z = self._select(fallen, self.best, f_z)
        residual = torch.where(diverged[:, None, None], 0.0, residual)
        following = self.acceleration.step(self._select(fallen, self.best, self.z), f_z, residual, self.damping)
        self.acceleration.forget(diverged)
        return self._select(fallen, self.best, following)

    def _drop_all_but(self, chosen: Tensor) -> None:
        """Go on with the ``chosen`` rows only, if the map can be restricted to them."""
        subset = cast(StateMap, self.f).rows(chosen)  # what `compact` asks of the map
        if subset is None:
            self.compact = False
            return
        self._write_answers()
        self.f, self.z, self.acceleration = subset, self.z[chosen], self.acceleration.rows(chosen)
        self.layout = self.layout.rows(chosen)
        self.scale = None if self.scale is None else self.scale[chosen]
        self.rows = [self.rows[place] for place in chosen.tolist()]
        self.index = chosen if self.index is None else self.index[chosen]
        self.best = self.best[chosen]
        self.damping = None if self.damping is None else self.damping[chosen]

    def _write_answers(self) -> None:
        """Put the best states of the rows into the answers of the whole batch."""
        if self.index is None:
            self.answer = self.best
        else:
            self.answer = self.answer.index_copy(0, self.index, self.best)

    def _answers(self) -> tuple[Tensor, dict[int, Tensor], tuple[Tensor, Tensor] | None]:
        self._write_answers()
        for count in self.wanted - self.iterates.keys():
            self.iterates[count] = self.answer
        ours = self.answer is self.z or (self.index is None and torch.equal(self.answer, self.z))
        return self.answer, self.iterates, self.tracked if ours else None

    def _judge(self, f_z: Tensor, residual: Tensor) -> None:
        """Settle each row's fate after an evaluation."""
        # The one read from the device per evaluation.
        metric = self.config.metric(self.layout, f_z, residual, self.scale).tolist()
        for row, value in zip(self.rows, metric, strict=True):
            row.judge(value, self.tol)
        if any(row.diverged and math.isinf(row.recent[-1]) for row in self.rows):
            # Remembered to the end, wherever the solve went afterwards; a step that left the numbers is no fault of the
            # field's.
            sound = self.z.isfinite().flatten(1).all(1).tolist()
            for row, start in zip(self.rows, sound, strict=True):
                row.broken = row.broken or (row.diverged and math.isinf(row.recent[-1]) and start)
        # Without freezing nobody rests until everybody may.
        together = self.config.freeze or all(row.settled for row in self.rows)
        for row in self.rows:
            row.active = row.active and not (row.settled and together)
        self.ending = all(not row.active or row.is_about_to_end(self.tol) for row in self.rows)
        self.best = self._select([row.improved for row in self.rows], self.z, self.best)

    def _foresee(self, following: Tensor) -> None:
        """End the rows of an affine map whose mixture meets the tolerance.

        The Gram matrix says cheaply which rows may have ended: rounding in it, amplified by large weights, can pass
        for convergence. Only the mixed residual itself decides.
        """
        scale = 1.0 if self.scale is None else self.scale.double() + _TINY
        expected = (self.acceleration.expected_residual() / scale).tolist()
        # A damped step is not the map of the mixture. Whether a row is damped is its own matter, not its neighbours'.
        promising = [
            row.active and row.damping * self.config.damping == 1.0 and value < self.tol
            for row, value in zip(self.rows, expected, strict=True)
        ]
        if not any(promising):
            return
        mixed_residual = self.acceleration.mixed_residual()
        norm = (self.layout.norm(mixed_residual) / scale).tolist()
        reached = [hopeful and value < self.tol for hopeful, value in zip(promising, norm, strict=True)]
        self.best = self._select(reached, following - mixed_residual, self.best)
        for row, end, value in zip(self.rows, reached, norm, strict=True):
            if end:
                row.residual, row.converged, row.active = value, True, False
