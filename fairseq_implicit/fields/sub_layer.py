"""What a layer is made of."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

#: ``(weight, distance)``: the map that finds at a position what ``weight``, ``(rows, dim)``, finds so many places on.
Moved = Callable[[Tensor, int], Tensor]


class SubLayer(nn.Module):
    """A mixer or a feed-forward network, as initialisation and weight norms see it."""

    def inner_projections(self) -> Iterator[nn.Linear]:
        """The linear maps whose output stays inside the sub-layer."""
        return iter(())

    def residual_projections(self) -> Iterator[nn.Linear]:
        """The linear maps whose output is added to the state."""
        return iter(())

    def start_at_neighbours(self, moved: Moved) -> None:
        """Start by reading the tokens beside each, where positions are sinusoids that ``moved`` knows."""

    def operations(self, time: int) -> int:
        """Floating-point operations that one token costs among ``time``: those of the matrix products."""
        projections = (*self.inner_projections(), *self.residual_projections())
        return 2 * sum(linear.in_features * linear.out_features for linear in projections)
