"""Picard's iteration, damped, and with it what every acceleration of it has."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class Picard:
    """The plain damped iteration; what accelerates it overrides what it does otherwise.

    Attributes:
        knows_residual: whether the residual of the next state is known before it is evaluated, where the map is affine.
    """

    knows_residual: ClassVar[bool] = False

    def step(self, z: Tensor, f_z: Tensor, residual: Tensor, damping: Tensor | None) -> Tensor:
        """Take in ``f(z)`` and ``f(z) - z``, give the next state; ``damping`` is ``(batch, 1, 1)`` or ``None``."""
        if damping is None:
            return f_z
        # What is not damped keeps the bits that it has where nobody is.
        return torch.where(damping == 1.0, f_z, torch.addcmul(z, residual, damping))

    def expected_residual(self) -> Tensor:
        """The norm of :meth:`mixed_residual`, ``(batch,)``, as far as it is known without forming that."""
        raise TypeError(f"{type(self).__name__} does not know the residual of its next state")

    def mixed_residual(self) -> Tensor:
        """The residual of the next state, ``(batch, time, dim)``, where the map is affine."""
        raise TypeError(f"{type(self).__name__} does not know the residual of its next state")

    def forget(self, samples: Tensor) -> None:
        """Drop what is remembered of the ``samples``, ``(batch,)`` bool: here nothing."""

    def rows(self, index: Tensor) -> Picard:
        """That of the samples ``index``."""
        return self
