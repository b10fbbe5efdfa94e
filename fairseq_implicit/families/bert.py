"""What every family is configured by: RoBERTa's flags where the meaning is RoBERTa's, and BERT's sizes."""

import math
from dataclasses import dataclass, field
from typing import Optional

from fairseq_implicit.depth.output import Depth
from fairseq_implicit.families.flags import Flags
from fairseq_implicit.families.mixer_flags import flag_of, mixer_config, options_of, with_mixer_options
from fairseq_implicit.fields.feed_forward import ACTIVATIONS
from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.fields.mixers.mixer import MixerConfig
from fairseq_implicit.fields.norms import NormConfig
from fairseq_implicit.fields.shared_dropout import POLICIES
from fairseq_implicit.fields.transformer import TransformerFieldConfig
from fairseq_implicit.networks.embeddings import EmbeddingConfig
from fairseq_implicit.networks.encoder import EncoderConfig
from fairseq_implicit.networks.heads import MaskedLMHeadConfig
from fairseq_implicit.networks.initialisation import INITIALISATIONS, POSITION_STARTS, InitialisationConfig
from fairseq_implicit.options import OptionError, check_choice

POSITIONS = ("auto", "learned", "none")

#: BERT's published sizes (arXiv 1810.04805; tiny and small: arXiv 1908.08962).
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(encoder_layers=2, encoder_embed_dim=128, encoder_ffn_embed_dim=512, encoder_attention_heads=2),
    "small": dict(encoder_layers=4, encoder_embed_dim=512, encoder_ffn_embed_dim=2048, encoder_attention_heads=8),
    "base": dict(encoder_layers=12, encoder_embed_dim=768, encoder_ffn_embed_dim=3072, encoder_attention_heads=12),
    "large": dict(encoder_layers=24, encoder_embed_dim=1024, encoder_ffn_embed_dim=4096, encoder_attention_heads=16),
}


@dataclass
@with_mixer_options
class BertOptions:
    """Embeddings, mixers, noise and heads. Choices are plain strings, checked by :meth:`check`: a model pickles."""

    encoder_layers: int = field(default=12, metadata={"help": "number of encoder blocks"})
    encoder_embed_dim: int = field(default=768, metadata={"help": "width of the state"})
    encoder_embedding_dim: Optional[int] = field(
        default=None,
        metadata={
            "help": "width of the embeddings where it is not that of the state: a linear map lies between them, and "
            "the output matrix is as narrow (ALBERT: 128)"
        },
    )
    encoder_ffn_embed_dim: int = field(default=3072, metadata={"help": "inner width of the feed-forward networks"})
    encoder_attention_heads: int = field(default=12, metadata={"help": "attention heads; must divide the width"})
    mixer: str = field(default="attention", metadata={"help": f"what mixes the tokens: {', '.join(MIXERS)}"})
    activation_fn: str = field(default="gelu", metadata={"help": f"activation: {', '.join(ACTIVATIONS)}"})
    gated_feed_forward: bool = field(
        default=False,
        metadata={
            "help": "gated feed-forward networks: with --activation-fn gelu GEGLU, with silu SwiGLU. Of the same inner "
            "width they have half as many weights again"
        },
    )
    no_biases: bool = field(
        default=False,
        metadata={
            "help": "no biases in linear maps and norms, but that of the output and those of classification heads"
        },
    )
    pooler_activation_fn: str = field(default="tanh", metadata={"help": "activation of the classification heads"})
    dropout: float = field(default=0.1, metadata={"help": "dropout of embeddings and sub-layer outputs"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of the attention probabilities"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout after the activation"})
    embedding_dropout: Optional[float] = field(
        default=None, metadata={"help": "dropout of the embeddings (default: --dropout)"}
    )
    feed_forward_dropout: Optional[float] = field(
        default=None, metadata={"help": "dropout of the feed-forward networks' outputs (default: --dropout)"}
    )
    pooler_dropout: float = field(default=0.0, metadata={"help": "dropout in the classification heads"})
    stage_dropout: str = field(
        default="shared",
        metadata={
            "help": "shared: one dropout mask per block and forward pass for all evaluations; independent: a new one "
            "at each evaluation, as in the original publications"
        },
    )
    drop_path: float = field(
        default=0.0, metadata={"help": "stochastic depth: rate at which a sample's increment is dropped"}
    )
    max_positions: Optional[int] = field(
        default=None, metadata={"help": "longest input in tokens (default: what the task asks for)"}
    )
    segment_types: int = field(
        default=0,
        metadata={"help": "kinds of segments (BERT's token types) that a task's batches tell apart; 0: they have none"},
    )
    layernorm_eps: float = field(
        default=1e-5, metadata={"help": "added to the variance in every LayerNorm: 1e-5 as in RoBERTa, 1e-12 in BERT"}
    )
    no_layernorm_embedding: bool = field(default=False, metadata={"help": "no LayerNorm after the embeddings"})
    no_first_norm: bool = field(
        default=False,
        metadata={
            "help": "no LayerNorm before the attention of the first layer, which reads the embeddings as their norm "
            "leaves them (pre-norm only)"
        },
    )
    untie_weights_roberta: bool = field(
        default=False, metadata={"help": "an output matrix of its own instead of the token embedding's"}
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={
            "help": "recompute activations in the backward pass: those of each step (--ode-gradient checkpoint-step), "
            "or those of an equilibrium cell (with phantom-K, jfb, bptt-K)"
        },
    )
    spectral_norm_classification_head: bool = field(
        default=False, metadata={"help": "spectral normalisation of the classification heads"}
    )
    encoder_init: str = field(
        default="depth-scaled",
        metadata={
            "help": "plain: N(0, --encoder-init-std) everywhere; depth-scaled: residual projections divided by the "
            "root of their number (in an equilibrium cell, of the cell's own); identity: residual projections 0, so "
            "that every block starts as the identity and an equilibrium cell as its injection"
        },
    )
    encoder_init_std: float = field(
        default=0.02,
        metadata={
            "help": "standard deviation of the initial weights. BERT's 0.02 suits its width 768; narrower models leave "
            "the start sooner with 0.02 * sqrt(768 / width)"
        },
    )

    encoder_positions: str = field(
        default="auto",
        metadata={
            "help": "learned: an embedding of each position, as BERT's; none; auto: learned, unless the mixer tells "
            "positions apart by itself"
        },
    )
    encoder_position_start: str = field(
        default="normal",
        metadata={
            "help": "learned positions start from N(0, --encoder-init-std), as BERT's; sinusoidal: from sines and "
            "cosines of that scale, with which attention finds a token's neighbours much sooner; neighbours: its heads "
            "start by reading them, too"
        },
    )

    @property
    def flags(self) -> Flags:
        """What the options of the depth are called here."""
        return Flags("encoder")

    @property
    def layers_in_series(self) -> int:
        """How many layers a token passes from the embedding to the head, sub-steps and iterations not counted."""
        return self.encoder_layers

    @property
    def distinct_layers(self) -> bool:
        """Whether the depth has several layers, each with weights of its own, so that they may differ in more."""
        return True

    def build_depth(self) -> Depth:
        """The module between embeddings and head, made of what :meth:`check` returns."""
        raise TypeError(f"{type(self).__name__} defines no build_depth(): a family must build its depth there")

    def check(self):
        """Refuse impossible values with one sentence that names the flag. A family returns its depth's configuration.

        Raises:
            ValueError: naming the flag, the value and what is possible.
        """
        check_choice("--mixer", self.mixer, MIXERS)
        check_choice("--activation-fn", self.activation_fn, tuple(ACTIVATIONS))
        check_choice("--pooler-activation-fn", self.pooler_activation_fn, tuple(ACTIVATIONS))
        check_choice("--stage-dropout", self.stage_dropout, POLICIES)
        check_choice("--encoder-init", self.encoder_init, INITIALISATIONS)
        check_choice("--encoder-position-start", self.encoder_position_start, POSITION_STARTS)
        check_choice("--encoder-positions", self.encoder_positions, POSITIONS)
        for flag, value in (
            ("--encoder-layers", self.encoder_layers),
            ("--encoder-embed-dim", self.encoder_embed_dim),
            ("--encoder-embedding-dim", 1 if self.encoder_embedding_dim is None else self.encoder_embedding_dim),
            ("--encoder-ffn-embed-dim", self.encoder_ffn_embed_dim),
            ("--encoder-attention-heads", self.encoder_attention_heads),
        ):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.segment_types < 0:
            raise ValueError(f"--segment-types must be at least 0, got {self.segment_types}")
        for flag, rate in (
            ("--dropout", self.dropout),
            ("--attention-dropout", self.attention_dropout),
            ("--activation-dropout", self.activation_dropout),
            ("--embedding-dropout", self.embedding_dropout),
            ("--feed-forward-dropout", self.feed_forward_dropout),
            ("--pooler-dropout", self.pooler_dropout),
            ("--drop-path", self.drop_path),
        ):
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ValueError(f"{flag} must lie in [0, 1), got {rate}")
        if not 0.0 < self.encoder_init_std < math.inf:
            raise ValueError(f"--encoder-init-std must be a positive number, got {self.encoder_init_std}")
        if not 0.0 < self.layernorm_eps < math.inf:
            raise ValueError(f"--layernorm-eps must be a positive number, got {self.layernorm_eps}")
        if self.encoder_position_start != "normal" and not self.learned_positions:
            raise ValueError(
                f"--encoder-position-start {self.encoder_position_start} is a start of learned positions, and here are "
                "none: leave it out, or set --encoder-positions learned"
            )
        if self.encoder_position_start == "neighbours" and self.encoder_embedding_dim is not None:
            raise ValueError(
                "--encoder-position-start neighbours lets heads find positions in the state, and behind the map of "
                f"--encoder-embedding-dim {self.encoder_embedding_dim} they are others: take sinusoidal"
            )
        if "heads" in options_of(self.mixer, self) and self.encoder_embed_dim % self.encoder_attention_heads:
            raise ValueError(
                f"--encoder-attention-heads {self.encoder_attention_heads} does not divide "
                f"--encoder-embed-dim {self.encoder_embed_dim}"
            )
        if self.no_biases and "no_biases" not in options_of(self.mixer, self):
            raise ValueError(f"--no-biases: --mixer {self.mixer} cannot do without its own; leave it out")
        if self.no_first_norm and self.no_layernorm_embedding:
            raise ValueError(
                "--no-first-norm with --no-layernorm-embedding: nothing would norm what the first layer's attention "
                "reads; leave one of the two out"
            )
        if not self.distinct_layers:
            self._check_alike()

    def _check_alike(self) -> None:
        """Refuse layers that differ where one serves for several.

        Raises:
            ValueError: naming the flag by which they do.
        """
        option = self.mixer_config().differs_by
        differing = "--no-first-norm" if self.no_first_norm else option and flag_of(self.mixer)(option)
        if differing:
            raise ValueError(
                f"{differing} makes layers differ, and here the weights of one are used at several depths: leave it "
                "out, or take an untied ode_bert"
            )

    def check_repeated(self) -> None:
        """Refuse a mixer that must not be evaluated several times in one solve.

        Raises:
            OptionError: naming the flag that makes it so.
        """
        mixer = self.mixer_config()
        option = mixer.changed_by
        if option is not None:
            raise OptionError(
                flag_of(self.mixer)(option),
                f"{getattr(mixer, option)} makes each evaluation another function of the state, and a solve here has "
                "several: set it otherwise, or take ode_bert with --ode-scheme euler and --ode-steps 1.",
            )

    def recomputed(self, gradient: str) -> str:
        """The ``--ode-gradient`` that ``--checkpoint-activations`` makes of ``gradient``.

        Raises:
            ValueError: the gradient keeps no activations.
        """
        if not self.checkpoint_activations or gradient.startswith("checkpoint-"):
            return gradient
        if gradient != "autograd":
            raise ValueError(
                f"--checkpoint-activations: --ode-gradient {gradient} keeps no activations to recompute: leave it out"
            )
        return "checkpoint-step"

    @property
    def learned_positions(self) -> bool:
        """Whether positions have embeddings."""
        if self.encoder_positions == "auto":
            return not self.mixer_config().positional
        return self.encoder_positions == "learned"

    def norm(self) -> NormConfig:
        """All layer norms of the network."""
        return NormConfig(eps=self.layernorm_eps, bias=not self.no_biases)

    def network(self, symbols: int, padding: int) -> EncoderConfig:
        """What lies around the depth, over a vocabulary of ``symbols`` whose padding has the id ``padding``.

        Raises:
            OptionError: neither the options nor a task say how long an input may be.
        """
        if self.max_positions is None:
            raise OptionError("--max-positions", "how many tokens has the longest input? Give a number.")
        return EncoderConfig(
            EmbeddingConfig(
                symbols=symbols,
                dim=self.encoder_embed_dim,
                positions=self.max_positions,
                padding=padding,
                segments=self.segment_types,
                learned_positions=self.learned_positions,
                width=self.encoder_embedding_dim,
                map_bias=not self.no_biases,
                norm=None if self.no_layernorm_embedding else self.norm(),
                dropout=self.dropout if self.embedding_dropout is None else self.embedding_dropout,
            ),
            MaskedLMHeadConfig(
                self.activation_fn, self.norm(), tied=not self.untie_weights_roberta, bias=not self.no_biases
            ),
        )

    def initialisation(self) -> InitialisationConfig:
        """How the network starts."""
        return InitialisationConfig(
            self.encoder_init, self.encoder_init_std, self.encoder_position_start, self.layers_in_series
        )

    def mixer_config(self) -> MixerConfig:
        """What mixes the tokens, with its options."""
        return mixer_config(self.mixer, self)

    def transformer_field(self, kind: str) -> TransformerFieldConfig:
        """Shape and noise of a transformer field of one of :data:`fairseq_implicit.fields.transformer.KINDS`."""
        return TransformerFieldConfig(
            dim=self.encoder_embed_dim,
            ffn_dim=self.encoder_ffn_embed_dim,
            mixer=self.mixer_config(),
            kind=kind,
            activation=self.activation_fn,
            norm=self.norm(),
            dropout=self.dropout,
            activation_dropout=self.activation_dropout,
            drop_path=self.drop_path,
            dropout_policy=self.stage_dropout,
            gated=self.gated_feed_forward,
            biases=not self.no_biases,
            first_norm=not self.no_first_norm,
            feed_forward_dropout=self.feed_forward_dropout,
        )
