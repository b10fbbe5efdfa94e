"""A small transformer-like cell for the solver tests."""

import math

import torch
from torch import Tensor, nn

from fairseq_implicit.layout import UNPADDED, Layout


class ToyCell(nn.Module):
    """``LN(z + g u + softmax-attention(z))`` followed by ``LN(y + tanh FFN(y))``, float64, contractive at gain 1."""

    def __init__(self, dim: int = 6, hidden: int = 8, gain: float = 1.0, std: float = 0.3, seed: int = 0):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.gain = nn.Parameter(torch.tensor(gain))
        self.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*self.qkv.parameters(), *self.fc1.parameters(), *self.fc2.parameters()):
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def map(self, u: Tensor, layout: Layout = UNPADDED):
        """``z -> f(z; u)``."""

        def f(z: Tensor) -> Tensor:
            q, k, v = self.qkv(z).chunk(3, -1)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            if layout.real is not None:
                scores = scores.masked_fill(~layout.real[:, None, :], -math.inf)
            y = self.norms[0](z + self.gain * u + scores.softmax(-1) @ v)
            return layout.keep(self.norms[1](y + self.fc2(torch.tanh(self.fc1(y)))))

        return f


def toy_input(batch: int = 3, time: int = 4, dim: int = 6, seed: int = 7) -> Tensor:
    return torch.randn(batch, time, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
