"""Multi-head self-attention with one fused projection, batch first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.mixers.mixer import Mix, Mixer, MixerConfig
from fairseq_implicit.fields.mixers.rotary import rotation
from fairseq_implicit.fields.shared_dropout import ReplayedGenerator, SharedDropout
from fairseq_implicit.fields.sub_layer import Moved
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError


@dataclass(frozen=True)
class AttendingConfig(MixerConfig):
    """The options of :class:`Attending`.

    Attributes:
        heads: number of heads.
        dropout: rate on the attention probabilities.
    """

    heads: int
    dropout: float = 0.0

    @property
    def noise(self) -> float:
        return self.dropout

    def added_width(self, dim: int) -> int:
        return 3 * dim

    def head_width(self, dim: int) -> int:
        """Of heads that share a state of width ``dim`` among them.

        Raises:
            ValueError: they do not divide it.
        """
        if self.heads < 1 or dim % self.heads:
            raise ValueError(f"the number of attention heads must divide the width: {self.heads} heads, width {dim}")
        return dim // self.heads


@dataclass(frozen=True)
class AttentionConfig(AttendingConfig):
    """The options of :class:`MultiHeadAttention`, whose heads divide the width of the state.

    Attributes:
        no_biases: the projections are linear maps alone.
        rotary_base: of rotary positions, see :mod:`fairseq_implicit.fields.mixers.rotary`; ``None``: there are none.
        qk_norm: a layer norm with a scale on each head's queries and keys (arXiv 2302.05442).
        window: how many tokens on each side a token sees; ``None``: all.
        global_every: every so many layers, from the first on, one sees all tokens; ``None``: all layers are alike.
        local_rotary_base: the base of the other layers; ``None``: the same.

    Raises:
        OptionError: an impossible value, or an option without the one that it is about.
    """

    no_biases: bool = False
    rotary_base: Optional[float] = field(
        default=None,
        metadata={"help": "rotary positions of this base, such as 10000, in place of learned ones (default: none)"},
    )
    qk_norm: bool = field(
        default=False, metadata={"help": "layer norms, without shift, of each head's queries and keys"}
    )
    window: Optional[int] = field(
        default=None, metadata={"help": "how many tokens on each side of itself a token sees (default: all)"}
    )
    global_every: Optional[int] = field(
        default=None,
        metadata={"help": "every so many layers, from the first on, one sees all tokens in spite of the window"},
    )
    local_rotary_base: Optional[float] = field(
        default=None, metadata={"help": "the rotary base of the layers that have the window (default: that of all)"}
    )

    def __post_init__(self):
        for name in ("rotary_base", "local_rotary_base"):
            base = getattr(self, name)
            if base is not None and not 1.0 < base < math.inf:
                raise OptionError(name, f"a base of {base:g} makes no angles: give a number above 1, such as 10000.")
        for name, least in (("window", 1), ("global_every", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(name, f"it must be at least {least}, not {value}; leave it out to see all tokens.")
        if self.global_every is not None and self.window is None:
            raise OptionError(
                "global_every", "all layers see all tokens: set `window` for the others, or leave it out."
            )
        if self.local_rotary_base is not None and (self.rotary_base is None or self.global_every is None):
            raise OptionError(
                "local_rotary_base", "it is for layers beside global ones: it needs `rotary_base` and `global_every`."
            )

    @property
    def positional(self) -> bool:
        return self.rotary_base is not None

    @property
    def differs_by(self) -> str | None:
        return None if self.global_every is None else "global_every"

    def at(self, layer: int) -> AttentionConfig:
        if self.global_every is None:
            return self
        alike = replace(self, global_every=None, local_rotary_base=None)
        if layer % self.global_every == 0:
            return replace(alike, window=None)
        return alike if self.local_rotary_base is None else replace(alike, rotary_base=self.local_rotary_base)

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

    def attending(
        self, x: Tensor, layout: Layout, window: int | None = None, scale: float | None = None
    ) -> Callable[..., Tensor]:
        """``(q, k, v, bias=None) -> values``, all ``(batch, heads, time, width)``, with one solve's noise.

        Args:
            x: what the depth starts from, ``(batch, time, dim)``.
            layout: of the batch.
            window: how many tokens on each side a token sees; ``None``: all.
            scale: of products of queries and keys; ``None``: one over the root of ``width``. A bias, ``(batch, heads,
                time, time)``, is added to them as it is, and says itself which keys are hidden.
        """
        rate = self.dropout.rate if self.training else 0.0
        visibility = layout.visibility(x, window)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            mask, causal = visibility if bias is None else (bias, False)
            return functional.scaled_dot_product_attention(q, k, v, mask, rate, causal, scale=scale)

        if rate == 0.0 or self.dropout.policy == "independent":
            return attend
        if x.device.type == "cpu":
            # No fused kernel drops on a CPU, so the probabilities exist anyway: drop them with a mask drawn once.
            batch, time, _ = x.shape
            drop = self.dropout.prepare(x.new_empty(0).expand(batch, self.heads, time, 0), width=time)
            pairs = layout.mask(x, window)
            return lambda q, k, v, bias=None: drop(_probabilities(q, k, pairs, bias, scale)) @ v
        replay = ReplayedGenerator(x.device)

        def replayed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            with replay:
                return attend(q, k, v, bias)

        return replayed


class MultiHeadAttention(Attending):
    """Self-attention (Vaswani et al. 2017, §3.2) through torch's scaled_dot_product_attention.

    An addition, ``(batch, time, 3 dim)``, goes into the projected q, k, v.

    Args:
        dim: width of the state.
        config: see there; of one layer.
        dropout_policy: ``shared`` or ``independent`` (see :class:`SharedDropout`).

    Raises:
        ValueError: the heads do not divide ``dim``, they have no pairs of numbers to turn, or a rate or policy is
            impossible.
    """

    def __init__(self, dim: int, config: AttentionConfig, dropout_policy: str = "shared"):
        super().__init__(config.heads, config.dropout, dropout_policy)
        width = config.head_width(dim)
        if config.rotary_base is not None and width % 2:
            raise ValueError(
                f"rotary positions turn pairs of numbers: {config.heads} attention heads make ones of width {width}; "
                "take another number of heads, or none of the rotary positions"
            )
        self.config = config
        self.qkv = nn.Linear(dim, 3 * dim, bias=not config.no_biases)
        self.out = nn.Linear(dim, dim, bias=not config.no_biases)
        self.query_norm, self.key_norm = (
            nn.LayerNorm(width, bias=False) if config.qk_norm else nn.Identity() for _ in range(2)
        )

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
        attend, base = self.attending(x, layout, self.config.window), self.config.rotary_base
        turn = nn.Identity() if base is None else rotation(x, x.shape[2] // self.heads, base, layout)

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            q, k, v = self.projected(z, added)
            q, k = turn(self.query_norm(q)), turn(self.key_norm(k))
            return self.out(attend(q, k, v).transpose(1, 2).reshape(z.shape))

        return mix

    def projected(self, z: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of the heads, each ``(batch, heads, time, dim / heads)``."""
        batch, time, dim = z.shape
        projected = self.qkv(z)
        if added is not None:
            projected = projected + added
        return projected.view(batch, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = (q / math.sqrt(q.shape[-1]) if scale is None else q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    elif mask is not None:
        # Not minus infinity: a sequence of nothing but padding would turn into NaN, and into NaN gradients.
        scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)
