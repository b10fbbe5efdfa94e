"""Multi-head self-attention with one fused projection, batch first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.mixers.mixer import Mix, Mixer, MixerConfig
from fairseq_implicit.fields.shared_dropout import ReplayedGenerator, SharedDropout
from fairseq_implicit.fields.sub_layer import Moved
from fairseq_implicit.layout import UNPADDED, Layout


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """The options of :class:`MultiHeadAttention`.

    Attributes:
        heads: number of heads; must divide the width of the state.
        dropout: rate on the attention probabilities.
    """

    heads: int
    dropout: float = 0.0

    @property
    def noise(self) -> float:
        return self.dropout

    def added_width(self, dim: int) -> int:
        return 3 * dim

    def build(self, dim: int, dropout_policy: str) -> MultiHeadAttention:
        return MultiHeadAttention(dim, self, dropout_policy)


class Attending(Mixer):
    """Heads whose queries, keys and values meet in torch's scaled_dot_product_attention.

    Args:
        heads: their number.
        dropout: rate on the attention probabilities.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).

    Raises:
        ValueError: an impossible rate or policy.
    """

    def __init__(self, heads: int, dropout: float, dropout_policy: str):
        super().__init__()
        self.heads = heads
        self.dropout = SharedDropout(dropout, dropout_policy)

    def attending(self, x: Tensor, layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """``(q, k, v) -> values``, all ``(batch, heads, time, width)``, with one solve's noise."""
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

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with replay:
                return functional.scaled_dot_product_attention(q, k, v, mask, rate, causal)

        return attend


class MultiHeadAttention(Attending):
    """Self-attention (Vaswani et al. 2017, §3.2) through torch's scaled_dot_product_attention.

    An addition, ``(batch, time, 3 dim)``, goes into the projected q, k, v.

    Args:
        dim: width of the state.
        config: heads and dropout.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).

    Raises:
        ValueError: the heads do not divide ``dim``, or a rate or policy is impossible.
    """

    def __init__(self, dim: int, config: AttentionConfig, dropout_policy: str = "shared"):
        super().__init__(config.heads, config.dropout, dropout_policy)
        if config.heads < 1 or dim % config.heads:
            raise ValueError(f"the number of attention heads must divide the width: {config.heads} heads, width {dim}")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def inner_projections(self) -> Iterator[nn.Linear]:
        yield self.qkv

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.out

    @torch.no_grad()
    def start_at_neighbours(self, moved: Moved) -> None:
        """The heads begin with the tokens 1 place before and behind, 2 before and behind, and so on: their queries are
        their keys, moved there. Products of queries and keys that mean something from the start let small models learn
        much sooner (arXiv 2305.09828, where that is the identity)."""
        queries, keys, _ = self.qkv.weight.chunk(3)
        for head, (query, key) in enumerate(zip(queries.chunk(self.heads), keys.chunk(self.heads), strict=True)):
            distance = head // 2 + 1
            query.copy_(moved(key, distance if head % 2 else -distance))

    def operations(self, time: int) -> int:
        # A query with each key, a probability with each value.
        return super().operations(time) + 4 * time * self.out.in_features

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        attend = self.attending(x, layout)

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            batch, time, dim = z.shape
            projected = self.qkv(z)
            if added is not None:
                projected = projected + added
            q, k, v = projected.view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(attend(q, k, v).transpose(1, 2).reshape(batch, time, dim))

        return mix


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        # Not minus infinity: a sequence of nothing but padding would turn into NaN, and into NaN gradients.
        scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)
