"""What solvers call: a vector field whose constants are fixed, or a map whose fixed point is sought."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: One time for all samples (a float or a 0-dim tensor), or a ``(batch,)`` tensor.
Time = float | Tensor

#: ``f(t, z) -> dz``, ``(batch, time, dim)`` to the same: deterministic, free of side effects, zero at padding.
VectorField = Callable[[Time, Tensor], Tensor]


class StateMap:
    """A map ``z -> f(z)``, ``(batch, time, dim)`` to the same, and whether it can be restricted to some samples."""

    def __call__(self, z: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no __call__(): a map must give f(z) there")

    def rows(self, index: Tensor) -> StateMap | None:
        """The same map for the samples ``index``; ``None`` where it is one for the whole batch."""
        return None
