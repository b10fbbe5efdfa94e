"""Broyden's method on g(z) = f(z) − z with a limited-memory inverse, B = −I + Σ uᵢ vᵢᵀ.

Rank-one updates by Sherman and Morrison: v = Bᵀ Δz, u = (Δz − B Δg) / (vᵀ Δg). When the memory is full everything is
dropped and the method restarts as Picard: overwriting the oldest column of a product-form inverse would leave a
matrix that satisfies no secant equation.
"""

import torch
from torch import Tensor

from fairseq_implicit.layout import token_sum
from fairseq_implicit.solvers.picard import Picard
from fairseq_implicit.solvers.stored_states import StoredStates

SKIP_BELOW = 1e-8  # an update whose denominator is this small beside ‖v‖‖Δg‖ carries rounding, not curvature


def columns_within(mebibytes: float, z: Tensor) -> int:
    """How many rank-one updates of states like ``z`` fit into a cap in MiB (two states each)."""
    return int(mebibytes * 2**20 // (2 * z.numel() * z.element_size()))


class Broyden(Picard):
    """The inverse Jacobian of one solve.

    Args:
        z: a state, ``(batch, time, dim)``, for shape, dtype and device.
        columns: rank-one updates kept before a restart.
    """

    def __init__(self, z: Tensor, columns: int):
        self.left, self.right = StoredStates(z, columns), StoredStates(z, columns)
        self.columns = columns
        self.used = 0
        self.previous: tuple[Tensor, ...] | None = None  # z, g(z), B g(z) of the last step
        self.fresh = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)  # samples without a last step

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        return token_sum(torch.linalg.vecdot(x, y))[:, None, None]

    def step(self, z: Tensor, f_z: Tensor, residual: Tensor, damping: Tensor | None) -> Tensor:
        """Take in ``f(z)`` and ``g = f(z) − z``, give ``z − τ B g``; ``damping`` is τ, ``(batch, 1, 1)``, or None."""
        if self.used == self.columns:
            self._restart()
        used = self.used
        applied = -residual
        if used:
            applied = applied + self.left.combine(self.right.products(residual, used))
        if self.previous is not None:
            old_z, old_residual, old_applied = self.previous
            delta_z, delta_g = z - old_z, residual - old_residual
            v = -delta_z
            if used:
                v = v + self.right.combine(self.left.products(delta_z, used))
            denominator = self._dot(v, delta_g)
            size = (self._dot(v, v) * self._dot(delta_g, delta_g)).sqrt()
            usable = (denominator.abs() > SKIP_BELOW * size) & ~self.fresh[:, None, None]
            quotient = torch.where(usable, 1.0 / denominator, 0.0).to(z.dtype)
            u = torch.where(usable, (delta_z - applied + old_applied) * quotient, 0.0)
            v = torch.where(usable, v, 0.0)
            self.left.put(used, u)
            self.right.put(used, v)
            self.used += 1
            applied = applied + u * self._dot(v, residual).to(z.dtype)
        self.previous = (z, residual, applied)
        self.fresh = torch.zeros_like(self.fresh)
        return z - applied if damping is None else torch.addcmul(z, applied, damping, value=-1)

    def _restart(self) -> None:
        self.used = 0
        self.previous = None

    def forget(self, samples: Tensor) -> None:
        """Return the ``samples``, ``(batch,)`` bool, to B = −I."""
        self.left.clear(samples)
        self.right.clear(samples)
        self.fresh = self.fresh | samples

    def rows(self, index: Tensor) -> "Broyden":
        """The same approximation for some samples only."""
        self.left.rows(index)
        self.right.rows(index)
        self.fresh = self.fresh[index]
        if self.previous is not None:
            self.previous = tuple(part[index] for part in self.previous)
        return self
