"""What reads an encoder's state: the masked-LM head of BERT and RoBERTa, and heads on the first token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.fields.feed_forward import ACTIVATIONS
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.options import check_choice


@dataclass(frozen=True)
class MaskedLMHeadConfig:
    """Options of :class:`MaskedLMHead`.

    Attributes:
        activation: a name of :data:`fairseq_implicit.fields.feed_forward.ACTIVATIONS`.
        norm: the layer norm before the output matrix.
        tied: the output matrix is that of the token embeddings.
        bias: of the dense map; that of the output is always there.

    Raises:
        OptionError: an unknown activation.
    """

    activation: str = "gelu"
    norm: NormConfig = field(default_factory=NormConfig)
    tied: bool = True
    bias: bool = True

    def __post_init__(self):
        check_choice("activation", self.activation, tuple(ACTIVATIONS))


class MaskedLMHead(nn.Module):
    """``W LN(activation(dense x)) + b``: ``(..., dim) -> (..., vocabulary)``.

    Args:
        embedding: that of the tokens, for its shape and, where they are tied, its matrix.
        config: see there.
        dim: width of the state; ``None``: that of the embedding, to which ``dense`` brings it otherwise.
    """

    def __init__(self, embedding: nn.Embedding, config: MaskedLMHeadConfig, dim: int | None = None):
        super().__init__()
        symbols, width = embedding.weight.shape
        self.activation = config.activation
        self.dense = nn.Linear(dim or width, width, bias=config.bias)
        self.layer_norm = config.norm.build(width)
        self.weight = embedding.weight if config.tied else nn.Linear(width, symbols, bias=False).weight
        self.bias = nn.Parameter(torch.zeros(symbols))

    def operations(self) -> int:
        """Floating-point operations per token: those of the matrix products."""
        return 2 * (self.dense.in_features * self.dense.out_features + self.weight.numel())

    def forward(self, features: Tensor) -> Tensor:
        x = self.layer_norm(ACTIVATIONS[self.activation](self.dense(features)))
        # In place: the logits are the largest tensor of a step. Not in the product, which rounds otherwise.
        return functional.linear(x, self.weight).add_(self.bias)


class Pooler(nn.Module):
    """``activation(dense x)`` of the first token: ``(batch, time, dim) -> (batch, inner_dim)``. BERT's ends in tanh.

    Raises:
        OptionError: an unknown activation.
    """

    def __init__(self, dim: int, inner_dim: int | None = None, activation: str = "tanh"):
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.dense = nn.Linear(dim, inner_dim or dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.pooled(features[:, 0])

    def pooled(self, first: Tensor) -> Tensor:
        """Of the first token's features ``(batch, dim)``."""
        return ACTIVATIONS[self.activation](self.dense(first))


@dataclass(frozen=True)
class ClassificationHeadConfig:
    """Options of :class:`ClassificationHead`.

    Attributes:
        classes: number of outputs.
        inner_dim: width of what is pooled; ``None``: that of the state.
        activation: of the pooler.
        dropout: rate before and after the pooler, in [0, 1).
        spectral_norm: of the last matrix (arXiv 1802.05957).
    """

    classes: int
    inner_dim: int | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    spectral_norm: bool = False


class ClassificationHead(Pooler):
    """RoBERTa's head of whole inputs: ``(batch, time, dim) -> (batch, classes)``."""

    def __init__(self, dim: int, config: ClassificationHeadConfig):
        super().__init__(dim, config.inner_dim, config.activation)
        self.dropout = nn.Dropout(config.dropout)
        self.out_proj = nn.Linear(self.dense.out_features, config.classes)
        if config.spectral_norm:
            self.out_proj = nn.utils.spectral_norm(self.out_proj)

    def forward(self, features: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.pooled(self.dropout(features[:, 0]))))
