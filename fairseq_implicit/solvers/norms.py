"""Sums and norms per sample, exact about padding."""

import torch
from torch import Tensor


def token_sum(values: Tensor) -> Tensor:
    """Sum ``(batch, time, ...)`` over time, strictly left to right, in float64.

    The order makes trailing zeros (padding) exactly neutral, which a pairwise sum does not promise.
    """
    return values.double().cumsum(dim=1)[:, -1]


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample of ``(batch, time, dim)``, float64, ``(batch,)``."""
    return token_sum(torch.linalg.vector_norm(x, dim=-1).double().square()).sqrt()
