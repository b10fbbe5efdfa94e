"""The transformer encoder layer as a vector field: its increment ``F(y) = Layer(y) - y``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fairseq_implicit.fields.feed_forward import FeedForward
from fairseq_implicit.fields.field import Field, Increment
from fairseq_implicit.fields.mixers.mixer import MixerConfig
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.residual import RESIDUALS, Residual
from fairseq_implicit.fields.shared_dropout import DropPath, SharedDropout
from fairseq_implicit.fields.sub_layer import SubLayer
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError
from fairseq_implicit.solvers.vector_field import Time

KINDS = tuple(RESIDUALS)


@dataclass(frozen=True)
class TransformerFieldConfig:
    """Shape and noise of one transformer field.

    Attributes:
        dim: width of the state.
        ffn_dim: inner width of the feed-forward network; Macaron's two halves have ``ffn_dim // 2`` each, so that the
            number of parameters is that of the other kinds.
        mixer: what mixes the tokens, with its options.
        kind: one of :data:`fairseq_implicit.fields.residual.RESIDUALS`.
        activation: see :data:`fairseq_implicit.fields.feed_forward.ACTIVATIONS`.
        gated: gated feed-forward networks; half of the numbers that their first map gives then act on the others.
        biases: of the feed-forward networks' maps; the mixer has options of its own.
        norm: the layer norms.
        first_norm: a norm before the first layer's mixer. Where that reads what already is normed, a pre-norm field can
            do without.
        dropout, activation_dropout, drop_path: rates in [0, 1).
        feed_forward_dropout: rate after the feed-forward networks; ``None``: ``dropout``, as after the mixer.
        dropout_policy: ``shared`` or ``independent`` noise over the evaluations of one solve.
    """

    dim: int
    ffn_dim: int
    mixer: MixerConfig
    kind: str = "pre-norm"
    activation: str = "gelu"
    norm: NormConfig = field(default_factory=NormConfig)
    dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    dropout_policy: str = "shared"
    gated: bool = False
    biases: bool = True
    first_norm: bool = True
    feed_forward_dropout: float | None = None

    def __post_init__(self):
        if self.kind not in RESIDUALS:
            raise ValueError(f"unknown field {self.kind!r}: choose one of {', '.join(RESIDUALS)}")
        if not self.first_norm and self.kind != "pre-norm":
            raise OptionError(
                "first_norm", f"a {self.kind} field needs it; only a pre-norm one can do without: leave the flag out."
            )

    @property
    def residual(self) -> type[Residual]:
        """The layer's formula."""
        return RESIDUALS[self.kind]

    def at(self, layer: int) -> TransformerFieldConfig:
        """That of layer ``layer``, counted from 0, where layers differ."""
        return replace(self, mixer=self.mixer.at(layer), first_norm=self.first_norm or layer > 0)

    @property
    def branch_dropouts(self) -> tuple[float, float]:
        """After the mixer and after a feed-forward network."""
        return self.dropout, self.dropout if self.feed_forward_dropout is None else self.feed_forward_dropout

    @property
    def is_noisy(self) -> bool:
        """Whether anything is drawn in training."""
        return max(*self.branch_dropouts, self.mixer.noise, self.activation_dropout, self.drop_path) > 0


class TransformerField(Field):
    """One encoder layer's increment, by one of the formulas of :mod:`fairseq_implicit.fields.residual`.

    The field is autonomous: ``t`` is ignored. Whatever mixes the tokens is called attention in the weights' names.
    """

    def __init__(self, config: TransformerFieldConfig):
        super().__init__()
        self.config = config
        residual = config.residual

        def feed_forward() -> FeedForward:
            return FeedForward(
                config.dim,
                config.ffn_dim // residual.feed_count,
                config.activation,
                config.activation_dropout,
                config.dropout_policy,
                config.gated,
                config.biases,
            )

        self.attention = config.mixer.build(config.dim, config.dropout_policy)
        self.feed_forward = feed_forward()
        self.attention_norm = config.norm.build(config.dim) if config.first_norm else nn.Identity()
        self.feed_forward_norm = config.norm.build(config.dim) if residual.norm_count > 1 else None
        self.first_feed_forward = feed_forward() if residual.feed_count > 1 else None
        self.first_feed_forward_norm = config.norm.build(config.dim) if residual.norm_count > 2 else None
        self.dropout, self.feed_forward_dropout = (
            SharedDropout(rate, config.dropout_policy) for rate in config.branch_dropouts
        )
        self.drop_path = DropPath(config.drop_path, config.dropout_policy)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """In the order in which a state meets them."""
        norms = (self.first_feed_forward_norm, self.attention_norm, self.feed_forward_norm)
        return tuple(norm for norm in norms if norm is not None)

    def sub_layers(self) -> Iterator[SubLayer]:
        """Mixer and feed-forward networks."""
        sub_layers = (self.attention, self.feed_forward, self.first_feed_forward)
        return (sub_layer for sub_layer in sub_layers if sub_layer is not None)

    def share(self, first: Field) -> None:
        assert isinstance(first, TransformerField), "layers of one depth are of one class"
        self.attention.share(first.attention)

    def operations(self, time: int) -> int:
        return sum(sub_layer.operations(time) for sub_layer in self.sub_layers())

    def residual_projections(self) -> Iterator[nn.Linear]:
        for sub_layer in self.sub_layers():
            yield from sub_layer.residual_projections()

    def residual(self, x: Tensor, layout: Layout = UNPADDED) -> Residual:
        """The layer with one solve's noise, which drop path is not part of.

        Args:
            x: what the depth starts from, ``(batch, time, dim)``.
            layout: of the batch.
        """

        def dropped(branch, site):
            drop = site.prepare(x)
            return lambda y, *added, onto=None: drop(branch(y, *added), onto)

        mix = dropped(self.attention.prepare(x, layout), self.dropout)
        feed = dropped(self.feed_forward.prepare(x), self.feed_forward_dropout)
        first = self.first_feed_forward
        feeds = (feed,) if first is None else (dropped(first.prepare(x), self.feed_forward_dropout), feed)
        return self.config.residual(mix, feeds, self.norms)

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> Increment:
        residual, drop_path = self.residual(x, layout), self.drop_path.prepare(x)

        def f(t: Time, z: Tensor) -> Tensor:
            return layout.keep(drop_path(residual.increment(z)))

        def layer(t: Time, z: Tensor) -> Tensor:
            return layout.keep(residual.layer(z), otherwise=z)

        # Dropping the increment of a sample has no layer map: then Euler goes through the increment as well.
        whole = residual.ends_in_norm and not (self.training and self.drop_path.rate > 0.0)
        return Increment(f, layer if whole else None)
