"""Narrow self-attention: each head sees its slice of the state, all through the same small maps (pbloem/former)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fairseq_implicit.fields.mixers.attention import Attending, AttendingConfig
from fairseq_implicit.fields.mixers.mixer import Mix
from fairseq_implicit.layout import UNPADDED, Layout


@dataclass(frozen=True)
class NarrowAttentionConfig(AttendingConfig):
    """The options of :class:`NarrowAttention`, whose heads divide the width of the state."""

    def build(self, dim: int, dropout_policy: str) -> NarrowAttention:
        return NarrowAttention(dim, self, dropout_policy)


class NarrowAttention(Attending):
    """Self-attention of slices of the state with one map each to queries, keys and values, which all heads share,
    without biases and without a map of what the heads found: 3 (dim / heads)² weights.

    What a head finds stays in its slice: permuting the slices of the state permutes those of the output. The map of the
    values is thus the one whose output is added to the state.

    An addition, ``(batch, time, 3 dim)``, goes into the projected q, k, v.

    Args:
        dim: width of the state.
        config: heads and dropout.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).

    Raises:
        ValueError: the heads do not divide ``dim``.
    """

    def __init__(self, dim: int, config: NarrowAttentionConfig, dropout_policy: str = "shared"):
        super().__init__(config.heads, config.dropout, dropout_policy)
        width = config.head_width(dim)
        self.queries = nn.Linear(width, width, bias=False)
        self.keys = nn.Linear(width, width, bias=False)
        self.values = nn.Linear(width, width, bias=False)

    def inner_projections(self) -> Iterator[nn.Linear]:
        yield from (self.queries, self.keys)

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.values

    def operations(self, time: int) -> int:
        return self.heads * (super().operations(time) + 4 * time * self.values.out_features)

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        attend = self.attending(x, layout)

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            slices = z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, time, width)
            projected = [project(slices) for project in (self.queries, self.keys, self.values)]
            if added is not None:
                parts = added.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
                projected = [each + part for each, part in zip(projected, parts, strict=True)]
            return attend(*projected).transpose(1, 2).flatten(2)

        return mix
