"""What every model of the package shares: embeddings, depth, heads, and the joints with fairseq.

A family subclasses :class:`ImplicitBertModel`, gives it a config and overrides ``build_depth``.
"""

import logging
import math
import os
from dataclasses import replace
from typing import Any, Dict, Optional, Tuple

import torch
from fairseq.models import FairseqEncoder, FairseqEncoderModel
from fairseq.models.roberta.model import RobertaClassificationHead, RobertaLMHead
from fairseq.modules import PositionalEmbedding
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.compat.outputs import for_fairseq
from fairseq_implicit.depth.output import Depth, DepthOutput
from fairseq_implicit.fields.shared_dropout import SharedDropout
from fairseq_implicit.layout import UNPADDED, Layout
from fairseq_implicit.models.config import ImplicitBertConfig
from fairseq_implicit.networks.output import ModelOutput

logger = logging.getLogger(__name__)


class ImplicitBertEncoder(FairseqEncoder):
    """Embeddings, depth and masked-LM head.

    Args:
        cfg: the checked configuration, ``max_positions`` filled in.
        dictionary: fairseq dictionary, ``<mask>`` included.
        depth: what lies between embeddings and head.
    """

    def __init__(self, cfg: ImplicitBertConfig, dictionary, depth: Depth):
        super().__init__(dictionary)
        dim = cfg.encoder_embed_dim
        self.padding_idx = dictionary.pad()
        self.positions = cfg.max_positions
        self.embed_tokens = nn.Embedding(len(dictionary), dim, self.padding_idx)
        self.embed_positions = PositionalEmbedding(cfg.max_positions, dim, self.padding_idx, learned=True)
        self.layernorm_embedding = None if cfg.no_layernorm_embedding else cfg.norm().build(dim)
        self.dropout = SharedDropout(cfg.dropout)
        self.depth = depth
        self.lm_head = RobertaLMHead(
            embed_dim=dim,
            output_dim=len(dictionary),
            activation_fn=cfg.activation_fn,
            weight=None if cfg.untie_weights_roberta else self.embed_tokens.weight,
        )
        self.lm_head.layer_norm.eps = cfg.norm().eps

    def layout(self, src_tokens: Tensor, has_padding: Optional[bool] = None) -> Layout:
        """That of the batch ``src_tokens`` ``(batch, time)``; no GPU is asked whether it holds padding."""
        if has_padding is False:
            return UNPADDED
        real = src_tokens.ne(self.padding_idx)
        return UNPADDED if has_padding is None and real.device.type == "cpu" and real.all() else Layout(real)

    @property
    def sentence_encoder(self) -> "ImplicitBertEncoder":
        """RoBERTa's name for the part below the head, where others look for ``embed_tokens`` and ``layers``."""
        return self

    def embed(self, src_tokens: Tensor, layout: Layout, token_embeddings: Optional[Tensor] = None) -> Tensor:
        """Token and position embeddings, normalised and dropped, zero at padding: ``(batch, time, dim)``."""
        if src_tokens.shape[1] > self.positions:
            raise ValueError(
                f"an input of {src_tokens.shape[1]} tokens is longer than the model's {self.positions} positions: "
                "shorten it, or train with a larger --max-positions"
            )
        tokens = self.embed_tokens(src_tokens) if token_embeddings is None else token_embeddings
        # As fairseq has it, the rows up to the padding's own are nobody's.
        places = layout.positions_of(src_tokens) + self.padding_idx + 1
        x = tokens + functional.embedding(places, self.embed_positions.weight, self.padding_idx)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return layout.keep(self.dropout.prepare(x)(x))

    def forward(
        self,
        src_tokens: Tensor,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        masked_tokens: Optional[Tensor] = None,
        has_padding: Optional[bool] = None,
        token_embeddings: Optional[Tensor] = None,
    ) -> ModelOutput:
        """Run the encoder.

        Args:
            src_tokens: ``(batch, time)`` ids.
            features_only: return features ``(batch, time, dim)`` instead of logits.
            return_all_hiddens: also return the states along the depth.
            masked_tokens: ``(batch, time)`` bool; the head runs only there, and logits are ``(masked, vocabulary)``.
            has_padding: whether ``src_tokens`` holds padding, where the caller knows.
            token_embeddings: ``(batch, time, dim)`` in place of those of ``src_tokens``, whose padding still counts.
        """
        layout = self.layout(src_tokens, has_padding)
        x = self.embed(src_tokens, layout, token_embeddings)
        depth: DepthOutput = self.depth(x, layout, return_all_hiddens)
        values, auxiliary = depth.state, depth.auxiliary_states
        if not features_only:
            selected = None if masked_tokens is None else masked_tokens.flatten().nonzero().squeeze(1)
            auxiliary = [(weight, self.output_layer(state, selected)) for weight, state in auxiliary]
            values = self.output_layer(values, selected)
        return ModelOutput(values, depth.hidden_states, depth.statistics, depth.penalties, auxiliary)

    def output_layer(self, features: Tensor, selected: Optional[Tensor] = None) -> Tensor:
        """Logits of ``features`` ``(batch, time, dim)``, or of its rows ``selected`` (flat indices) only."""
        if selected is not None:
            features = features.flatten(0, 1).index_select(0, selected)
        # The depth may keep a float32 state around half-precision weights; quantised matrices have no dtype to ask for.
        return self.lm_head(features.to(self.lm_head.layer_norm.weight.dtype))

    def max_positions(self) -> int:
        """Longest input in tokens."""
        return self.positions


def _positions_of(task) -> int:
    """The longest input of a task; fairseq's older tasks only know it as their ``--tokens-per-sample``.

    Raises:
        ValueError: the task knows no length.
    """
    positions = task.max_positions()
    if positions is None:
        settings = [each for each in (task.cfg, getattr(task, "args", None)) if each is not None]
        positions = next((each.tokens_per_sample for each in settings if hasattr(each, "tokens_per_sample")), None)
    if positions is None:
        raise ValueError(f"the task {type(task).__name__} sets no length of its inputs: give --max-positions")
    return positions


class ImplicitBertModel(FairseqEncoderModel):
    """Base of the model families."""

    def __init__(self, cfg: ImplicitBertConfig, encoder: ImplicitBertEncoder):
        super().__init__(encoder)
        # fairseq's trainer, tasks and criterions read the configuration under this name.
        self.args = cfg
        self.classification_heads = nn.ModuleDict()
        self.initialise(cfg.encoder_init)

    @classmethod
    def build_depth(cls, cfg: ImplicitBertConfig) -> Depth:
        """The hook of a family: the module between embeddings and head."""
        raise TypeError(f"{cls.__name__} defines no build_depth(): a model family must build its depth there")

    @classmethod
    def build_model(cls, cfg: ImplicitBertConfig, task) -> "ImplicitBertModel":
        """Build from a config (fairseq-train, fairseq-hydra-train, checkpoints) and a task that has a dictionary.

        Raises:
            ValueError: one sentence naming the flag at fault.
        """
        if OmegaConf.is_config(cfg):
            typed = cls.config_class()(
                **{key: cfg[key] for key in cls.config_class().__dataclass_fields__ if key in cfg}
            )
        else:
            typed = cfg
        if typed.max_positions is None:
            typed.max_positions = _positions_of(task)
        typed.check()
        return cls(typed, ImplicitBertEncoder(typed, task.source_dictionary, cls.build_depth(typed)))

    @classmethod
    def config_class(cls):
        """The family's config dataclass."""
        return getattr(cls, "__dataclass")

    @property
    def layers_in_series(self) -> int:
        """How many layers a token passes from the embedding to the head, sub-steps and iterations not counted."""
        return self.args.encoder_layers

    def initialise(self, scheme: str) -> None:
        """N(0, ``--encoder-init-std``), zero biases.

        ``depth-scaled`` divides residual projections by the root of their number in :attr:`layers_in_series`,
        ``identity`` sets them to 0. What in the depth needs another start has the last word.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.args.encoder_init_std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    with torch.no_grad():
                        module.weight[module.padding_idx].zero_()
        if self.args.encoder_position_start == "sinusoidal":
            self._start_from_sinusoids(self.encoder.embed_positions.weight)
        if scheme != "plain":
            layers = list(self.encoder.depth.layers())
            projections = [projection for layer in layers for projection in layer.residual_projections()]
            # With tied blocks the same weights act in every block.
            repeats = self.layers_in_series / len(layers)
            with torch.no_grad():
                divisor = math.sqrt(max(1.0, len(projections) * repeats)) if scheme == "depth-scaled" else math.inf
                for projection in projections:
                    projection.weight.div_(divisor)
        self.encoder.depth.initialise()

    @torch.no_grad()
    def _start_from_sinusoids(self, weight: Tensor) -> None:
        """Fill ``weight`` ``(positions, dim)`` with the sines and cosines of arXiv 1706.03762 §3.5, at the scale of the
        other weights. A head finds a neighbour by one rotation then, instead of learning it place by place."""
        positions, dim = weight.shape
        half = (dim + 1) // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half))
        angles = torch.arange(positions)[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]
        weight.copy_(math.sqrt(2.0) * self.args.encoder_init_std * waves)
        weight[self.encoder.padding_idx].zero_()

    def forward(
        self,
        src_tokens: Tensor,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        classification_head_name: Optional[str] = None,
        masked_tokens: Optional[Tensor] = None,
        has_padding: Optional[bool] = None,
        token_embeddings: Optional[Tensor] = None,
        src_lengths: Optional[Tensor] = None,
        **unknown: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """See :meth:`ImplicitBertEncoder.forward`; a head's name gives its logits ``(batch, classes)``.

        ``src_lengths`` are not needed, fairseq's tasks send them.

        Returns:
            logits or features, and a dictionary with ``inner_states``, as RoBERTa has it, and the typed ``output``.

        Raises:
            TypeError: an input that the model does not take.
        """
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes no {', '.join(unknown)}: train it with a task and an objective whose "
                "batches hold no such input"
            )
        output = self.encoder(
            src_tokens,
            features_only or classification_head_name is not None,
            return_all_hiddens,
            masked_tokens,
            has_padding,
            token_embeddings,
        )
        if classification_head_name is not None:
            head = self.classification_heads[classification_head_name]
            dtype = self.encoder.lm_head.layer_norm.weight.dtype
            auxiliary = [(weight, head(state.to(dtype))) for weight, state in output.auxiliary]
            output = replace(output, values=head(output.values.to(dtype)), auxiliary=auxiliary)
        return for_fairseq(output)

    def get_normalized_probs(self, net_output, log_probs: bool, sample=None) -> Tensor:
        """(Log-)probabilities of the net's output, in float32."""
        logits = net_output[0].float()
        return functional.log_softmax(logits, dim=-1) if log_probs else functional.softmax(logits, dim=-1)

    def max_positions(self) -> int:
        """Longest input in tokens."""
        return self.encoder.max_positions()

    @property
    def supported_targets(self):
        return {"self"}

    def register_classification_head(
        self, name: str, num_classes: int, inner_dim: Optional[int] = None, embedding_size: Optional[int] = None
    ):
        """Add a sentence head (RoBERTa's: dense, activation, projection of the first position).

        Raises:
            ValueError: an ``embedding_size`` (fairseq's hub has that argument) that is not the model's width.
        """
        if embedding_size not in (None, self.args.encoder_embed_dim):
            raise ValueError(
                f"the classification head {name} takes features of the model's width {self.args.encoder_embed_dim}, "
                f"not of {embedding_size}: leave embedding_size out; the head's own width is inner_dim"
            )
        if name in self.classification_heads:
            logger.warning("classification head %s is registered anew; its weights start over", name)
        head = RobertaClassificationHead(
            input_dim=self.args.encoder_embed_dim,
            inner_dim=inner_dim or self.args.encoder_embed_dim,
            num_classes=num_classes,
            activation_fn=self.args.pooler_activation_fn,
            pooler_dropout=self.args.pooler_dropout,
            do_spectral_norm=self.args.spectral_norm_classification_head,
        )
        self.classification_heads[name] = head.to(self.encoder.embed_tokens.weight.device)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """Fit the classification heads of a checkpoint to this model's.

        Heads the model lacks are registered under ``--load-checkpoint-heads`` and dropped otherwise; heads the
        checkpoint lacks keep their fresh weights.
        """
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}." if name else ""
        self._check_embeddings(state_dict, f"{prefix}encoder.")
        heads = f"{prefix}classification_heads."
        found = {key[len(heads) :].split(".")[0] for key in state_dict if key.startswith(heads)}
        for head in sorted(found):
            # A spectral norm stores the projection as ``weight_orig``.
            shape = next(
                state_dict[key].shape
                for key in (f"{heads}{head}.out_proj.weight", f"{heads}{head}.out_proj.weight_orig")
                if key in state_dict
            )
            if head not in self.classification_heads and self.args.load_checkpoint_heads:
                self.register_classification_head(head, shape[0], shape[1])
            current = self.classification_heads[head] if head in self.classification_heads else None
            if current is None or tuple(current.out_proj.weight.shape) != tuple(shape):
                logger.warning("the checkpoint's classification head %s does not fit this model and is left out", head)
                for key in [key for key in state_dict if key.startswith(f"{heads}{head}.")]:
                    del state_dict[key]
        for key, value in self.classification_heads.state_dict().items():
            state_dict.setdefault(heads + key, value)

    def _check_embeddings(self, state_dict: Dict[str, Tensor], prefix: str) -> None:
        """ValueError, one sentence, where a checkpoint has another number of positions or of symbols."""
        for table, flag, offset in (
            ("embed_positions", "--max-positions", self.encoder.padding_idx + 1),
            ("embed_tokens", "the data's dict.txt", 0),
        ):
            stored = state_dict.get(f"{prefix}{table}.weight")
            rows = getattr(self.encoder, table).weight.shape[0]
            if stored is not None and stored.shape[0] != rows:
                raise ValueError(
                    f"the checkpoint has {stored.shape[0] - offset} rows in its {table} and this model "
                    f"{rows - offset}: they must agree, see {flag}"
                )

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: Optional[str] = None,
        data_name_or_path: Optional[str] = None,
        bpe: Optional[str] = None,
        **overrides,
    ):
        """Load a checkpoint behind the hub interface. Called on :class:`ImplicitBertModel` it opens every family.

        Args:
            model_name_or_path: folder of the checkpoint.
            checkpoint_file: file name inside it; by default the first of ``checkpoint_best.pt``, ``model.pt``,
                ``checkpoint_last.pt`` that is there.
            data_name_or_path: folder that holds ``dict.txt`` and the tokenizer; by default they are looked for beside
                the checkpoint, then in the data folder that the checkpoint names.
            bpe: ``sentencepiece`` (``sentencepiece.bpe.model``) or ``gpt2`` (``encoder.json`` and ``vocab.bpe``, as
                RoBERTa's public weights have them); by default the one whose files are there.
            **overrides: model or task fields to change, as with ``--model-overrides``; files of the tokenizer under
                fairseq's names (``sentencepiece_model``, ``gpt2_encoder_json``, ``gpt2_vocab_bpe``).

        Returns:
            :class:`~fairseq_implicit.models.hub_interface.ImplicitBertHubInterface` in evaluation mode.

        Raises:
            FileNotFoundError: no such checkpoint, or no dictionary or tokenizer in those places.
            ValueError: the checkpoint holds a model of another family.
        """
        # Imported here: the hub interface needs a task, which needs the models to be registered first.
        from fairseq_implicit.models.hub_interface import load_hub_interface

        folder = os.fspath(model_name_or_path)
        return load_hub_interface(cls, folder, checkpoint_file, data_name_or_path, bpe, overrides)
