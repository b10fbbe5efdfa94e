"""The transformer encoder layer as a vector field.

The field is the increment ``F(y) = Layer(y) - y``, computed directly as the sum of the sub-layers' outputs: forming
``Layer(y)`` first and subtracting loses the increment to rounding (11 % error in bfloat16), and integrating
``Layer(y)`` itself adds a spurious exponential mode.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fairseq_implicit.fields.attention import MultiHeadAttention
from fairseq_implicit.fields.feed_forward import FeedForward
from fairseq_implicit.fields.field import Field
from fairseq_implicit.fields.shared_dropout import DropPath, SharedDropout
from fairseq_implicit.layout import UNPADDED, Layout

KINDS = ("pre-norm", "post-norm", "parallel", "macaron")

Time = float | Tensor


@dataclass(frozen=True)
class TransformerFieldConfig:
    """Shape and noise of one transformer field.

    Attributes:
        dim: width of the state.
        ffn_dim: inner width of the feed-forward network; Macaron's two halves have ``ffn_dim // 2`` each, so that the
            number of parameters is that of the other kinds.
        heads: attention heads.
        kind: one of ``KINDS``.
        activation: see :data:`fairseq_implicit.fields.feed_forward.ACTIVATIONS`.
        dropout, attention_dropout, activation_dropout, drop_path: rates in [0, 1).
        dropout_policy: ``shared`` or ``independent`` noise over the evaluations of one solve.
    """

    dim: int
    ffn_dim: int
    heads: int
    kind: str = "pre-norm"
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    dropout_policy: str = "shared"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown field {self.kind!r}: choose one of {', '.join(KINDS)}")


class PreparedTransformer:
    """One solve's increment ``f(t, z)``, and ``layer(t, z)``, the whole layer ``z + f(t, z)``.

    ``layer`` is exact where the increment is not formed directly: a post-norm layer ends in a LayerNorm, and Euler on
    it must be the published layer to the last bit.
    """

    def __init__(
        self,
        increment: Callable[[Tensor], Tensor],
        layer: Callable[[Tensor], Tensor] | None,
        drop_path: Callable[[Tensor], Tensor],
        layout: Layout,
    ):
        self._increment = increment
        self._layer = layer
        self._drop_path = drop_path
        self._layout = layout

    def __call__(self, t: Time, z: Tensor) -> Tensor:
        return self._layout.keep(self._drop_path(self._increment(z)))

    @property
    def layer(self) -> Callable[[Time, Tensor], Tensor] | None:
        """The layer map ``(t, z) -> z'`` where it must not be formed as ``z + f(t, z)``, else ``None``."""
        return None if self._layer is None else self._map

    def _map(self, t: Time, z: Tensor) -> Tensor:
        return self._layout.keep(self._layer(z), otherwise=z)


class TransformerField(Field):
    """One encoder layer's increment.

    ============  ==========================================================================================
    pre-norm      ``A + Drop(FFN(LN2(y + A)))``, ``A = Drop(Attn(LN1 y))`` (GPT-2, ODE Transformer)
    post-norm     ``LN2(u + Drop(FFN u)) - y``, ``u = LN1(y + Drop(Attn y))`` (BERT, RoBERTa)
    parallel      ``Drop(Attn(LN1 y)) + Drop(FFN(LN1 y))`` (GPT-J)
    macaron       ``½FFN1, Attn, ½FFN2`` in sequence, each on its own LayerNorm (arXiv 1906.02762)
    ============  ==========================================================================================

    The field is autonomous: ``t`` is ignored.
    """

    def __init__(self, config: TransformerFieldConfig):
        super().__init__()
        self.config = config
        macaron = config.kind == "macaron"
        ffn_dim = config.ffn_dim // 2 if macaron else config.ffn_dim

        def feed_forward() -> FeedForward:
            return FeedForward(config.dim, ffn_dim, config.activation, config.activation_dropout, config.dropout_policy)

        self.attention = MultiHeadAttention(config.dim, config.heads, config.attention_dropout, config.dropout_policy)
        self.feed_forward = feed_forward()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.feed_forward_norm = None if config.kind == "parallel" else nn.LayerNorm(config.dim)
        self.first_feed_forward = feed_forward() if macaron else None
        self.first_feed_forward_norm = nn.LayerNorm(config.dim) if macaron else None
        self.dropout = SharedDropout(config.dropout, config.dropout_policy)
        self.drop_path = DropPath(config.drop_path, config.dropout_policy)

    def residual_projections(self) -> Iterator[nn.Linear]:
        yield self.attention.out
        yield self.feed_forward.fc2
        if self.first_feed_forward is not None:
            yield self.first_feed_forward.fc2

    def prepare(self, x: Tensor, layout: Layout = UNPADDED) -> PreparedTransformer:
        attend = self.attention.prepare(x, layout)
        drop_attention = self.dropout.prepare(x)

        def attention(y: Tensor) -> Tensor:
            return drop_attention(attend(y))

        feed = self.feed_forward.prepare(x)
        drop_feed = self.dropout.prepare(x)

        def feed_forward(y: Tensor) -> Tensor:
            return drop_feed(feed(y))

        layer_map = None
        if self.config.kind == "pre-norm":

            def increment(y: Tensor) -> Tensor:
                first = attention(self.attention_norm(y))
                return first + feed_forward(self.feed_forward_norm(y + first))

        elif self.config.kind == "post-norm":

            def layer(y: Tensor) -> Tensor:
                u = self.attention_norm(y + attention(y))
                return self.feed_forward_norm(u + feed_forward(u))

            def increment(y: Tensor) -> Tensor:
                return layer(y) - y

            # Dropping the increment of a sample has no layer map: then Euler goes through the increment as well.
            if not (self.training and self.drop_path.rate > 0.0):
                layer_map = layer

        elif self.config.kind == "parallel":

            def increment(y: Tensor) -> Tensor:
                normed = self.attention_norm(y)
                return attention(normed) + feed_forward(normed)

        else:
            first_feed = self.first_feed_forward.prepare(x)
            drop_first = self.dropout.prepare(x)

            def increment(y: Tensor) -> Tensor:
                first = drop_first(first_feed(self.first_feed_forward_norm(y))) * 0.5
                second = attention(self.attention_norm(y + first))
                total = first + second
                return total + feed_forward(self.feed_forward_norm(y + total)) * 0.5

        return PreparedTransformer(increment, layer_map, self.drop_path.prepare(x), layout)
