"""The contract between what is integrated (a field) and how it is integrated (a solver)."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.solvers.adaptive import Piece

#: ``f(t, z) -> dz``: deterministic, free of side effects, zero at padded positions.
Increment = Callable[[float | Tensor, Tensor], Tensor]


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

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Increment:
        """Fix one solve's constants.

        Args:
            x: the state at the start of the solve, ``(batch, time, dim)``.
            layout: of the batch.
        """
        raise TypeError(f"{type(self).__name__} defines no prepare(): a field must return its increment there")

    def pieces(self, f: Increment, end: float) -> tuple[Piece, ...]:
        """``f`` from t = 0 to ``end``, cut at the times where it is not smooth.

        Args:
            f: what ``prepare`` returned.
        """
        return (Piece(f, end),)

    def residual_projections(self) -> Iterator[nn.Linear]:
        """The linear maps whose output is added to the state: their initialisation is scaled by the depth."""
        return iter(())
