"""From token ids to the state in which a depth starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.shared_dropout import SharedDropout
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.options import OptionError


@dataclass(frozen=True)
class EmbeddingConfig:
    """What is summed for each token.

    Attributes:
        symbols: size of the vocabulary.
        dim: width of the state.
        positions: longest input in tokens.
        padding: id of the padding symbol. As RoBERTa has it, the first position is row ``padding + 1`` of its table,
            and the rows before it are nobody's.
        learned_positions: each position has an embedding; without, the mixers tell positions apart or nobody does.
        segments: kinds of segments, BERT's token types; 0: the network takes none.
        width: of the embeddings themselves, whose normalised sum a linear map brings to ``dim`` (ALBERT, arXiv
            1909.11942 §3.1); ``None``: they are as wide as the state, and there is no map.
        map_bias: that map has a bias.
        norm: of the sum; ``None``: none.
        dropout: rate after it, in [0, 1).

    Raises:
        OptionError: a size that is none.
    """

    symbols: int
    dim: int
    positions: int
    padding: int
    learned_positions: bool = True
    segments: int = 0
    width: int | None = None
    map_bias: bool = True
    norm: NormConfig | None = field(default_factory=NormConfig)
    dropout: float = 0.0

    def __post_init__(self):
        for name, least in (("symbols", 1), ("dim", 1), ("positions", 1), ("padding", 0), ("segments", 0)):
            if (value := getattr(self, name)) < least:
                raise OptionError(name, f"it must be at least {least}, not {value}.")
        if self.width is not None and self.width < 1:
            raise OptionError("width", f"it must be at least 1, not {self.width}.")

    @property
    def own_width(self) -> int:
        """Of the embeddings themselves."""
        return self.dim if self.width is None else self.width


class Embeddings(nn.Module):
    """Tokens, positions and segments, and the map of their sum to the state's width, where it is another."""

    def __init__(self, config: EmbeddingConfig):
        super().__init__()
        self.embeddings = config
        width = config.own_width
        self.embed_tokens = nn.Embedding(config.symbols, width, config.padding)
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.padding + 1 + config.positions, width, config.padding)
            # A start of fairseq's, which every network replaces: seeded runs have always drawn it.
            nn.init.normal_(self.embed_positions.weight, std=width**-0.5)
        self.embed_segments = nn.Embedding(config.segments, width) if config.segments else None
        self.layernorm_embedding = None if config.norm is None else config.norm.build(width)
        self.embedding_map = None if config.width is None else nn.Linear(width, config.dim, config.map_bias)
        self.dropout = SharedDropout(config.dropout)

    def layout(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        has_padding: bool | None = None,
        attended: Tensor | None = None,
    ) -> Layout:
        """That of a batch.

        Args:
            tokens: ``(batch, time)`` ids.
            segments: ``(batch, time)`` int64, the part of its sample that each token belongs to.
            has_padding: whether ``tokens`` holds padding, where the caller knows: no GPU is asked.
            attended: ``(batch, time)`` bool, False at tokens that are padding whatever their id.
        """
        real = None if has_padding is False else tokens.ne(self.embeddings.padding)
        if attended is not None:
            real = attended if real is None else real & attended
        if has_padding is None and real is not None and real.device.type == "cpu" and real.all():
            real = None
        return UNPADDED if real is None and segments is None else Layout(real, segments=segments)

    def embed(self, tokens: Tensor, layout: Layout, token_embeddings: Tensor | None = None) -> Tensor:
        """The sum of all embeddings, normalised and dropped, zero at padding: ``(batch, time, dim)``.

        Args:
            tokens: ``(batch, time)`` ids.
            layout: of the batch. Where it has no segments, all tokens belong to the first.
            token_embeddings: ``(batch, time, width)`` in place of those of ``tokens``.

        Raises:
            ValueError: more tokens than positions.
            TypeError: segments for a network that takes none.
        """
        config = self.embeddings
        if tokens.shape[1] > config.positions:
            raise ValueError(
                f"an input of {tokens.shape[1]} tokens is longer than the model's {config.positions} positions: "
                "shorten it, or train a model with more positions"
            )
        x = self.embed_tokens(tokens) if token_embeddings is None else token_embeddings
        if self.embed_positions is not None:
            places = layout.positions_of(tokens) + config.padding + 1
            x = x + functional.embedding(places, self.embed_positions.weight, config.padding)
        if self.embed_segments is not None:
            x = x + (self.embed_segments.weight[0] if layout.segments is None else self.embed_segments(layout.segments))
        elif layout.segments is not None:
            raise TypeError(
                "the batch has segments, and this network has no embeddings of them: leave them out, or build it with "
                "as many segment types as they have"
            )
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = self.dropout.prepare(x)(x)
        return layout.keep(x if self.embedding_map is None else self.embedding_map(x))

    def operations(self) -> int:
        """Floating-point operations per token: those of the map to the state's width."""
        return 0 if self.embedding_map is None else 2 * self.embedding_map.weight.numel()
