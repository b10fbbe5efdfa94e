"""Gradients of an equilibrium ``z* = f(z*)``: exact, approximate, unrolled, reversible.

=============  ==========================================================================================
``ift``        solves ``w = Jᵀw + g`` (J the Jacobian of f at z*, g the incoming gradient): exact
``neumann-K``  the first K terms of ``w = Σ (Jᵀ)ⁱ g``: K − 1 products on one graph
``phantom-K``  K tracked damped steps from z* (Geng et al., arXiv 2111.05177)
``jfb``        one tracked step, ``w = g`` (Fung et al., arXiv 2103.12803)
``bptt-K``     no solver: K tracked steps from the start, a weight-tied K-layer network
``reversible`` no solver: the coupled iteration of arXiv 2509.12917, inverted in the backward pass
=============  ==========================================================================================

The parameters' gradient always arises from ordinary tracked calls in the caller's own graph, so hooks on parameters
(data parallelism) fire once, and two forward passes before one backward, a repeated backward over a retained graph,
and cells shared between places all give the sums they should.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.fixed_point import (
    FixedPointConfig,
    FixedPointResult,
    OptionError,
    algebra_dtype,
    field_dtype,
    solve,
)
from fairseq_implicit.solvers.status import Status

KINDS = ("ift", "neumann", "phantom", "jfb", "bptt", "reversible")
COUNTED = ("neumann", "phantom", "bptt")
SPELLINGS = "ift, neumann-K, phantom-K, jfb, bptt-K or reversible"
WITHOUT_SOLVER = ("bptt", "reversible")
_ROUNDING = torch.finfo(torch.float64).eps / 2  # of the pair that the reversible iteration carries in any precision
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class GradientConfig:
    """How the gradient of an equilibrium is formed.

    Attributes:
        kind: one of ``KINDS``.
        steps: K of ``neumann-K``, ``phantom-K`` and ``bptt-K``.
        damping: τ of the tracked or Neumann steps; β of the reversible iteration.
        adjoint: solver of ``w = Jᵀw + g``; its tolerance is relative to ‖g‖.
        fallback_terms: Neumann terms used for samples whose adjoint stalls.
        fallback_residual: relative adjoint residual from which an unconverged sample counts as stalled. Below 0.1 the
            unfinished solution points closer to the exact gradient than four Neumann terms; above it no longer.

    Raises:
        OptionError: an option is out of range.
    """

    kind: str = "ift"
    steps: int = 1
    damping: float = 1.0
    adjoint: FixedPointConfig = field(default_factory=FixedPointConfig)
    fallback_terms: int = 4
    fallback_residual: float = 0.1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise OptionError("gradient", f"{self.kind!r} is unknown; choose {SPELLINGS}.")
        if self.steps < 1:
            raise OptionError("gradient", f"{self.kind}-{self.steps} takes no step; give at least {self.kind}-1.")
        if not 0.0 < self.damping <= 1.0:
            raise OptionError("gradient_damping", f"{self.damping} is outside (0, 1].")
        if self.kind == "reversible" and self.damping == 1.0:
            raise OptionError("gradient_damping", "1 makes the reversible iteration irreversible; give 0.5.")
        if self.adjoint.compact:
            raise OptionError("compact", "the adjoint equation keeps all samples of its batch; leave it out.")
        if self.fallback_terms < 1:
            raise OptionError("fallback_terms", f"{self.fallback_terms} Neumann terms make no gradient; give 1.")

    @property
    def uses_solver(self) -> bool:
        """Whether the forward pass looks for a fixed point at all."""
        return self.kind not in WITHOUT_SOLVER

    @property
    def name(self) -> str:
        """The spelling that :func:`parse_gradient` reads."""
        return f"{self.kind}-{self.steps}" if self.kind in COUNTED else self.kind

    def check_budget(self, max_iter: int) -> None:
        """Refuse a reversible iteration that divides by 1 − β so often that no digit of its start can come back.

        For whoever trains: an answer is as good as ever. Whether one digit or all of them come back depends on the map
        too, which the backward pass measures.

        Raises:
            OptionError: (1 / (1 − β))^steps times the rounding of float64 exceeds 1.
        """
        if self.kind != "reversible":
            return
        most = 2 * int(-math.log(_ROUNDING) / -math.log1p(-self.damping))
        if max_iter // 2 > most // 2:
            raise OptionError(
                "max_iter",
                f"{max_iter} evaluations of the reversible iteration at gradient damping {self.damping:g} cannot be "
                f"inverted: rounding grows by {1 / (1 - self.damping):.3g} per step; give at most {most}, or a smaller "
                "gradient damping.",
            )

    def update_cost(self, forward: float, adjoint: float) -> tuple[float, str]:
        """Cost of one update in evaluations of the map, and how it is made up.

        An evaluation costs 1, a product with the Jacobian 1, a full backward pass 2.

        Args:
            forward: evaluations of the forward solve.
            adjoint: products with the Jacobian of the adjoint solve; only ``ift`` has one.
        """
        steps = self.steps
        return {
            "ift": (forward + 1 + adjoint + 2, "solve + 1 + adjoint + 2"),
            "neumann": (forward + 1 + steps - 1 + 2, "solve + 1 + (K - 1) + 2"),
            "phantom": (forward + 3 * steps, "solve + 3 K"),
            "jfb": (forward + 3, "solve + 3"),
            "bptt": (3 * steps, "3 K"),
            "reversible": (4 * forward, "4 x budget"),
        }[self.kind]


def parse_gradient(name: str, **options) -> GradientConfig:
    """``"phantom-4"`` -> ``GradientConfig(kind="phantom", steps=4, **options)``.

    Raises:
        OptionError: the name is unknown, or its number is missing, zero or out of place.
    """
    match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", name)
    kind, steps = match.groups() if match else (name, None)
    if kind in COUNTED and steps is None:
        raise OptionError("gradient", f"{name!r} needs its number of steps, such as {kind}-4.")
    if kind in KINDS and kind not in COUNTED and steps is not None:
        raise OptionError("gradient", f"{name!r}: {kind} takes no number of steps; write {kind}.")
    if match is None:
        raise OptionError("gradient", f"{name!r} is unknown; choose {SPELLINGS}.")
    return GradientConfig(kind=kind, steps=1 if steps is None else int(steps), **options)


@dataclass
class AdjointRecord:
    """What the last backward pass cost. Filled when it runs; zero before.

    Attributes:
        evaluations: products with the Jacobian, per sample ``(batch,)``, or one number for all.
        residual: relative residual of the adjoint equation, ``(batch,)``; of the reversible iteration, how far the
            start that it came back to is from the true one, relative to the state, times the share of the gradient's
            norm that arrives there: an estimate of the gradient's relative error, within a factor of ten or so. Zero
            where no equation is solved.
        fallbacks: samples whose adjoint stalled and took the Neumann sum.
    """

    evaluations: object = 0
    residual: object = 0.0
    fallbacks: object = 0


@dataclass(frozen=True)
class Equilibrium:
    """An equilibrium with its gradient attached.

    Attributes:
        state: ``(batch, time, dim)``, tracked.
        solve: how the forward pass went.
        point: the state at which ``state = f(point)``, detached; ``None`` for the schemes without a solver.
        iterates: evaluation number -> tracked ``f`` of the state of that evaluation, for the numbers asked for.
    """

    state: Tensor
    solve: FixedPointResult
    point: Tensor | None
    iterates: dict[int, Tensor]


def equilibrium(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: FixedPointConfig,
    gradient: GradientConfig,
    layout: Layout = UNPADDED,
    record: AdjointRecord | None = None,
    depends_on: Sequence[Tensor] = (),
    sources: Sequence[Tensor] | None = None,
    capture: Sequence[int] = (),
) -> Equilibrium:
    """Solve ``z = f(z)`` and attach a gradient.

    Args:
        f: deterministic map ``(batch, time, dim) -> (batch, time, dim)``, zero at padding.
        z0: start, ``(batch, time, dim)``.
        solver: forward solver; ``bptt`` and ``reversible`` take only its budget (``reversible``), tolerance and
            criterion (for the verdict).
        gradient: how the gradient is formed.
        layout: of the batch.
        record: filled by the backward pass.
        depends_on: every tensor that ``f`` depends on and whose gradient is wanted (parameters, injections), none of
            them computed from another; only ``reversible`` needs it, because it rebuilds its graph piece by piece.
        sources: where the gradient of each of ``depends_on`` goes, where that is another tensor: what a leaf of ``f``
            was detached from, so that the pieces of the graph end there.
        capture: evaluation numbers for ``iterates``.

    Raises:
        OptionError: see :func:`solve`; a budget below two evaluations with ``reversible``.
    """
    record = AdjointRecord() if record is None else record
    if gradient.kind == "bptt":
        return _unrolled(f, z0, solver, gradient, layout, capture, record)
    if gradient.kind == "reversible":
        return _reversible(f, z0, solver, gradient, layout, depends_on, sources, capture, record)

    if gradient.kind == "ift" and torch.is_grad_enabled():
        # Said now, not in the middle of the backward pass.
        try:
            gradient.adjoint.tolerance_for(field_dtype(z0))
        except OptionError as error:
            raise OptionError("adjoint_tol", error.sentence) from error
    training = torch.is_grad_enabled()
    result = solve(f, z0, solver, layout, capture=capture, track=training)
    tracked, result = result.tracked, replace(result, tracked=None)
    iterates = {count: f(state) for count, state in result.iterates.items()}
    point = result.state
    if not training:
        return Equilibrium(f(point), result, point, iterates)
    if tracked is None:
        anchor = point.detach().requires_grad_()
        tracked = anchor, f(anchor)
    anchor, state = tracked
    if gradient.kind == "jfb":
        return Equilibrium(state, result, point, iterates)
    if gradient.kind == "phantom":
        state = _damped(anchor, state, gradient.damping)
        for _ in range(gradient.steps - 1):
            state = _damped(state, f(state), gradient.damping)
        return Equilibrium(state, result, point, iterates)
    adjoint = _AdjointEquation(state, anchor, gradient, layout, field_dtype(z0), record)
    return Equilibrium(_Adjoint.apply(state, adjoint), result, point, iterates)


def _damped(z: Tensor, f_z: Tensor, damping: float) -> Tensor:
    return f_z if damping == 1.0 else z + damping * (f_z - z)


def neumann_sum(vjp: Callable[[Tensor], Tensor], g: Tensor, terms: int, damping: float = 1.0) -> Tensor:
    """``τ Σ_{i<K} (τ Jᵀ + (1 − τ) I)ⁱ g``: what K tracked damped steps at an exact equilibrium give."""
    term = total = g
    for _ in range(terms - 1):
        term = _damped(term, vjp(term), damping)
        total = total + term
    return total if damping == 1.0 else damping * total


@dataclass
class _AdjointEquation:
    """``w = Jᵀw + g`` on the graph from ``anchor`` to ``tracked = f(anchor)``."""

    tracked: Tensor
    anchor: Tensor
    gradient: GradientConfig
    layout: Layout
    precision: torch.dtype
    record: AdjointRecord

    def vjp(self, w: Tensor) -> Tensor:
        # Only the path to the anchor is walked, so no parameter's gradient hook fires here.
        (product,) = torch.autograd.grad(self.tracked, self.anchor, w.to(self.tracked.dtype), retain_graph=True)
        return product.to(w.dtype)

    def solve(self, g: Tensor) -> Tensor:
        """The cotangent that the tracked call should receive, in float32 or wider."""
        g = self.layout.keep(g if g.dtype is torch.float64 else g.float())
        if self.gradient.kind == "neumann":
            self.record.evaluations = self.gradient.steps - 1
            return neumann_sum(self.vjp, g, self.gradient.steps, self.gradient.damping)
        size = self.layout.norm(g)
        result = solve(
            lambda w: self.vjp(w) + g,
            g,
            self.gradient.adjoint,
            self.layout,
            scale=size,
            precision=self.precision,
            linear=True,
        )
        # A gradient that arrives non-finite leaves non-finite: the trainer must see the overflow.
        stalled = ~result.converged & size.isfinite() & ~(result.residual <= self.gradient.fallback_residual)
        self.record.evaluations = result.evaluations
        self.record.residual = result.residual
        self.record.fallbacks = stalled.sum()
        if not stalled.any():
            return result.state
        approximate = neumann_sum(self.vjp, g, self.gradient.fallback_terms)
        finite = approximate.flatten(1).isfinite().all(1)[:, None, None]
        approximate = torch.where(finite, approximate, g)
        return torch.where(stalled[:, None, None], approximate, result.state)


class _Adjoint(torch.autograd.Function):
    """Identity forward; backward turns ∂ℓ/∂z* into the adjoint state."""

    @staticmethod
    def forward(ctx, tracked: Tensor, adjoint: _AdjointEquation) -> Tensor:
        ctx.adjoint = adjoint
        return tracked.view_as(tracked)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        return ctx.adjoint.solve(g).to(g.dtype), None


def _verdict(residual: Tensor, evaluations: int, solver: FixedPointConfig, dtype: torch.dtype, state: Tensor):
    """The result of a scheme with a fixed number of steps, judged by the solver's tolerance."""
    tol = solver.tolerance_for(dtype)
    converged = residual < tol
    return FixedPointResult(
        state=state.detach(),
        evaluations=torch.full_like(converged, evaluations, dtype=torch.long),
        residual=residual.to(algebra_dtype(state.dtype)),
        status=Status.COMPLETED,
        converged=converged,
        tolerance=tol,
    )


@torch.no_grad()
def _residual(z: Tensor, f_z: Tensor, solver: FixedPointConfig, layout: Layout) -> Tensor:
    wide = algebra_dtype(z.dtype)
    return solver.metric(layout, f_z, f_z.to(wide) - z.to(wide))


def _unrolled(f, z0, solver, gradient, layout, capture, record) -> Equilibrium:
    record.evaluations = gradient.steps if torch.is_grad_enabled() else 0
    z, iterates = z0, {}
    for count in range(1, gradient.steps + 1):
        f_z = f(z)
        before, z = z, _damped(z, f_z, gradient.damping)
        if count in capture:
            iterates[count] = z
    for count in set(capture) - iterates.keys():
        iterates[count] = z
    residual = _residual(before, f_z, solver, layout)
    return Equilibrium(z, _verdict(residual, gradient.steps, solver, field_dtype(z0), z), None, iterates)


def _reversible(f, z0, solver, gradient, layout, depends_on, sources, capture, record) -> Equilibrium:
    if solver.max_iter < 2:
        raise OptionError("max_iter", "the reversible iteration evaluates twice per step; give at least 2.")
    if capture:
        raise OptionError("correction", "the reversible iteration keeps no iterates to correct; drop one of the two.")
    steps = solver.max_iter // 2
    pairs = [pair for pair in zip(depends_on, depends_on if sources is None else sources) if pair[0].requires_grad]
    depends_on, sources = [tensor for tensor, _ in pairs], [source for _, source in pairs]
    if torch.is_grad_enabled() and not depends_on and not z0.requires_grad:
        raise ValueError("The reversible gradient needs depends_on: the tensors that the map depends on.")
    iteration = _ReversibleIteration(f, steps, gradient.damping, z0.dtype, layout, depends_on, record)
    state, last, f_last = _Reversible.apply(iteration, z0, *sources)
    residual = _residual(last, f_last, solver, layout)
    return Equilibrium(state, _verdict(residual, 2 * steps, solver, field_dtype(z0), state), None, {})


@dataclass
class _ReversibleIteration:
    """``y' = (1−β) y + β f(z)``, ``z' = (1−β) z + β f(y')``, forward and back.

    The pair is held in float64: inverting divides by 1 − β at every step, and float32 loses all digits in six steps
    at β = 0.8. Float64 loses them too, later, the sooner the less the map contracts, so the way back is checked: see
    ``AdjointRecord.residual``.
    """

    f: Callable[[Tensor], Tensor]
    steps: int
    damping: float
    dtype: torch.dtype
    layout: Layout
    depends_on: Sequence[Tensor]
    record: AdjointRecord

    def __post_init__(self):
        self.device = None
        self.autocast: torch.dtype | None = None

    def remember_autocast(self, device: str) -> None:
        self.device = device
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def evaluate(self, state: Tensor) -> Tensor:
        with torch.autocast(self.device, enabled=self.autocast is not None, dtype=self.autocast):
            return self.f(state)

    def mix(self, old: Tensor, f_z: Tensor) -> Tensor:
        return (1 - self.damping) * old + self.damping * f_z.double()

    def unmix(self, new: Tensor, f_z: Tensor) -> Tensor:
        return (new - self.damping * f_z.double()) / (1 - self.damping)

    def pull_back(self, at: Tensor, g: Tensor, gradients: list):
        """Evaluate at ``at``; give f(at) and the gradient of ``β g·f`` at ``at``; add the others to ``gradients``."""
        with torch.enable_grad():
            leaf = at.to(self.dtype).requires_grad_()
            f_at = self.evaluate(leaf)
        found = torch.autograd.grad(
            f_at, (leaf, *self.depends_on), (self.damping * g).to(f_at.dtype), allow_unused=True
        )
        for place, extra in enumerate(found[1:]):
            if extra is not None:
                gradients[place] = extra if gradients[place] is None else gradients[place] + extra
        return f_at.detach(), 0.0 if found[0] is None else found[0].double()


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, iteration: _ReversibleIteration, z0: Tensor, *sources: Tensor):
        iteration.remember_autocast(z0.device.type)
        y = z = z0.double()
        for _ in range(iteration.steps):
            y = iteration.mix(y, iteration.evaluate(z.to(iteration.dtype)))
            f_y = iteration.evaluate(y.to(iteration.dtype))
            z = iteration.mix(z, f_y)
        ctx.iteration = iteration
        ctx.save_for_backward(z0, y, z)
        last = y.to(iteration.dtype)
        ctx.mark_non_differentiable(last, f_y)
        return z.to(iteration.dtype), last, f_y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, *_):
        iteration, norm = ctx.iteration, ctx.iteration.layout.norm
        z0, y, z = ctx.saved_tensors
        size = norm(z)
        g_z, g_y = g.double(), torch.zeros_like(y)
        gradients = [None] * len(iteration.depends_on)
        for _step in range(iteration.steps):
            f_y, pulled = iteration.pull_back(y, g_z, gradients)
            z, g_y, g_z = iteration.unmix(z, f_y), g_y + pulled, (1 - iteration.damping) * g_z
            f_z, pulled = iteration.pull_back(z, g_y, gradients)
            y, g_z, g_y = iteration.unmix(y, f_z), g_z + pulled, (1 - iteration.damping) * g_y
        missed = torch.maximum(norm(y - z0), norm(z - z0)) / (size + _TINY)
        entered = norm(g)
        wrong = missed * (norm(g_z) + norm(g_y)) / (entered + _TINY)
        # A gradient that overflows on a right way back is the trainer's to see.
        lost = size.isfinite() & entered.isfinite() & ~wrong.isfinite() & ~(missed < 1)
        if lost.any():
            raise ArithmeticError(
                f"the reversible iteration of {2 * iteration.steps} evaluations at damping {iteration.damping:g} lost "
                "its start on the way back, and its gradient is not finite: lower the budget (--deq-max-iter) or the "
                "damping (--deq-gradient-damping), or take the gradient ift"
            )
        iteration.record.evaluations = 2 * iteration.steps
        iteration.record.residual = torch.where(wrong.isfinite(), wrong, 0.0)
        return (None, (g_z + g_y).to(g.dtype), *gradients)
