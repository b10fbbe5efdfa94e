"""The contract between what is integrated (a field) and how it is integrated (a solver)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.solver import Piece
from fairseq_implicit.solvers.vector_field import Time, VectorField


class LinearPart(NamedTuple):
    """What an increment is beside a linear part: ``f(t, z) = −rate ∘ z + rest(t, z)``.

    Attributes:
        rate: ``(dim,)``, not negative, in float32 at least.
        rest: an increment as well.
    """

    rate: Tensor
    rest: Increment


class Increment:
    """One solve's ``f(t, z) -> dz``, and what else is known of it.

    Deterministic, free of side effects, ``(batch, time, dim)`` to the same, zero at padding.

    Args:
        function: ``f(t, z)``.
        layer: the map ``(t, z) -> z'`` where it must not be formed as ``z + f(t, z)``: a post-norm layer ends in a
            norm, and Euler on it must be the published layer to the last bit.
        pieces: ``end -> pieces`` where the increment is not smooth in time, see :meth:`pieces`.
        linear: its linear part, where a solver may treat that apart.
        constants: tensors with a gradient that its function reads in place of what they were computed from; none is
            computed from another.
    """

    def __init__(
        self,
        function: VectorField,
        layer: VectorField | None = None,
        pieces: Callable[[float], tuple[Piece, ...]] | None = None,
        linear: LinearPart | None = None,
        constants: tuple[Tensor, ...] = (),
    ):
        self.function, self.layer, self._pieces = function, layer, pieces
        self.linear, self.constants = linear, constants

    def __call__(self, t: Time, z: Tensor) -> Tensor:
        return self.function(t, z)

    def within(self, around: Callable[[VectorField], VectorField]) -> Increment:
        """The same increment with ``around`` put around its functions; pieces stay as they are."""
        layer = None if self.layer is None else around(self.layer)
        linear = None if self.linear is None else self.linear._replace(rest=self.linear.rest.within(around))
        return Increment(around(self.function), layer, self._pieces, linear, self.constants)

    def changed(
        self,
        change: Callable[[VectorField], VectorField],
        linear: LinearPart | None = None,
        constants: tuple[Tensor, ...] = (),
    ) -> Increment:
        """Another increment, smooth where this one is: ``change`` of the function and of each piece.

        Args:
            linear: the linear part of the new one.
            constants: what its function reads beside the constants of this one.
        """

        def pieces(end: float) -> tuple[Piece, ...]:
            return tuple(piece._replace(field=change(piece.field)) for piece in self.pieces(end))

        cut = None if self._pieces is None else pieces
        return Increment(change(self.function), None, cut, linear, (*self.constants, *constants))

    def pieces(self, end: float) -> tuple[Piece, ...]:
        """This increment from t = 0 to ``end``, cut at the times where it is not smooth."""
        return (Piece(self.function, end),) if self._pieces is None else self._pieces(end)


class Field(nn.Module):
    """A vector field ``F(t, z)`` over states ``(batch, time, dim)``.

    ``prepare`` makes everything that stays constant during one solve (dropout masks, attention bias, injection
    projections) and returns the increment ``f(t, z)``. Nothing is kept on the module between calls, so two solves
    may be open before either backward.

    Attributes:
        piecewise: whether other weights act at other depths. Such a field has several pieces, and in training mode its
            increment takes one time for all samples; elsewhere an increment takes a ``(batch,)`` tensor of times, too.
    """

    piecewise = False

    def linear_rate(self) -> Tensor | None:
        """That of the linear part of its increments, ``(dim,)``; ``None`` where they have none."""
        return None

    def read_parameters(self) -> Iterator[nn.Parameter]:
        """Those that its increments read themselves; the others act through an increment's ``constants``."""
        return self.parameters()

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Increment:
        """Fix one solve's constants.

        Args:
            x: what the depth starts from, ``(batch, time, dim)``, whatever it has become where this solve starts.
            layout: of the batch.
        """
        raise TypeError(f"{type(self).__name__} defines no prepare(): a field must return its increment there")

    def layers(self) -> Iterator[Field]:
        """The fields of one layer each that this one is made of."""
        yield self

    def share(self, first: Field) -> None:
        """Take over what all layers have in common from the first layer, which is of the same class."""

    def residual_projections(self) -> Iterator[nn.Linear]:
        """The linear maps whose output is added to the state: their initialisation is scaled by the depth."""
        return iter(())

    def operations(self, time: int) -> int:
        """Floating-point operations of one evaluation per token of a sequence of ``time``: those of matrix products.

        Unless a field says otherwise, every token is multiplied with each of its matrices once.
        """
        return 2 * sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)

    def initialise(self) -> None:
        """Called after the initialisation of all linear maps, for what must start otherwise."""
