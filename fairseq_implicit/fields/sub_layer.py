"""What a layer is made of."""

from collections.abc import Iterator

from torch import nn


class SubLayer(nn.Module):
    """A mixer or a feed-forward network, as initialisation and weight norms see it."""

    def inner_projections(self) -> Iterator[nn.Linear]:
        """The linear maps whose output stays inside the sub-layer."""
        return iter(())

    def residual_projections(self) -> Iterator[nn.Linear]:
        """The linear maps whose output is added to the state."""
        return iter(())
