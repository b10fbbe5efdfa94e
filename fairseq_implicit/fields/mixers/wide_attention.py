"""Wide self-attention: each head sees the state in its whole width (pbloem/former)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fairseq_implicit.fields.mixers.attention import Attending, AttendingConfig
from fairseq_implicit.fields.mixers.mixer import Mix
from fairseq_implicit.layout import UNPADDED, Layout


@dataclass(frozen=True)
class WideAttentionConfig(AttendingConfig):
    """The options of :class:`WideAttention`."""

    def added_width(self, dim: int) -> int:
        return 3 * self.heads * dim

    def build(self, dim: int, dropout_policy: str) -> WideAttention:
        return WideAttention(dim, self, dropout_policy)


class WideAttention(Attending):
    """Self-attention with queries, keys and values of ``dim`` numbers in every head, without biases, and a map of all
    heads' values to one state, with a bias: 4 heads dim² + dim weights. With one head it is ordinary attention.

    An addition, ``(batch, time, 3 heads dim)``, goes into the projected q, k, v.

    Args:
        dim: width of the state.
        config: heads and dropout.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).
    """

    def __init__(self, dim: int, config: WideAttentionConfig, dropout_policy: str = "shared"):
        super().__init__(config.heads, config.dropout, dropout_policy)
        self.qkv = nn.Linear(dim, 3 * config.heads * dim, bias=False)
        self.out = nn.Linear(config.heads * dim, dim)

    def inner_projections(self) -> Iterator[nn.Linear]:
        yield self.qkv

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.out

    def operations(self, time: int) -> int:
        return super().operations(time) + 4 * time * self.out.in_features

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        attend = self.attending(x, layout)

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            projected = self.qkv(z)
            if added is not None:
                projected = projected + added
            q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(attend(q, k, v).transpose(1, 2).flatten(2))

        return mix
