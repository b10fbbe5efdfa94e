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
        self.gram = torch.zeros(batch, window, window, dtype=torch.float64, device=z.device)
        self.present = torch.zeros(batch, window, dtype=torch.bool, device=z.device)
        self.ridge = ridge
        self.weights = torch.zeros(batch, window, dtype=torch.float64, device=z.device)
        self.slot = 0

    def step(self, z: Tensor, f_z: Tensor, residual: Tensor, damping: Tensor | None) -> Tensor:
        """Take in ``f(z)`` and ``f(z) − z``, give the next state; ``damping`` is β, ``(batch, 1, 1)`` or ``None``."""
        slot, window = self.slot, self.gram.shape[1]
        self.values.put(slot, f_z)
        self.residuals.put(slot, residual)
        products = self.residuals.products(residual, window)
        self.gram[:, slot, :] = products
        self.gram[:, :, slot] = products
        self.present[:, slot] = True
        self.slot = (slot + 1) % window

        self.weights = self._weights(slot)
        mixed = self.values.combine(self.weights)
        return mixed if damping is None else mixed - (1 - damping) * self.residuals.combine(self.weights)

    def expected_residual(self) -> Tensor:
        """The norm of :meth:`mixed_residual`, ``(batch,)``, as the Gram matrix has it: right to the rounding of the
        largest residual in the window times the weights' squared norm."""
        weights = torch.where(self.present, self.weights, 0.0)
        gram = torch.where(self.present[:, :, None] & self.present[:, None, :], self.gram, 0.0)
        square = (weights[:, None, :] @ gram @ weights[:, :, None]).flatten()
        return square.clamp(min=0.0).sqrt()

    def mixed_residual(self) -> Tensor:
        """Σ αᵢ gᵢ of the last step, ``(batch, time, dim)``.

        Where the map is affine it is the residual of the mixed state Σ αᵢ zᵢ.
        """
        return self.residuals.combine(torch.where(self.present, self.weights, 0.0))

    def _weights(self, newest: int) -> Tensor:
        present = self.present
        gram = torch.where(present[:, :, None] & present[:, None, :], self.gram, 0.0)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # Sums as cumsum: a strided sum may pair its terms differently from one batch size to the next.
        mean_square = diagonal.cumsum(1)[:, -1] / present.sum(1).clamp(min=1)
        # Absent slots get the unit row y = 0.
        system = gram / mean_square[:, None, None] + torch.diag_embed(torch.where(present, self.ridge, 1.0).double())
        solution, _ = torch.linalg.solve_ex(system, present.double())
        weights = solution / solution.cumsum(1)[:, -1:]
        picard = torch.zeros_like(weights)
        picard[:, newest] = 1.0
        return torch.where(weights.isfinite().all(1, keepdim=True), weights, picard)

    def forget(self, samples: Tensor) -> None:
        """Empty the window of the ``samples``, ``(batch,)`` bool."""
        self.present = self.present & ~samples[:, None]

    def rows(self, index: Tensor) -> "Anderson":
        """The same window for some samples only."""
        self.values.rows(index)
        self.residuals.rows(index)
        self.gram, self.present, self.weights = self.gram[index], self.present[index], self.weights[index]
        return self
