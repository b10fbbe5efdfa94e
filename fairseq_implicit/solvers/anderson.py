"""Anderson acceleration, constrained type II, with a ridge that scales with the residuals.

Minimises ½‖Σ αᵢ gᵢ‖² + ½ λ s ‖α‖² over Σ αᵢ = 1, with gᵢ the residuals in the window and s their mean square, by
solving (GGᵀ/s + λI) y = 1 and α = y / Σy (Walker and Ni 2011). An absolute ridge would dominate the Gram matrix as the
residuals shrink and turn the mixing into a plain average.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_implicit.solvers.norms import token_sum


class Anderson:
    """The window of one solve.

    Args:
        z: a state, ``(batch, time, dim)``, for shape, dtype and device.
        window: residuals kept per sample.
        ridge: λ, relative to the mean squared residual.
    """

    def __init__(self, z: Tensor, window: int, ridge: float):
        batch, time, dim = z.shape
        # The window lies next to dim, so that both the inner products and the mixing are small matrix products.
        self.values = z.new_zeros(batch, time, window, dim)
        self.residuals = torch.zeros_like(self.values)
        self.gram = torch.zeros(batch, window, window, dtype=torch.float64, device=z.device)
        self.present = torch.zeros(batch, window, dtype=torch.bool, device=z.device)
        self.ridge = ridge
        self.slot = 0

    def step(self, z: Tensor, f_z: Tensor, residual: Tensor, damping: Optional[Tensor]) -> Tensor:
        """Take in ``f(z)`` and ``f(z) − z``, give the next state; ``damping`` is β, ``(batch, 1, 1)`` or ``None``."""
        slot, window = self.slot, self.gram.shape[1]
        self.values[:, :, slot] = f_z
        self.residuals[:, :, slot] = residual
        products = token_sum((self.residuals @ residual.unsqueeze(-1)).squeeze(-1))
        self.gram[:, slot, :] = products
        self.gram[:, :, slot] = products
        self.present[:, slot] = True
        self.slot = (slot + 1) % window

        weights = self._weights(slot).to(z.dtype)[:, None, None, :]
        mixed = (weights @ self.values).squeeze(2)
        if damping is None:
            return mixed
        return mixed - (1 - damping) * (weights @ self.residuals).squeeze(2)

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
        for name in ("values", "residuals", "gram", "present"):
            setattr(self, name, getattr(self, name)[index])
        return self
