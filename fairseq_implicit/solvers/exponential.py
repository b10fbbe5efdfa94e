"""Exponential Runge–Kutta schemes for ``y' = −A ∘ y + N(t, y)`` with a rate A ≥ 0 per channel.

The linear part is solved exactly, N by stages whose weights are functions of ``z = −h A``:

    φ₁(z) = (e^z − 1) / z,    φ₂ = (φ₁ − 1) / z,    φ₃ = (φ₂ − ½) / z

======  =====  ===========  =============================  =============
scheme  order  evaluations  is                             at A = 0
======  =====  ===========  =============================  =============
etd1    1      1            exponential Euler              Euler
etd2    2      2            ETD2RK of Cox and Matthews     Heun
etd4    4      4            Krogstad's ETDRK4-B            classical RK4
======  =====  ===========  =============================  =============

``e^z ≤ 1`` at every step size, and where ``A ∘ y = N(y)`` every step of every scheme stands still: the fixed point
depends on neither. In a loop one step of etd1 with h = 1 is ``y ← e^{−A} y + φ₁(−A) N(y)`` (Parcae, arXiv 2604.12946).

Sources: Cox and Matthews, J. Comput. Phys. 176 (2002); Krogstad, J. Comput. Phys. 203 (2005), eq. 51; Hochbruck and
Ostermann, Acta Numerica 19 (2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.coefficients import Combination, Weight, combine
from fairseq_implicit.solvers.fixed_steps import FixedSteps
from fairseq_implicit.solvers.precision import state_dtype
from fairseq_implicit.solvers.solver import NOTHING, Keep, Piece, Solution, Span
from fairseq_implicit.solvers.tableau import get_tableau
from fairseq_implicit.solvers.vector_field import Time, VectorField

# Below this |z| the quotients lose digits, φ₃ a factor 1/z² of them, and the series has them all: its first term left
# out is 1/19!, less than the rounding of float64.
_SERIES_BELOW, _SERIES_TERMS = 1.0, 16


def phi(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``φ₁, φ₂, φ₃`` of each number of ``z``, differentiable, 0 included."""
    small = z.abs() < _SERIES_BELOW
    # Each formula sees only numbers that suit it: a NaN that is not chosen still poisons the gradient.
    near, far = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    near3 = torch.full_like(near, 1.0 / math.factorial(_SERIES_TERMS + 2))
    for power in reversed(range(_SERIES_TERMS - 1)):
        near3 = near3 * near + 1.0 / math.factorial(power + 3)
    near2 = 0.5 + near * near3
    near1 = 1.0 + near * near2
    far1 = torch.expm1(far) / far
    far2 = (far1 - 1.0) / far
    far3 = (far2 - 0.5) / far
    return torch.where(small, near1, far1), torch.where(small, near2, far2), torch.where(small, near3, far3)


class Weights(NamedTuple):
    """A scheme for one step size: ``U_i = d_i ∘ y + h Σ a_ij ∘ N_j`` at ``t + c_i h``, and so the new state.

    Attributes:
        nodes: c.
        decays: d of each stage, numbers or ``(dim,)``.
        rows: a, one row per stage; row ``i`` (from 0) has ``i`` entries.
        decay: d of the new state.
        last: its weights.
    """

    nodes: tuple[float, ...]
    decays: tuple[Weight, ...]
    rows: tuple[tuple[Weight, ...], ...]
    decay: Tensor
    last: tuple[Weight, ...]


def _etd1(z: Tensor) -> Weights:
    return Weights((0.0,), (1.0,), ((),), z.exp(), (phi(z)[0],))


def _etd2(z: Tensor) -> Weights:
    one, two, _ = phi(z)
    decay = z.exp()
    return Weights((0.0, 1.0), (1.0, decay), ((), (one,)), decay, (one - two, two))


def _etd4(z: Tensor) -> Weights:
    one, two, three = phi(z)
    half_one, half_two, _ = phi(z / 2)
    decay, half = z.exp(), (z / 2).exp()
    middle = 2 * two - 4 * three
    return Weights(
        (0.0, 0.5, 0.5, 1.0),
        (1.0, half, half, decay),
        ((), (half_one / 2,), (half_one / 2 - half_two, half_two), (one - 2 * two, 0.0, 2 * two)),
        decay,
        (one - 3 * two + 4 * three, middle, middle, 4 * three - two),
    )


class _Scheme(NamedTuple):
    weights: Callable[[Tensor], Weights]
    limit: str  # what it is at A = 0
    evaluations: int


_SCHEMES: Mapping[str, _Scheme] = {
    "etd1": _Scheme(_etd1, "euler", 1),
    "etd2": _Scheme(_etd2, "heun2", 2),
    "etd4": _Scheme(_etd4, "rk4", 4),
}
SCHEMES = tuple(_SCHEMES)


def check_linear_part(scheme: str, present: bool) -> None:
    """Refuse an exponential scheme for a field without a linear part.

    Raises:
        OptionError: naming the Runge–Kutta scheme that it would be.
    """
    if not present:
        raise OptionError(
            "scheme",
            f"{scheme} solves a linear part exactly and the field has none, so that it is {_SCHEMES[scheme].limit}: "
            "take that, or set `linear_part` diagonal.",
        )


@dataclass(frozen=True)
class Exponential(FixedSteps):
    """An exponential scheme in equal steps.

    Attributes:
        scheme: one of ``SCHEMES``.

    Raises:
        OptionError: a value that has no meaning.
    """

    exponential: ClassVar[bool] = True
    own_coefficients: ClassVar[bool] = True

    scheme: str = "etd2"

    def __post_init__(self):
        check_choice("scheme", self.scheme, SCHEMES)
        super().__post_init__()

    @property
    def evaluates_once(self) -> bool:
        return self.steps * _SCHEMES[self.scheme].evaluations == 1

    def combination(self, dim: int, norm: Callable[[int], nn.LayerNorm] = nn.LayerNorm) -> Combination:
        """Without weights of its own: those of the stages follow from the rates."""
        return Combination(get_tableau(_SCHEMES[self.scheme].limit))

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
        rate: Tensor | None = None,
    ) -> Solution:
        """See :meth:`Solver.integrate`.

        Args:
            f: N alone.
            pieces: of N.
            rate: A, ``(dim,)``, not negative.

        Raises:
            OptionError: there is no rate.
        """
        check_linear_part(self.scheme, rate is not None)
        assert rate is not None
        h = span.length / self.steps
        scheme = _SCHEMES[self.scheme]
        weights = scheme.weights(rate.to(state_dtype(x.dtype)) * -h)

        def step(g: VectorField, t: Time, y: Tensor, h: float) -> tuple[Tensor, tuple[Weight, ...]]:
            return exponential_step(g, t, y, h, weights), ()

        return self.march(step, scheme.evaluations, f, x, span, layout, dtype, pieces, keep)


def exponential_step(f: VectorField, t: Time, y: Tensor, h: float, weights: Weights) -> Tensor:
    """One step: the new state ``(batch, time, dim)``.

    Args:
        f: N.
        t: time at the start of the step, one for all samples or ``(batch,)``.
        y: state.
        h: step size, which ``weights`` were made for.
        weights: of the scheme.
    """
    stages: list[Tensor] = []
    for node, decay, row in zip(weights.nodes, weights.decays, weights.rows, strict=True):
        stages.append(f(t + node * h, combine(_decayed(y, decay), stages, row, h)))
    return combine(_decayed(y, weights.decay), stages, weights.last, h)


def _decayed(y: Tensor, decay: Weight) -> Tensor:
    return y * decay.to(y.dtype) if isinstance(decay, Tensor) else y
