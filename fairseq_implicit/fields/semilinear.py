"""Any field beside a contracting linear part: ``y' = −A ∘ (y − g u) + F(t, y)``.

A > 0 is a rate per channel, ``u = LN(x)`` what the depth starts from, normalised, and g its gain. The state forgets its
past at the rate A and is pulled to the input, so that a loop of any length stays bounded where F does: without it the
linear part of a residual network has radius 1, with an injection that is concatenated or added more than that (Parcae,
arXiv 2604.12946).

========================================  ==================================================================
A = 0                                     the field alone
one exponential Euler step of h = 1       ``y ← e^{−A} y + (1 − e^{−A}) g u + φ₁(−A) F(y)``, Parcae's loop
the steady state ``A (y − g u) = F(y)``   the equilibrium of ``y = g u + A⁻¹ F(y)``
========================================  ==================================================================

A starts at 0.805, where the state halves its distance every 0.86 layers: ``e^{−A} = √(1/5)``.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.field import Field, Increment, LinearPart
from fairseq_implicit.fields.injection import Injection, InjectionConfig
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.vector_field import VectorField

LINEAR_PARTS = ("none", "diagonal")

#: A at the start.
START = math.log(5.0) / 2


class Rate(nn.Module):
    """A positive number per channel: ``A = softplus(raw_rate)``.

    Args:
        dim: number of channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.raw_rate = nn.Parameter(torch.full((dim,), math.log(math.expm1(START))))

    def forward(self) -> Tensor:
        """A, ``(dim,)``, in float32 at least."""
        raw = self.raw_rate
        return functional.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)))


class SemiLinearField(Field):
    """A field and its linear part, which a solver may treat apart.

    Args:
        field: F.
        dim: width of the state.
        norm: of the input.
    """

    def __init__(self, field: Field, dim: int, norm: NormConfig):
        super().__init__()
        self.field = field
        self.linear = Rate(dim)
        self.injection = Injection(dim, InjectionConfig(), 0, norm)
        self.piecewise = field.piecewise

    def linear_rate(self) -> Tensor:
        return self.linear()

    def layers(self) -> Iterator[Field]:
        return self.field.layers()

    def residual_projections(self) -> Iterator[nn.Linear]:
        return self.field.residual_projections()

    def operations(self, time: int) -> int:
        return self.field.operations(time)

    def read_parameters(self) -> Iterator[nn.Parameter]:
        return self.field.read_parameters()

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Increment:
        rate, inner = self.linear_rate(), self.field.prepare(x, layout)
        injected, _ = self.injection(x)
        assert injected is not None, "InjectionConfig() injects into the stream"
        target = layout.keep(injected)
        pull = (rate * target).to(x.dtype)

        def rest(f: VectorField) -> VectorField:
            return lambda t, z: f(t, z) + pull

        def whole(f: VectorField) -> VectorField:
            return lambda t, z: torch.addcmul(f(t, z), rate.to(z.dtype), target - z)

        return inner.changed(whole, LinearPart(rate, inner.changed(rest)), (rate, target))
