"""``reversible``: no solver, the coupled iteration of arXiv 2509.12917, inverted in the backward pass."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.gradients.accumulation import accumulate
from fairseq_implicit.solvers.gradients.equilibrium import Equilibrium, EquilibriumGradient, verdict
from fairseq_implicit.solvers.gradients.record import AdjointRecord
from fairseq_implicit.solvers.precision import Autocast, field_dtype

_ROUNDING = torch.finfo(torch.float64).eps / 2  # of the pair, which is carried in float64 in any precision
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class ReversibleIteration(EquilibriumGradient):
    """Half of the budget in steps of two evaluations each; ``damping`` is β, below 1."""

    kind: ClassVar[str] = "reversible"
    uses_solver: ClassVar[bool] = False
    recomputable: ClassVar[bool] = False
    keeps_iterates: ClassVar[bool] = False
    reconstructs: ClassVar[bool] = True
    usual_damping: ClassVar[float] = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.damping == 1.0:
            raise OptionError("gradient_damping", "1 makes the reversible iteration irreversible; give 0.5.")

    def check_budget(self, max_iter: int) -> None:
        """Refuse an iteration that divides by 1 − β so often that no digit of its start can come back.

        Whether one digit or all of them come back depends on the map too, which the backward pass measures.

        Raises:
            OptionError: (1 / (1 − β))^steps times the rounding of float64 exceeds 1.
        """
        most = 2 * int(-math.log(_ROUNDING) / -math.log1p(-self.damping))
        if max_iter // 2 > most // 2:
            raise OptionError(
                "max_iter",
                f"{max_iter} evaluations of the reversible iteration at gradient damping {self.damping:g} cannot be "
                f"inverted: rounding grows by {1 / (1 - self.damping):.3g} per step; give at most {most}, or a smaller "
                "gradient damping.",
            )

    def update_cost(self, forward, adjoint):
        return 4 * forward, "4 x budget"

    def equilibrium(
        self, f, z0, solver, layout=UNPADDED, record=None, depends_on=(), sources=None, capture=()
    ) -> Equilibrium:
        if solver.max_iter < 2:
            raise OptionError("max_iter", "the reversible iteration evaluates twice per step; give at least 2.")
        if capture:
            raise OptionError(
                "correction", "the reversible iteration keeps no iterates to correct; drop one of the two."
            )
        steps = solver.max_iter // 2
        sources = depends_on if sources is None else sources
        pairs = [pair for pair in zip(depends_on, sources, strict=True) if pair[0].requires_grad]
        depends_on, sources = [tensor for tensor, _ in pairs], [source for _, source in pairs]
        if torch.is_grad_enabled() and not depends_on and not z0.requires_grad:
            raise ValueError("The reversible gradient needs depends_on: the tensors that the map depends on.")
        record = AdjointRecord() if record is None else record
        iteration = _Iteration(f, steps, self.damping, z0.dtype, layout, depends_on, record, Autocast(z0.device))
        state, last, f_last = _Reversible.apply(iteration, z0, *sources)
        return Equilibrium(state, verdict(last, f_last, 2 * steps, solver, layout, state, field_dtype(z0)), None, {})


@dataclass
class _Iteration:
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
    autocast: Autocast

    def evaluate(self, state: Tensor) -> Tensor:
        with self.autocast.on():
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
        accumulate(gradients, found[1:])
        return f_at.detach(), 0.0 if found[0] is None else found[0].double()


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, iteration: _Iteration, z0: Tensor, *sources: Tensor):
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
                "its start on the way back, and its gradient is not finite: lower max_iter or gradient_damping, or "
                "take the gradient ift"
            )
        iteration.record.evaluations = 2 * iteration.steps
        iteration.record.residual = torch.where(wrong.isfinite(), wrong, 0.0)
        return (None, (g_z + g_y).to(g.dtype), *gradients)
