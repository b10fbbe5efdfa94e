"""Fixed points ``z = f(z)``, sample by sample: damped Picard, Anderson and Broyden.

One batch is many independent problems. Every norm, Gram matrix and inner product is taken per sample and over real
tokens only, every decision (converged, stalled, diverged, damped) is a decision about one sample, and selections are
made with ``where``, never by multiplying with a mask, so that a NaN in one sample cannot reach its neighbours.

Sources: Walker and Ni 2011 (Anderson, constrained form); Broyden 1965 and Bai et al. 2019, arXiv 1909.01377 (limited
memory inverse updates for equilibrium models).
"""

import copy
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


class _Rows:
    """Per-sample bookkeeping of one solve, for the rows still in the batch.

    ``index`` names each row's place in the caller's batch; ``None`` while nobody has been dropped.
    """

    def __init__(self, z: Tensor, window: int):
        batch = z.shape[0]
        self.index: Tensor | None = None
        self.best = z
        self.best_residual = torch.full((batch,), math.inf, dtype=torch.float64, device=z.device)
        self.first = torch.full_like(self.best_residual, math.inf)
        self.recent = torch.full((window, batch), math.inf, dtype=torch.float64, device=z.device)
        self.active = torch.ones(batch, dtype=torch.bool, device=z.device)
        self.converged = torch.zeros_like(self.active)
        self.stalled = torch.zeros_like(self.active)
        self.broken = torch.zeros_like(self.active)
        self.evaluations = torch.zeros(batch, dtype=torch.long, device=z.device)
        self.damping = torch.ones(batch, 1, 1, dtype=z.dtype, device=z.device)

    _PER_ROW = ("best", "best_residual", "first", "active", "converged", "stalled", "broken", "evaluations", "damping")

    def keep(self, chosen: Tensor) -> None:
        """Drop every row but the ``chosen`` ones."""
        for name in self._PER_ROW:
            setattr(self, name, getattr(self, name)[chosen])
        self.recent = self.recent[:, chosen]
        self.index = chosen if self.index is None else self.index[chosen]

    def split_off(self, whole: "_Rows") -> "_Rows":
        """Rows of the whole batch that hold the answers so far, before some rows leave."""
        if self is not whole:
            self.write_into(whole)
            return whole
        return copy.copy(self)

    def write_into(self, whole: "_Rows") -> None:
        """Put these rows' answers into the full-size ``whole``."""
        for name in ("best", "best_residual", "converged", "stalled", "broken", "evaluations"):
            target = getattr(whole, name).clone()
            target[self.index] = getattr(self, name)
            setattr(whole, name, target)


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
        rows, iterates, tracked = iteration.run()
    return FixedPointResult(
        state=rows.best.to(z0.dtype),
        evaluations=rows.evaluations,
        residual=rows.best_residual.to(rows.best.dtype),
        status=_status(rows),
        converged=rows.converged,
        tolerance=tol,
        iterates={count: iterate.to(z0.dtype) for count, iterate in iterates.items()},
        tracked=tracked,
    )


def _status(rows: _Rows) -> Status:
    converged, broken, settled = torch.stack(
        [rows.converged.all(), (rows.broken & ~rows.converged).any(), (rows.converged | rows.stalled).all()]
    ).tolist()
    if converged:
        return Status.CONVERGED
    if broken:
        return Status.NON_FINITE
    return Status.STAGNATED if settled else Status.BUDGET_SPENT


class _Iteration:
    """One solve: the state, the rows still in it, and what is known about how it goes on.

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
        self.whole = self.rows = _Rows(self.z, config.stagnation_window)
        self.acceleration = METHODS[config.method](config, self.z, dtype)
        self.damping = None if config.damping == 1.0 else self.rows.damping * config.damping
        self.wanted = set(capture)
        self.iterates: dict[int, Tensor] = {}
        self.compact = config.compact and not self.wanted
        self.tracked: tuple[Tensor, Tensor] | None = None
        self.ending = config.max_iter == 1

    def run(self) -> tuple[_Rows, dict[int, Tensor], tuple[Tensor, Tensor] | None]:
        """The answers of all rows, the states asked for, and the last evaluation with its graph where it is theirs."""
        for count in range(1, self.config.max_iter + 1):
            if count in self.wanted:
                self.iterates[count] = self.z
            f_z = self._evaluated()
            residual = f_z - self.z
            remaining, any_diverged, self.ending, diverged = self._judge(self.rows, self.z, f_z, residual)
            if any_diverged:
                # Remembered to the end, wherever the solve went afterwards; a step that left the numbers is no fault
                # of the field's.
                fault = diverged & self.rows.recent[-1].isinf() & self.z.isfinite().flatten(1).all(1)
                self.rows.broken = self.rows.broken | fault
            if remaining == 0 or count == self.config.max_iter:
                break
            if any_diverged:
                following = self._restarted(diverged, f_z, residual)
            else:
                following = self.acceleration.step(self.z, f_z, residual, self.damping)
                if self.linear and self.damping is None and self.acceleration.knows_residual:
                    remaining = self._foresee(self.rows, self.acceleration, following)
                    if remaining == 0:
                        break
            moving = self.rows.active
            whole = remaining == self.z.shape[0]
            self.z = following if whole else torch.where(moving[:, None, None], following, self.z)
            self.ending = self.ending or count + 1 == self.config.max_iter
            if self.compact and remaining < COMPACTION_SHARE * self.z.shape[0]:
                self._drop_all_but(moving.nonzero().squeeze(1))
        return self._answers()

    def _evaluated(self) -> Tensor:
        """``f(z)`` at real tokens, with a graph kept where the solve is about to end."""
        self.tracked = None  # dropped before the next graph is made
        if not (self.track and self.ending):
            return self.layout.keep(self.evaluate(self.f, self.z).to(self.z.dtype))
        with torch.enable_grad():
            anchor = self.z.detach().clone().requires_grad_()
            self.tracked = anchor, self.evaluate(self.f, anchor)
        return self.layout.keep(self.tracked[1].detach().to(self.z.dtype))

    def _restarted(self, diverged: Tensor, f_z: Tensor, residual: Tensor) -> Tensor:
        """The next state where some rows go back to their best one, with half the damping and nothing remembered."""
        rows, broken = self.rows, diverged[:, None, None]
        rows.damping = torch.where(broken, rows.damping / 2, rows.damping)
        self.damping = rows.damping * self.config.damping
        self.acceleration.forget(diverged)
        f_z = torch.where(broken, rows.best, f_z)
        residual = torch.where(broken, 0.0, residual)
        following = self.acceleration.step(torch.where(broken, rows.best, self.z), f_z, residual, self.damping)
        self.acceleration.forget(diverged)
        return torch.where(broken, rows.best, following)

    def _drop_all_but(self, chosen: Tensor) -> None:
        """Go on with the ``chosen`` rows only, if the map can be restricted to them."""
        subset = cast(StateMap, self.f).rows(chosen)  # what `compact` asks of the map
        if subset is None:
            self.compact = False
            return
        self.f, self.z, self.acceleration = subset, self.z[chosen], self.acceleration.rows(chosen)
        self.whole = self.rows.split_off(self.whole)
        self.layout = self.layout.rows(chosen)
        self.scale = None if self.scale is None else self.scale[chosen]
        self.rows.keep(chosen)
        self.damping = None if self.damping is None else self.damping[chosen]

    def _answers(self) -> tuple[_Rows, dict[int, Tensor], tuple[Tensor, Tensor] | None]:
        whole, tracked = self.whole, self.tracked
        if self.rows is not whole:
            self.rows.write_into(whole)
            tracked = None
        for count in self.wanted - self.iterates.keys():
            self.iterates[count] = whole.best
        if tracked is not None and not torch.equal(whole.best, self.z):
            tracked = None
        return whole, self.iterates, tracked

    def _judge(self, rows: _Rows, z: Tensor, f_z: Tensor, residual: Tensor) -> tuple[int, bool, bool, Tensor]:
        """Settle each row's fate after an evaluation.

        Returns:
            rows that go on; whether any diverged; whether all that go on are about to end; which diverged.
        """
        config, tol = self.config, self.tol
        metric = config.metric(self.layout, f_z, residual, self.scale)
        finite = metric.isfinite()
        rows.evaluations += rows.active
        improved = rows.active & finite & (metric < rows.best_residual)
        rows.first = torch.where(rows.first.isinf() & finite, metric, rows.first)
        previous = rows.recent[-1]
        rows.recent = torch.cat([rows.recent[1:], torch.where(finite, metric, math.inf)[None]])
        reached = rows.active & (metric < tol)
        highest, lowest = rows.recent.amax(0), rows.recent.amin(0)
        flat = highest.isfinite() & (highest < STAGNATION_SPREAD * lowest) & (lowest < STAGNATION_MARGIN * tol)
        stalled = rows.active & flat & ~reached
        diverged = rows.active & ~reached & ~(finite & (metric <= DIVERGENCE_FACTOR * rows.first))
        # A first evaluation that is not finite leaves nothing to return to.
        hopeless = diverged & rows.best_residual.isinf() & ~finite
        rows.converged = rows.converged | reached
        rows.stalled = rows.stalled | stalled
        if config.freeze:
            moving = rows.active & ~reached & ~stalled & ~hopeless
        else:
            # Without freezing nobody rests until everybody may.
            settled = rows.converged | rows.stalled | hopeless
            moving = rows.active & ~settled.all()
        next_metric = metric * torch.where(previous.isinf(), 1.0, (metric / previous).clamp(max=1.0))
        ending = (~moving | (next_metric < TRACKING_MARGIN * tol)).all()

        # The one read from the device per evaluation.
        remaining, any_diverged, all_improved, all_ending = torch.stack(
            [moving.sum(), diverged.sum(), (improved | ~rows.active).all().long(), ending.long()]
        ).tolist()
        if all_improved and remaining == z.shape[0]:
            rows.best = z
        else:
            rows.best = torch.where(improved[:, None, None], z, rows.best)
        rows.best_residual = torch.where(improved, metric, rows.best_residual)
        rows.active = moving
        return remaining, bool(any_diverged), bool(all_ending), diverged

    def _foresee(self, rows: _Rows, acceleration: Picard, following: Tensor) -> int:
        """End the rows of an affine map whose mixture meets the tolerance; how many go on.

        The Gram matrix says cheaply which rows may have ended: rounding in it, amplified by large weights, can pass
        for convergence. Only the mixed residual itself decides.
        """
        scale = 1.0 if self.scale is None else self.scale.double() + _TINY
        promising = rows.active & (acceleration.expected_residual() / scale < self.tol)
        remaining, any_promising = torch.stack([rows.active.sum(), promising.sum()]).tolist()
        if not any_promising:
            return remaining
        mixed_residual = acceleration.mixed_residual()
        norm = self.layout.norm(mixed_residual) / scale
        reached = promising & (norm < self.tol)
        rows.best = torch.where(reached[:, None, None], following - mixed_residual, rows.best)
        rows.best_residual = torch.where(reached, norm, rows.best_residual)
        rows.converged = rows.converged | reached
        rows.active = rows.active & ~reached
        return int(rows.active.sum())
