"""The encoder: embeddings, a depth, and a masked-LM head on its state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fairseq_implicit.depth.output import Depth
from fairseq_implicit.networks.embeddings import EmbeddingConfig, Embeddings
from fairseq_implicit.networks.heads import MaskedLMHead, MaskedLMHeadConfig
from fairseq_implicit.networks.output import ModelOutput


@dataclass(frozen=True)
class EncoderConfig:
    """What lies around the depth.

    Attributes:
        embeddings: what the depth starts from.
        head: that of the masked-LM loss; ``None``: the network gives features only.
    """

    embeddings: EmbeddingConfig
    head: MaskedLMHeadConfig | None = field(default_factory=MaskedLMHeadConfig)


class Encoder(Embeddings):
    """Embeddings, depth and head. With Euler steps on post-norm layers it is BERT and RoBERTa.

    Args:
        config: see there.
        depth: what lies between embeddings and head; it ends in its own norm.
    """

    def __init__(self, config: EncoderConfig, depth: Depth):
        super().__init__(config.embeddings)
        self.depth = depth
        first, *others = depth.layers()
        for layer in others:
            layer.share(first)
        self.lm_head = (
            None if config.head is None else MaskedLMHead(self.embed_tokens, config.head, config.embeddings.dim)
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        features_only: bool = False,
        masked_tokens: Tensor | None = None,
        predicted: Tensor | None = None,
        return_hidden_states: bool = False,
        return_lambdas: bool = False,
        has_padding: bool | None = None,
        token_embeddings: Tensor | None = None,
        attended: Tensor | None = None,
    ) -> ModelOutput:
        """Run the network. Inputs that it does not know are refused.

        Args:
            tokens: ``(batch, time)`` ids.
            segments: ``(batch, time)`` int64, BERT's token types; by default all tokens belong to the first.
            features_only: return features ``(batch, time, dim)`` instead of logits.
            masked_tokens: ``(batch, time)`` bool; the head runs only there, and logits are ``(masked, vocabulary)``.
            predicted: ``(masked,)`` int64, the places of ``masked_tokens`` among all tokens, row by row, where the
                caller knows them: no GPU is asked.
            return_hidden_states: also return the states along the depth.
            return_lambdas: also return the content lambdas along it.
            has_padding: whether ``tokens`` holds padding, where the caller knows.
            token_embeddings: ``(batch, time, width)`` in place of those of ``tokens``, whose padding still counts.
            attended: ``(batch, time)`` bool, False at tokens that are padding whatever their id.

        Raises:
            ValueError: more tokens than positions, logits of a network without a head, or lambdas of other mixers.
            TypeError: segments for a network that takes none.
        """
        layout = self.layout(tokens, segments, has_padding, attended)
        embedded = self.embed(tokens, layout, token_embeddings)
        # A depth that has none to return need not know of them.
        wanted = {"return_lambdas": True} if return_lambdas else {}
        depth = self.depth(embedded, layout, return_hidden_states, **wanted)
        if return_lambdas and not depth.lambdas:
            raise ValueError(
                "return_lambdas: what mixes the tokens here has no content lambdas, as --mixer lambda has: leave it out"
            )
        output = ModelOutput(
            depth.state,
            depth.hidden_states,
            depth.statistics,
            depth.penalties,
            depth.auxiliary_states,
            (depth.operations + 3 * self.operations()) * tokens.numel(),
            depth.lambdas,
        )
        if features_only:
            return output
        if predicted is None and masked_tokens is not None:
            predicted = masked_tokens.flatten().nonzero().squeeze(1)
        output = output.read_by(lambda features: self.logits(features, predicted))
        assert self.lm_head is not None, "logits() refuses a network without"
        read = tokens.numel() if predicted is None else predicted.numel()
        head = 3 * self.lm_head.operations() * read * (1 + len(output.auxiliary))
        return replace(output, operations=output.operations + head)

    def shared_weights(self) -> dict[str, str]:
        """The second and further names of weights that layers have in common, each with the first one."""
        first: dict[int, str] = {}
        named = self.depth.named_parameters(prefix="depth", remove_duplicate=False)
        names = [(name, first.setdefault(id(parameter), name)) for name, parameter in named]
        return {name: original for name, original in names if name != original}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. The depth may keep a float32 state around half-precision ones, and quantised matrices have
        no dtype to ask for."""
        return self.embed_tokens.weight.dtype

    def logits(self, features: Tensor, selected: Tensor | None = None) -> Tensor:
        """Logits of ``features`` ``(batch, time, dim)``, or of its rows ``selected`` (flat indices) only.

        Raises:
            ValueError: the network has no head.
        """
        if self.lm_head is None:
            raise ValueError("this network has no masked-LM head: ask it for features_only")
        if selected is not None:
            features = features.flatten(0, 1).index_select(0, selected)
        return self.lm_head(features.to(self.dtype))
