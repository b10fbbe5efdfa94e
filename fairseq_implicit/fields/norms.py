"""Layer norms, and what may be varied in them."""

import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class NormConfig:
    """One kind of layer norm.

    Attributes:
        eps: added to the variance; 1e-5 in RoBERTa and GPT-2, 1e-12 in BERT, 1e-7 in DeBERTa.
        affine: learn a scale and, with ``bias``, a shift per channel.
        bias: learn the shift.

    Raises:
        ValueError: an ``eps`` that is not a positive number.
    """

    eps: float = 1e-5
    affine: bool = True
    bias: bool = True

    def __post_init__(self):
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"a layer norm needs a positive eps, got {self.eps}")

    def build(self, dim: int) -> nn.LayerNorm:
        """The norm of states of width ``dim``."""
        return nn.LayerNorm(dim, self.eps, elementwise_affine=self.affine, bias=self.bias)
