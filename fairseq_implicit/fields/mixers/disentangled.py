"""Disentangled attention: what a token says and how far it stands away are compared apart (DeBERTa, arXiv 2006.03654).

With q, k of the states and q', k' of a table of relative positions, one for all layers, query i meets key j with

    (q_i · k_j + q_i · k'_r + k_j · q'_r) / sqrt(width of a head · number of terms),  r = row of i - j

of which the second term (c2p) or the third (p2c) may be left out. p2c takes the row of i - j as well, as all published
weights do, where equation 4 of the paper has that of j - i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from fairseq_implicit.fields.mixers.attention import AttendingConfig, AttentionConfig, MultiHeadAttention
from fairseq_implicit.fields.mixers.mixer import Mix, Mixer
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.shared_dropout import SharedDropout
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError

TERMS = ("c2p", "p2c")


@dataclass(frozen=True)
class DisentangledConfig(AttendingConfig):
    """The options of :class:`DisentangledAttention`, whose heads divide the width of the state; by default those of
    DeBERTa v3.

    Attributes:
        hidden_dropout: rate on the table.
        no_biases: the projections and the table's norm have none.
        norm_eps: of the table's layer norm.
        terms: of :data:`TERMS`, joined by commas.
        buckets: rows of the table for the tokens on one side: places up to half as many have one each, farther ones
            share them by the logarithm of their distance. 0: each place up to ``distance`` has one.
        distance: from which on all places are one.
        own_maps: table and states are mapped by different matrices.
        plain_table: no layer norm of the table.

    Raises:
        OptionError: an unknown term, or sizes that make no buckets.
    """

    hidden_dropout: float = 0.0
    no_biases: bool = False
    norm_eps: float = 1e-7
    terms: str = field(
        default="c2p,p2c",
        metadata={"help": "what is compared besides content with content: c2p (content with position), p2c, or both"},
    )
    buckets: int = field(
        default=256,
        metadata={"help": "relative positions that are told apart on each side; farther ones share one by logarithm"},
    )
    distance: int = field(default=512, metadata={"help": "distance from which on all tokens are equally far"})
    own_maps: bool = field(
        default=False, metadata={"help": "matrices of their own for the table of positions, not those of q and k"}
    )
    plain_table: bool = field(default=False, metadata={"help": "no LayerNorm of the table of positions"})

    def __post_init__(self):
        terms = self.terms.split(",")
        if not set(terms) <= set(TERMS) or len(set(terms)) < len(terms):
            raise OptionError("terms", f"{self.terms!r} is unknown: choose c2p, p2c or c2p,p2c.")
        if self.distance < 1:
            raise OptionError("distance", f"{self.distance} tokens: it must be at least 1.")
        if self.buckets < 0 or self.buckets == 1:
            raise OptionError("buckets", f"{self.buckets} of them: give at least 2, or 0 for one at each place.")
        if self.buckets and self.distance < self.buckets // 2 + 2:
            raise OptionError(
                "buckets",
                f"half of {self.buckets} are for near places, and `distance` {self.distance} leaves none for the "
                f"others: set that to {self.buckets // 2 + 2} or more, or buckets to 0.",
            )

    @property
    def noise(self) -> float:
        return max(self.dropout, self.hidden_dropout)

    @property
    def positional(self) -> bool:
        return True

    @property
    def span(self) -> int:
        """Rows of the table on each side."""
        return self.buckets or self.distance

    def build(self, dim: int, dropout_policy: str) -> DisentangledAttention:
        return DisentangledAttention(dim, self, dropout_policy)


def buckets_of(relative: Tensor, buckets: int, distance: int) -> Tensor:
    """The bucket of each relative position, of the same shape and sign, int64.

    Places up to half of ``buckets`` are their own; ``distance - 1`` is in the last, ``buckets - 1``. In float32 on
    whatever device: at a bucket's end the last bit decides, and published weights were trained with that.
    """
    middle, size = buckets // 2, relative.abs()
    ratio = (size.clamp(min=middle) / middle).float()
    logarithm = torch.log(ratio) / torch.log(ratio.new_tensor((distance - 1) / middle))
    far = (torch.ceil(logarithm * (middle - 1)) + middle).long()
    return torch.where(size <= middle, relative, relative.sign() * far)


@lru_cache(maxsize=16)
def table_rows(buckets: int, distance: int) -> tuple[int, ...]:
    """The table's row of each relative position from ``-distance`` to ``distance``; none decreases."""
    relative, span = torch.arange(-distance, distance + 1, device="cpu"), buckets or distance
    found = buckets_of(relative, buckets, distance) if buckets else relative
    return tuple((found + span).clamp(0, 2 * span - 1).tolist())


class RelativeTable(nn.Module):
    """Embeddings of relative positions, ``(2 span, dim)``, and their norm."""

    def __init__(self, span: int, dim: int, norm: NormConfig | None):
        super().__init__()
        self.embedding = nn.Embedding(2 * span, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norm = None if norm is None else norm.build(dim)

    def forward(self, rows: Tensor) -> Tensor:
        """``(rows, dim)`` of the numbers ``rows``."""
        found = self.embedding(rows)
        return found if self.norm is None else self.norm(found)


class DisentangledAttention(MultiHeadAttention):
    """Attention whose scores have terms of the relative position, of states ``(batch, time, dim)``.

    The table is one module, which the layers of a depth have in common (:meth:`share`): its weights stand in a state
    dict under the name of every layer, and among the parameters once.

    Raises:
        ValueError: the heads do not divide ``dim``, or a rate or policy is impossible.
    """

    def __init__(self, dim: int, config: DisentangledConfig, dropout_policy: str = "shared"):
        super().__init__(dim, AttentionConfig(config.heads, config.dropout, config.no_biases), dropout_policy)
        self.relative, bias = config, not config.no_biases
        terms = config.terms.split(",")
        self.scale = 1 / math.sqrt(dim // config.heads * (1 + len(terms)))
        self.c2p, self.p2c = (name in terms for name in TERMS)
        self.position_keys = nn.Linear(dim, dim, bias) if config.own_maps and self.c2p else None
        self.position_queries = nn.Linear(dim, dim, bias) if config.own_maps and self.p2c else None
        self.table = RelativeTable(
            config.span, dim, None if config.plain_table else NormConfig(config.norm_eps, bias=bias)
        )
        self.table_dropout = SharedDropout(config.hidden_dropout, dropout_policy)

    def share(self, first: Mixer) -> None:
        assert isinstance(first, DisentangledAttention), "layers of one depth have one kind of mixer"
        self.table = first.table

    def inner_projections(self) -> Iterator[nn.Linear]:
        own = (self.qkv, self.position_keys, self.position_queries)
        return (linear for linear in own if linear is not None)

    def operations(self, time: int) -> int:
        # The table's own maps are those of a batch, however many tokens it has: not counted.
        dim = self.out.in_features
        first, last = self._reach(time)
        return 8 * dim * dim + 4 * time * dim + 2 * (last - first + 1) * dim * (self.c2p + self.p2c)

    def _reach(self, time: int) -> tuple[int, int]:
        """The first and the last row of the table that tokens at ``time`` places in a row need."""
        rows, distance = table_rows(self.relative.buckets, self.relative.distance), self.relative.distance
        reach = min(time - 1, distance)
        return rows[distance - reach], rows[distance + reach]

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        # Weights are read in mix() alone: along the depth they may be others at each evaluation.
        first, last = self._reach(x.shape[1]) if layout.positions is None else (0, 2 * self.relative.span - 1)
        rows = torch.arange(first, last + 1, device=x.device)
        index = self._index(x, layout) - first
        drop = self.table_dropout.prepare(x.new_empty(()).expand(len(rows), x.shape[2]))
        attend = self.attending(x, layout, scale=self.scale)
        visible = layout.mask(x)
        hidden = None if visible is None else visible.logical_not()

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            q, k, v = self.projected(z, added)
            bias = self._bias(q, k, drop(self.table(rows)), index)
            if hidden is not None:
                # Half of the least number: to that a product may be added, and a sequence of padding has no NaN.
                bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min / 2)
            return self.out(attend(q, k, v, bias).transpose(1, 2).reshape(z.shape))

        return mix

    def _index(self, x: Tensor, layout: Layout) -> Tensor:
        """The table's row for each query (third) and key (last): ``(batch or 1, 1, time, time)`` int64."""
        config = self.relative
        places = layout.places(x)
        relative = (places[:, None, :, None] - places[:, None, None, :]).clamp(-config.distance, config.distance)
        rows = torch.tensor(table_rows(config.buckets, config.distance), device=x.device)
        return rows[relative + config.distance]

    def _bias(self, q: Tensor, k: Tensor, table: Tensor, index: Tensor) -> Tensor:
        """The terms of relative positions, scaled: ``(batch, heads, time, time)``.

        Args:
            q, k: of the states, ``(batch, heads, time, dim / heads)``.
            table: ``(rows, dim)``.
            index: see :meth:`_index`.
        """
        shape = (*q.shape[:-1], q.shape[-2])
        queries, keys = self._mapped(table)
        terms = []
        if keys is not None:
            terms.append((q @ self._by_head(keys)).gather(-1, index.expand(shape)))
        if queries is not None:
            found = (k @ self._by_head(queries)).gather(-1, index.transpose(-1, -2).expand(shape))
            terms.append(found.transpose(-1, -2))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def _mapped(self, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Queries and keys of the table, ``(rows, dim)``, where terms need them."""
        if self.relative.own_maps:
            queries, keys = self.position_queries, self.position_keys
            return (None if queries is None else queries(table), None if keys is None else keys(table))
        q, k, _ = self.qkv(table).chunk(3, dim=-1)
        return (q if self.p2c else None, k if self.c2p else None)

    def _by_head(self, mapped: Tensor) -> Tensor:
        """``(rows, dim)``, scaled, as ``(heads, dim / heads, rows)``."""
        return (mapped * self.scale).view(len(mapped), self.heads, -1).permute(1, 2, 0)
