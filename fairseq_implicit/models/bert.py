"""A network as fairseq's model: what every family shares.

What a family is stands in its options (:mod:`fairseq_implicit.families`); here it gets a name and flags.
"""

import logging
import os
from typing import Any, Dict, Mapping, Optional, Tuple

from fairseq.models import BaseFairseqModel
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional

from fairseq_implicit.compat.outputs import for_fairseq
from fairseq_implicit.compat.parameters import leave_undecayed
from fairseq_implicit.depth.compilation import compile_fields
from fairseq_implicit.depth.history import LayerHistory
from fairseq_implicit.depth.output import Depth
from fairseq_implicit.fields.semilinear import Rate
from fairseq_implicit.fields.time_conditioned import DepthEmbedding
from fairseq_implicit.models import stored_weights
from fairseq_implicit.models.config import ImplicitBertConfig
from fairseq_implicit.networks.encoder import Encoder, EncoderConfig
from fairseq_implicit.networks.heads import ClassificationHead, ClassificationHeadConfig
from fairseq_implicit.networks.initialisation import initialise
from fairseq_implicit.solvers.coefficients import StageWeights

logger = logging.getLogger(__name__)

#: Modules whose weights are coefficients, gates, rates and mixtures: zero is no rest for them, as it is for matrices.
_COEFFICIENTS = (StageWeights, LayerHistory, DepthEmbedding, Rate)


class ImplicitBertEncoder(Encoder):
    """The network, and the names under which fairseq and its users look for its parts."""

    def __init__(self, config: EncoderConfig, depth: Depth, dictionary):
        super().__init__(config, depth)
        self.dictionary = dictionary

    @property
    def sentence_encoder(self) -> "ImplicitBertEncoder":
        """RoBERTa's name for the part below the head, where others look for ``embed_tokens`` and ``layers``."""
        return self

    def max_positions(self) -> int:
        """Longest input in tokens."""
        return self.embeddings.positions


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


class ImplicitBertModel(BaseFairseqModel):
    """Base of the model families."""

    def __init__(self, cfg: ImplicitBertConfig, encoder: ImplicitBertEncoder):
        super().__init__()
        self.encoder = encoder
        # fairseq's trainer, tasks and criterions read the configuration under this name.
        self.args = cfg
        self.classification_heads = nn.ModuleDict()
        initialise(encoder, cfg.initialisation())
        for module in encoder.modules():
            if isinstance(module, _COEFFICIENTS):
                leave_undecayed(module.parameters())

    @classmethod
    def build_model(cls, cfg: ImplicitBertConfig, task) -> "ImplicitBertModel":
        """Build from a config (fairseq-train, fairseq-hydra-train, checkpoints) and a task that has a dictionary.

        Raises:
            ValueError: one sentence naming the flag at fault.
        """
        typed = cls.configuration(cfg) if OmegaConf.is_config(cfg) else cfg
        if typed.max_positions is None:
            typed.max_positions = _positions_of(task)
        with typed.flags.naming():
            depth, dictionary = typed.build_depth(), task.source_dictionary
        return cls(typed, ImplicitBertEncoder(typed.network(len(dictionary), dictionary.pad()), depth, dictionary))

    def compile_blocks(self) -> None:
        """For the rest of a training; who opens its checkpoint needs no compiler.

        Raises:
            ValueError: there is none, or the weights are others at every time.
        """
        with self.args.flags.naming():
            compile_fields(self.encoder.depth)

    @classmethod
    def config_class(cls):
        """The family's config dataclass."""
        return getattr(cls, "__dataclass")

    @classmethod
    def configuration(cls, settings: Mapping[str, Any]) -> ImplicitBertConfig:
        """The family's configuration, of settings that may say more and less."""
        return cls.config_class()(
            **{key: settings[key] for key in cls.config_class().__dataclass_fields__ if key in settings}
        )

    def forward(
        self,
        src_tokens: Tensor,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        classification_head_name: Optional[str] = None,
        masked_tokens: Optional[Tensor] = None,
        predicted: Optional[Tensor] = None,
        segments: Optional[Tensor] = None,
        has_padding: Optional[bool] = None,
        token_embeddings: Optional[Tensor] = None,
        src_lengths: Optional[Tensor] = None,
        return_lambdas: bool = False,
        **unknown: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """See :meth:`Encoder.forward`; a head's name gives its logits ``(batch, classes)``.

        ``src_lengths`` are not needed, fairseq's tasks send them.

        Returns:
            logits or features, and a dictionary with ``inner_states``, as RoBERTa has it, content ``lambdas`` if they
            were asked for, and the typed ``output``.

        Raises:
            TypeError: an input that the model does not take.
        """
        if segments is not None and not self.args.segment_types:
            unknown["segments"] = segments
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes no {', '.join(unknown)}: train it with a task and an objective whose "
                "batches hold no such input"
            )
        # Whether a tolerance or a memory cap suits the precision and the batch is known only here.
        with self.args.flags.naming():
            output = self.encoder(
                src_tokens,
                segments=segments,
                features_only=features_only or classification_head_name is not None,
                masked_tokens=masked_tokens,
                predicted=predicted,
                return_hidden_states=return_all_hiddens,
                return_lambdas=return_lambdas,
                has_padding=has_padding,
                token_embeddings=token_embeddings,
            )
        if classification_head_name is not None:
            head = self.classification_heads[classification_head_name]
            output = output.read_by(lambda features: head(features.to(self.encoder.dtype)))
        return for_fairseq(output)

    def get_normalized_probs(self, net_output, log_probs: bool, sample=None) -> Tensor:
        """(Log-)probabilities of the net's output, in float32."""
        logits = net_output[0].float()
        return functional.log_softmax(logits, dim=-1) if log_probs else functional.softmax(logits, dim=-1)

    def max_positions(self) -> int:
        """Longest input in tokens."""
        return self.encoder.max_positions()

    def train(self, mode: bool = True) -> "ImplicitBertModel":
        # The loop says it twice per update; torch then sets the flag of every module anew, which costs four times as
        # much as looking at it.
        if any(module.training is not mode for module in self.modules()):
            super().train(mode)
        return self

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
        config = ClassificationHeadConfig(
            classes=num_classes,
            inner_dim=inner_dim,
            activation=self.args.pooler_activation_fn,
            dropout=self.args.pooler_dropout,
            spectral_norm=self.args.spectral_norm_classification_head,
        )
        head = ClassificationHead(self.args.encoder_embed_dim, config)
        self.classification_heads[name] = head.to(self.encoder.embed_tokens.weight.device)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """Fit a checkpoint to this model: see :mod:`fairseq_implicit.models.stored_weights`."""
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}." if name else ""
        stored_weights.check_embeddings(self.encoder, state_dict, f"{prefix}encoder.")
        stored_weights.fit_heads(self, state_dict, f"{prefix}classification_heads.")

    def upgrade_state_dict(self, state_dict: Dict[str, Tensor]) -> None:
        super().upgrade_state_dict(state_dict)
        stored_weights.check_depth(self, state_dict)

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
            bpe: ``sentencepiece`` (``sentencepiece.bpe.model``), ``hf_tokenizer`` (``tokenizer.json``) or ``gpt2``
                (``encoder.json`` and ``vocab.bpe``, as RoBERTa's public weights have them); by default the one whose
                files are there.
            **overrides: model or task fields to change, as with ``--model-overrides``; files of the tokenizer under
                fairseq's names (``sentencepiece_model``, ``hf_tokenizer``, ``gpt2_encoder_json``, ``gpt2_vocab_bpe``).

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
