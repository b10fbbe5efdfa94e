"""Multi-head self-attention with one fused projection, batch first."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.shared_dropout import ReplayedGenerator, SharedDropout
from fairseq_implicit.layout import UNPADDED, Layout

#: ``attend(z, injection=None) -> (batch, time, dim)``
Attend = Callable[..., Tensor]


class MultiHeadAttention(nn.Module):
    """Self-attention (Vaswani et al. 2017, §3.2) through torch's scaled_dot_product_attention.

    Args:
        dim: width of the state; must be a multiple of ``heads``.
        heads: number of heads.
        dropout: rate on the attention probabilities.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).

    Raises:
        ValueError: ``heads`` does not divide ``dim``, or a rate or policy is impossible.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, dropout_policy: str = "shared"):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"the number of attention heads must divide the width: {heads} heads, width {dim}")
        self.heads = heads
        self.dropout = SharedDropout(dropout, dropout_policy)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Attend:
        """Fix one solve's visibility and noise.

        Args:
            x: ``(batch, time, dim)``.
            layout: of the batch.

        Returns:
            ``attend(z, injection=None)``; ``injection``, ``(batch, time, 3 dim)``, is added to the projected q, k, v.
        """
        mix = self._mixing(x, layout)

        def attend(z: Tensor, injection: Tensor | None = None) -> Tensor:
            batch, time, dim = z.shape
            projected = self.qkv(z)
            if injection is not None:
                projected = projected + injection
            q, k, v = projected.view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(mix(q, k, v).transpose(1, 2).reshape(batch, time, dim))

        return attend

    def _mixing(self, x: Tensor, layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """``(q, k, v) -> values``, all ``(batch, heads, time, dim / heads)``, with one solve's noise."""
        rate = self.dropout.rate if self.training else 0.0
        mask, causal = layout.visibility(x)
        if rate == 0.0 or self.dropout.policy == "independent":
            return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, mask, rate, causal)
        if x.device.type == "cpu":
            # No fused kernel drops on a CPU, so the probabilities exist anyway: drop them with a mask drawn once.
            batch, time, _ = x.shape
            drop = self.dropout.prepare(x.new_empty(0).expand(batch, self.heads, time, 0), width=time)
            pairs = layout.mask(x)
            return lambda q, k, v: drop(_probabilities(q, k, pairs)) @ v
        replay = ReplayedGenerator(x.device)

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with replay:
                return functional.scaled_dot_product_attention(q, k, v, mask, rate, causal)

        return mix


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        # Not minus infinity: a sequence of nothing but padding would turn into NaN, and into NaN gradients.
        scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)
