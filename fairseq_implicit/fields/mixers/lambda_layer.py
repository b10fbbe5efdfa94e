"""The 1-D lambda layer: tokens write linear maps, and queries are put through them (arXiv 2102.08602).

With ``K`` softmaxed over the tokens and ``u`` the intra-depth,

    content lambda    λc       = Σ_m Σ_u K[m, u] ⊗ V[m, u]                      (key, value), one for a sequence
    position lambda   λp[n]    = Σ_m Σ_u E[m − n, u] ⊗ V[m, u]                  (key, value), one for each token
    output            y[n, h]  = Q[n, h] (λc + λp[n])                           (value), heads side by side

E is a table of distances. It reaches ``context // 2`` tokens to each side, which is a convolution of V and linear in
the length, or all of them. No map from token to token is formed, and heads share the lambdas.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.mixers.mixer import Mix, Mixer, MixerConfig
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError, check_choice

LONGEST = 512  # tokens in a table of all distances

#: Where lambda layers that are prepared leave the content lambdas of their evaluations; see :func:`content_lambdas`.
_wanted: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("content lambdas", default=None)


@contextlib.contextmanager
def content_lambdas(found: list[Tensor] | None) -> Iterator[None]:
    """Lambda layers that are prepared within it add to ``found`` the content lambda ``(batch, key, value)`` of each of
    their evaluations, in that order; with ``None`` nothing happens."""
    token = _wanted.set(found)
    try:
        yield
    finally:
        _wanted.reset(token)


@dataclass(frozen=True)
class LambdaConfig(MixerConfig):
    """The options of :class:`LambdaLayer`.

    Attributes:
        heads: queries of a token, each of which reads ``dim / heads`` values; must divide the width of the state.
        key_depth: numbers in a query and in a key.
        intra_depth: keys and values of a token, whose lambdas are added.
        context: how many tokens a position lambda reads, its own in their middle; 0: all.
        max_length: the longest input of a table of all distances; ``None``: ``LONGEST``.
        norm: of queries and values, see :data:`NORMS`. ``batch`` is the paper's.

    Raises:
        OptionError: an impossible value.
    """

    heads: int
    key_depth: int = field(default=8, metadata={"help": "numbers in each query and key of a lambda layer"})
    intra_depth: int = field(
        default=4, metadata={"help": "keys and values of each token of a lambda layer, whose lambdas are added"}
    )
    context: int = field(
        default=25,
        metadata={"help": "how many tokens a position lambda reads, its own in their middle, so an odd number; 0: all"},
    )
    max_length: Optional[int] = field(
        default=None, metadata={"help": f"the longest input with --lambda-context 0 (default {LONGEST})"}
    )
    norm: str = field(
        default="layer",
        metadata={
            "help": "norm of queries and values: layer, none, or batch, whose statistics are those of the batch, so "
            "that it goes with one evaluation per block only"
        },
    )

    def __post_init__(self):
        for name in ("heads", "key_depth", "intra_depth", "longest"):
            if getattr(self, name) < 1:
                raise OptionError("max_length" if name == "longest" else name, "it must be at least 1.")
        if self.context and self.max_length is not None:
            raise OptionError(
                "max_length", f"with a `context` of {self.context} tokens there is no limit: leave it out."
            )
        if self.context < 0 or (self.context and not self.context % 2):
            raise OptionError(
                "context", f"{self.context} tokens have no middle one: give an odd number, or 0 for all tokens."
            )
        check_choice("norm", self.norm, NORMS)

    @property
    def longest(self) -> int:
        """``max_length``, or what it is by default."""
        return LONGEST if self.max_length is None else self.max_length

    @property
    def positional(self) -> bool:
        return self.context != 1

    @property
    def changed_by(self) -> str | None:
        return "norm" if self.norm == "batch" else None

    def added_width(self, dim: int) -> int:
        return self.widths(dim).total

    def widths(self, dim: int) -> Widths:
        """Of what a state of width ``dim`` is projected to."""
        return Widths(
            self.heads * self.key_depth, self.intra_depth * self.key_depth, self.intra_depth * (dim // self.heads)
        )

    def build(self, dim: int, dropout_policy: str) -> LambdaLayer:
        return LambdaLayer(dim, self)


class Widths(NamedTuple):
    """How many numbers of a token are queries, keys and values."""

    queries: int
    keys: int
    values: int

    @property
    def total(self) -> int:
        return sum(self)


#: A norm of ``(batch, time, channels)`` in one solve.
Norm = Callable[[Tensor], Tensor]


class BatchNorm(nn.BatchNorm1d):
    """torch's over the real tokens of a batch: padding is in neither its statistics nor its running ones."""

    def prepare(self, layout: Layout) -> Norm:
        mean, variance, count, momentum = self.running_mean, self.running_var, self.num_batches_tracked, self.momentum
        assert mean is not None and variance is not None and count is not None and momentum is not None
        if not self.training:
            return lambda x: self._normed(x, mean, variance).to(x.dtype)
        first = True

        def norm(x: Tensor) -> Tensor:
            nonlocal first
            x, narrow = x.to(torch.promote_types(x.dtype, torch.float32)), x.dtype  # squares overflow half precision
            tokens = layout.keep(torch.ones_like(x[..., 0])).sum().clamp(min=1)
            own_mean = layout.keep(x).sum((0, 1)) / tokens
            own_variance = layout.keep((x - own_mean).square()).sum((0, 1)) / tokens
            if first:  # of a backward pass that computes it again, the running statistics hear nothing
                first = False
                with torch.no_grad():
                    count.add_(1)
                    mean.lerp_(own_mean.to(mean.dtype), momentum)
                    unbiased = own_variance * tokens / (tokens - 1).clamp(min=1)
                    variance.lerp_(unbiased.to(variance.dtype), momentum)
            return self._normed(x, own_mean, own_variance).to(narrow)

        return norm

    def _normed(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (x - mean) * (self.weight * torch.rsqrt(variance + self.eps)) + self.bias


class LayerNorm(nn.LayerNorm):
    """torch's, which knows nothing of other tokens."""

    def prepare(self, layout: Layout) -> Norm:
        return self.forward


class NoNorm(nn.Identity):
    """None."""

    def prepare(self, layout: Layout) -> Norm:
        return self.forward


#: Norms of queries and values by name, each over all numbers that a token has of them.
NORMS: dict[str, Callable[[int], BatchNorm | LayerNorm | NoNorm]] = {
    "layer": LayerNorm,
    "batch": BatchNorm,
    "none": NoNorm,
}


class LambdaLayer(Mixer):
    """Lambda layer over sequences. What is added goes into the projected queries, keys and values.

    Padding is in no softmax and in no sum. Where the layout is causal a token's lambdas are those of the tokens up to
    it: the softmax is one of running sums.

    Args:
        dim: width of the state.
        config: see there.

    Raises:
        ValueError: the heads do not divide ``dim``.
    """

    def __init__(self, dim: int, config: LambdaConfig):
        super().__init__()
        if dim % config.heads:
            raise ValueError(f"the number of lambda queries must divide the width: {config.heads} queries, width {dim}")
        self.config = config
        self.widths = config.widths(dim)
        self.qkv = nn.Linear(dim, self.widths.total, bias=False)
        self.query_norm, self.value_norm = (
            NORMS[config.norm](channels) for channels in (self.widths.queries, self.widths.values)
        )
        distances = config.context or 2 * config.longest - 1
        # By distance from the last token before that is read to the last one behind. With values of variance 1 a
        # position lambda has at most the variance that a query of as many numbers turns into an output of variance 1.
        self.positions = nn.Parameter(torch.empty(config.key_depth, config.intra_depth, distances))
        read = config.context or config.longest
        nn.init.normal_(self.positions, std=1 / math.sqrt(config.key_depth * config.intra_depth * read))
        self.out = nn.Linear(dim, dim)

    def inner_projections(self) -> Iterator[nn.Linear]:
        yield self.qkv

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.out

    def operations(self, time: int) -> int:
        config, values = self.config, self.widths.values
        # Each key with its value, twice: for the content and, of each token in reach, for the positions.
        lambdas = config.key_depth * values * (1 + (config.context or time))
        applied = config.key_depth * self.out.in_features
        return super().operations(time) + 2 * (lambdas + applied)

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Mix:
        """See :meth:`Mixer.prepare`.

        Raises:
            OptionError: with a table of all distances, more tokens than it has.
        """
        config, time = self.config, x.shape[1]
        if not config.context and time > config.longest:
            raise OptionError(
                "--lambda-max-length",
                f"an input of {time} tokens is longer than the {config.longest} whose distances the position "
                "lambdas have: shorten it, or train with a larger number or a --lambda-context.",
            )
        wanted = _wanted.get()
        norm_queries, norm_values = self.query_norm.prepare(layout), self.value_norm.prepare(layout)

        def mix(z: Tensor, added: Tensor | None = None) -> Tensor:
            projected = self.qkv(z)
            if added is not None:
                projected = projected + added
            q, k, v = projected.split(self.widths, dim=-1)
            q = norm_queries(q).unflatten(-1, (config.heads, config.key_depth))
            k = k.unflatten(-1, (config.intra_depth, config.key_depth))
            v = layout.keep(norm_values(v)).unflatten(-1, (config.intra_depth, -1))
            if wanted is not None:
                wanted.append(_content(k, v, layout))
            content = _running_content(k, v, layout) if layout.causal else _content(k, v, layout).unsqueeze(1)
            return self.out((q @ (content + self._position(v, layout.causal))).flatten(2))

        return mix

    def _position(self, v: Tensor, causal: bool) -> Tensor:
        """Position lambdas ``(batch, time, key, value)`` of values ``(batch, time, intra, value)``."""
        time = v.shape[1]
        reach = self.positions.shape[2] // 2
        if not self.config.context:
            places = torch.arange(time, device=v.device)
            table = self.positions[..., places - places[:, None] + reach]  # (key, intra, n, m)
            if causal:
                table = table.tril()
            table = table.permute(2, 0, 3, 1).flatten(2).flatten(0, 1)  # (n key, m intra)
            return (table @ v.flatten(1, 2)).unflatten(1, (time, -1))
        kernel = self.positions[..., : reach + 1] if causal else self.positions
        # On CPUs three times as fast as a convolution of each value's (intra, time).
        images = v.transpose(1, 2).contiguous(memory_format=torch.channels_last)  # (batch, intra, time, value)
        found = functional.conv2d(images, kernel.unsqueeze(-1), padding=(reach, 0))
        return found[:, :, :time].transpose(1, 2)


def _content(k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The content lambda ``(batch, key, value)`` of whole sequences.

    Args:
        k: logits of the keys, ``(batch, time, intra, key)``.
        v: values ``(batch, time, intra, value)``, 0 at padding.
        layout: of the batch.
    """
    if layout.real is not None:
        # Not minus infinity: a sequence of nothing but padding would turn into NaN, and into NaN gradients.
        k = k.masked_fill(~layout.real[:, :, None, None], torch.finfo(k.dtype).min)
    return k.softmax(1).flatten(1, 2).transpose(1, 2) @ v.flatten(1, 2)


def _running_content(k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The content lambdas ``(batch, time, key, value)`` of each token and those before it; see :func:`_content`.

    In float64, and each beside the largest exponential among its own tokens: that of the whole sequence would be one of
    tokens to come, and could leave nothing of those before.
    """
    largest = k.double()
    if layout.real is not None:
        largest = largest.masked_fill(~layout.real[:, :, None, None], torch.finfo(largest.dtype).min)
    weighed = torch.cat([v.double(), torch.ones_like(v[..., :1], dtype=largest.dtype)], -1).unsqueeze(-2)
    _, sums = _running(largest, weighed.expand(*largest.shape, -1))
    return (sums[..., :-1] / sums[..., -1:]).sum(2).to(v.dtype)


def _running(largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of stretches along the second axis, each with its largest exponent and its sums over that exponential: those of
    each stretch and all before it. Pairs are joined and their running sums taken, so that the cost is linear."""
    if sums.shape[1] == 1:
        return largest, sums
    even = sums.shape[1] // 2 * 2
    pairs = _running(*_joined(largest[:, :even:2], sums[:, :even:2], largest[:, 1::2], sums[:, 1::2]))
    # What a pair ends with is known; what it begins with has the pairs before it and itself.
    firsts = largest[:, 2::2]
    before, sums_before = (each[:, : firsts.shape[1]] for each in pairs)
    begun = _joined(before, sums_before, firsts, sums[:, 2::2])
    found = []
    for own, ended, others in zip((largest, sums), pairs, begun, strict=True):
        whole = own.new_empty(own.shape)
        places = torch.arange(own.shape[1], device=own.device)
        whole = whole.index_copy(1, places[1::2], ended).index_copy(1, places[2::2], others)
        found.append(whole.index_copy(1, places[:1], own[:, :1]))
    return found[0], found[1]


def _joined(before: Tensor, sums_before: Tensor, after: Tensor, sums_after: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(before, after).detach()  # it cancels, and so has no gradient
    shares = ((each - largest).exp().unsqueeze(-1) for each in (before, after))
    return largest, sums_before * next(shares) + sums_after * next(shares)
