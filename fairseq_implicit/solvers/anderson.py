"""Anderson acceleration, constrained type II, with a ridge that scales with the residuals.

Minimises ½‖Σ αᵢ gᵢ‖² + ½ λ s ‖α‖² over Σ αᵢ = 1, with gᵢ the residuals in the window and s their mean square, by
solving (GGᵀ/s + λI) y = 1 and α = y / Σy (Walker and Ni 2011). An absolute ridge would dominate the Gram matrix as the
residuals shrink and turn the mixing into a plain average.
"""

import torch
from torch import Tensor

from fairseq_implicit.solvers.picard import Picard
from fairseq_implicit.solvers.stored_states import StoredStates


class Anderson(Picard):
    """The window of one solve.

    Args:
        z: a state, ``(batch, time, dim)``, for shape, dtype and device.
        window: residuals kept per sample.
        ridge: λ, relative to the mean squared residual.
    """

    knows_residual = True

    def __init__(self, z: Tensor, window: int, ridge: float):
        batch = z.shape[0]
        self.values, self.residuals = StoredStates(z, window), StoredStates(z, window)
        # What is not present counts as a residual of 0 with a ridge of 1, which gets the weight 0.
        self.gram = torch.zeros(batch, window, window, dtype=torch.float64, device=z.device)
        self.present = torch.zeros(batch, window, dtype=torch.bool, device=z.device)
        self.ridges = torch.ones(batch, window, dtype=torch.float32, device=z.device)
        self.ridge = ridge
        self.weights = torch.zeros(batch, window, dtype=torch.float64, device=z.device)
        self.slot = self.used = 0

    def step(self, z: Tensor, f_z: Tensor, residual: Tensor, damping: Tensor | None) -> Tensor:
        """Take in ``f(z)`` and ``f(z) − z``, give the next state; ``damping`` is β, ``(batch, 1, 1)`` or ``None``."""
        slot, window = self.slot, self.gram.shape[1]
        self.values.put(slot, f_z)
        self.residuals.put(slot, residual)
        self.present[:, slot] = True
        self.ridges[:, slot] = self.ridge
        # All of the window, used or not: a product of fewer columns takes another path through the library, with other
        # rounding.
        products = torch.where(self.present, self.residuals.products(residual, window), 0.0)
        self.gram[:, slot, :] = products
        self.gram[:, :, slot] = products
        self.slot, self.used = (slot + 1) % window, max(self.used, slot + 1)

        self.weights = self._weights(slot)
        mixed = self.values.combine(self.weights[:, : self.used])
        if damping is None:
            return mixed
        return mixed - (1 - damping) * self.residuals.combine(self.weights[:, : self.used])

    def expected_residual(self) -> Tensor:
        """The norm of :meth:`mixed_residual`, ``(batch,)``, as the Gram matrix has it: right to the rounding of the
        largest residual in the window times the weights' squared norm."""
        square = (self.weights[:, None, :] @ self.gram @ self.weights[:, :, None]).flatten()
        return square.clamp(min=0.0).sqrt()

    def mixed_residual(self) -> Tensor:
        """Σ αᵢ gᵢ of the last step, ``(batch, time, dim)``.

        Where the map is affine it is the residual of the mixed state Σ αᵢ zᵢ.
        """
        return self.residuals.combine(self.weights[:, : self.used])

    def _weights(self, newest: int) -> Tensor:
        # Sums as cumsum: a strided sum may pair its terms differently from one batch size to the next.
        mean_square = self.gram.diagonal(dim1=1, dim2=2).cumsum(1)[:, -1] / self.present.sum(1)
        system = self.gram / mean_square[:, None, None]
        system.diagonal(dim1=1, dim2=2).add_(self.ridges)
        solution, _ = torch.linalg.solve_ex(system, self.present.double())
        weights = solution / solution.cumsum(1)[:, -1:]
        picard = torch.zeros_like(weights)
        picard[:, newest] = 1.0
        return torch.where(weights.isfinite().all(1, keepdim=True), weights, picard)

    def forget(self, samples: Tensor) -> None:
        """Empty the window of the ``samples``, ``(batch,)`` bool."""
        self.present[samples] = False
        self.gram[samples] = 0.0
        self.ridges[samples] = 1.0

    def rows(self, index: Tensor) -> "Anderson":
        """The same window for some samples only."""
        self.values.rows(index)
        self.residuals.rows(index)
        self.gram, self.present, self.weights = self.gram[index], self.present[index], self.weights[index]
        self.ridges = self.ridges[index]
        return self
