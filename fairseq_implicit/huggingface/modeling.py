"""The networks as models of transformers: for features, masked tokens, classes of inputs and tokens, and answers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from fairseq_implicit.huggingface.configuration import ImplicitBertConfig
from fairseq_implicit.networks.heads import ClassificationHead, ClassificationHeadConfig, MaskedLMHead
from fairseq_implicit.networks.initialisation import initialise

logger = logging.get_logger(__name__)

_ALIGNMENT = 64  # bytes, of torch's allocator


@dataclass
class ImplicitModelOutput(ModelOutput):
    """What a model returns; what it does not have is left out.

    Attributes:
        loss: 0-dim, in training with what the depth adds to it.
        last_hidden_state: features ``(batch, time, dim)``, of the model without a head.
        logits: ``(batch, time, vocabulary)``, ``(batch, classes)`` or ``(batch, time, classes)``.
        start_logits, end_logits: ``(batch, time)``, of answers.
        hidden_states: the states along the depth when asked for, first the input, each ``(batch, time, dim)``.
        statistics: name -> number or 0-dim tensor: what the solve cost.
        penalties: name -> 0-dim tensor with gradient, already weighted.
        auxiliary: ``(weight, features)`` of corrected states, whose loss is added with that weight.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    statistics: dict[str, float | Tensor] | None = None
    penalties: dict[str, Tensor] | None = None
    auxiliary: list[tuple[float, Tensor]] | None = None


class ImplicitBertPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config_class = ImplicitBertConfig
    config: ImplicitBertConfig
    base_model_prefix = "model"
    #: Losses are means over the batch: Trainer divides them by the number of accumulated batches itself.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @property
    def features(self) -> FeatureModel:
        """The model without a head."""
        raise TypeError(f"{type(self).__name__} defines no features: a model must name its network there")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.features.encoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.features.encoder.embed_tokens = value

    def set_num_updates(self, updates: int) -> None:
        """Tell the depth's schedules how many updates training has made in the model's whole life, as
        ``attach_to(trainer)`` does.
        """
        self.features.told = True
        self.features.encoder.depth.count_updates(updates)

    @property
    def num_updates(self) -> int:
        """How many updates the weights have seen, where the depth has schedules that depend on it; otherwise 0."""
        return self.features.encoder.depth.updates_seen

    def attach_to(self, trainer: transformers.Trainer) -> None:
        """Let a Trainer tell the depth's schedules the number of updates, and log the depth's statistics.

        They stand in the line of the loss, for every reporter.
        """
        from fairseq_implicit.huggingface.callback import DepthCallback

        trainer.remove_callback(DepthCallback)
        # Before the reporters, which Trainer puts before what it is given.
        trainer.callback_handler.callbacks.insert(0, DepthCallback())

    def trainer_callback(self) -> transformers.TrainerCallback:
        """The same as an entry of ``Trainer(callbacks=[…])``: Trainer's own reporters, such as TensorBoard's, have seen
        the line of the loss by then. Its history, its progress bar and reporters given after it show all of it.
        """
        from fairseq_implicit.huggingface.callback import DepthCallback

        return DepthCallback()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation {attn_implementation!r}: attention here is torch's scaled_dot_product_attention, "
                "which gives no attention probabilities; leave it out or set it to 'sdpa'"
            )
        return "sdpa"

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, every_n_layers: int = 1
    ) -> None:
        """Recompute activations step by step (of an equilibrium cell: of the whole cell), by the depth's own means.

        Raises:
            ValueError: the gradient keeps no activations, or only some layers are to be recomputed.
        """
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers {every_n_layers}: a depth is recomputed everywhere or nowhere; give 1")
        features = self.features
        with self.config.naming():
            wanted = enable or self.config.checkpoint_activations
            features.encoder.depth.config = self.config.options(checkpoint_activations=wanted).check()
        features.gradient_checkpointing = enable


class FeatureModel(ImplicitBertPreTrainedModel):
    """Embeddings and depth, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"encoder\.lm_head\."]

    def __init__(self, config: ImplicitBertConfig, head: bool = False):
        super().__init__(config)
        self.encoder = config.encoder(head)
        # A file holds what layers have in common once.
        shared = self.encoder.shared_weights()
        self._tied_weights_keys = {f"encoder.{name}": f"encoder.{first}" for name, first in shared.items()}
        self.gradient_checkpointing = False
        self.told = False  # the number of updates, by a callback or whoever trains
        # transformers constructs what it loads without memory, and what a checkpoint lacks has any value then.
        self.loaded = self.encoder.embed_tokens.weight.is_meta
        self.started = False
        self.post_init()

    @property
    def features(self) -> FeatureModel:
        return self

    def initialize_weights(self) -> None:
        """The start of fairseq's models: of everything, or of what a checkpoint lacks."""
        start = self.config.options().initialisation()
        if self.loaded and not _is_whole(self.encoder):
            fresh = self.config.encoder(self.encoder.lm_head is not None)
            initialise(fresh, start)
            _fill(self.encoder, fresh)
        if self.loaded:
            _align(self.encoder)
        elif not self.started:
            initialise(self.encoder, start)
        self.started = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImplicitModelOutput:
        """Features of a batch.

        Args:
            input_ids: ``(batch, time)`` ids.
            attention_mask: ``(batch, time)``, 0 at padding; tokens with the id of padding are padding in any case.
            token_type_ids: ``(batch, time)`` segments. A network that has none takes zeros, as tokenizers send them.
            inputs_embeds: ``(batch, time, dim)`` in place of token embeddings, without ``input_ids``.
            output_hidden_states: also return the states along the depth.
            position_ids, output_attentions: refused, the network has no use for them.

        Raises:
            ValueError: an input that the network does not take, or more tokens than it has positions.
        """
        if position_ids is not None:
            raise ValueError("position_ids: positions here are the places of the real tokens; leave them out")
        if output_attentions or self.config.output_attentions:
            raise ValueError("output_attentions: torch's attention gives no probabilities; leave it out")
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.shape != given.shape[:2]:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, and the input is (batch, time) "
                f"{tuple(given.shape[:2])}"
            )
        self._remind()
        if input_ids is None:
            # Any id will do that is not the padding's.
            token = int(self.config.pad_token_id == 0)
            input_ids = torch.full(given.shape[:2], token, dtype=torch.int64, device=given.device)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with self.config.naming():
            output = self.encoder(
                input_ids,
                attended=None if attention_mask is None else attention_mask.bool(),
                segments=self._segments(token_type_ids),
                features_only=True,
                return_hidden_states=bool(output_hidden_states),
                token_embeddings=inputs_embeds,
            )
        return ImplicitModelOutput(
            last_hidden_state=output.values,
            hidden_states=None if output.hidden_states is None else tuple(output.hidden_states),
            statistics=output.statistics,
            penalties=output.penalties or None,
            auxiliary=output.auxiliary or None,
        )

    def _segments(self, token_type_ids: Tensor | None) -> Tensor | None:
        if token_type_ids is None or self.encoder.embed_segments is not None:
            return token_type_ids
        if token_type_ids.any():
            raise ValueError("token_type_ids: this model has no embeddings of segments (segment_types is 0)")
        return None

    def _remind(self) -> None:
        """Say once that nobody tells the update to a depth with schedules."""
        if self.training and torch.is_grad_enabled() and not self.told and self.encoder.depth.scheduled:
            self.told = True
            logger.warning(
                "this depth has schedules (warm-up, ramps, random steps or measurements), and nobody tells it the "
                "number of updates: call model.attach_to(trainer) before training, give Trainer "
                "callbacks=[model.trainer_callback()], or call model.set_num_updates(number) before every update"
            )


class TaskModel(ImplicitBertPreTrainedModel):
    """A head on features, and a loss of what it makes of them."""

    #: The model below the head.
    feature_class: ClassVar[type[FeatureModel]] = FeatureModel
    #: Whether that has the head of masked tokens.
    predicts_tokens: ClassVar[bool] = False

    def __init__(self, config: ImplicitBertConfig):
        super().__init__(config)
        self.model = self.feature_class(config, self.predicts_tokens)
        for name, head in self.heads().items():
            self.add_module(name, head)
        self.post_init()

    @property
    def features(self) -> FeatureModel:
        return self.model

    def heads(self) -> dict[str, nn.Module]:
        """Fresh modules of the head, by name."""
        return {}

    def initialize_weights(self) -> None:
        """Of the model below, and of the head where a checkpoint lacks it."""
        self.model.initialize_weights()
        if self.model.loaded:
            for name, head in self.heads().items():
                _fill(getattr(self, name), head)
                _align(getattr(self, name))

    def _run(self, loss_of: Callable[[Tensor], Tensor] | None, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What the head makes of ``inputs``, and the parts of the output that all tasks have."""
        below = self.model(**inputs, return_dict=True)
        dtype = self.model.encoder.dtype
        values = self.read(below.last_hidden_state.to(dtype))
        loss = None if loss_of is None else loss_of(values)
        if loss is not None and loss_of is not None and self.training:
            for penalty in (below.penalties or {}).values():
                loss = loss + penalty
            for weight, features in below.auxiliary or ():
                loss = loss + weight * loss_of(self.read(features.to(dtype)))
        return values, {name: below[name] for name in ("hidden_states", "statistics", "penalties") if name in below} | {
            "loss": loss
        }

    def read(self, features: Tensor) -> Tensor:
        """What the head makes of features ``(batch, time, dim)``."""
        raise TypeError(f"{type(self).__name__} defines no read(): a task must apply its head there")


class LabelledModel(TaskModel):
    """A task with one tensor of labels."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, without what the depth adds."""
        raise TypeError(f"{type(self).__name__} defines no loss_of(): a task must compare with its labels there")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImplicitModelOutput:
        """Logits, and with ``labels`` their loss; see :meth:`FeatureModel.forward`.

        Args:
            labels: ids ``(batch, time)`` of tokens, classes ``(batch,)`` of inputs or ``(batch, time)`` of tokens; -100
                where there is nothing to predict.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        loss_of = None if labels is None else (lambda logits: self.loss_of(logits, labels))
        logits, output = self._run(loss_of, inputs)
        return ImplicitModelOutput(logits=logits, **output)


class MaskedLM(LabelledModel):
    """The model and the head of masked tokens."""

    predicts_tokens = True
    _tied_weights_keys = {"model.encoder.lm_head.weight": "model.encoder.embed_tokens.weight"}

    def read(self, features: Tensor) -> Tensor:
        return self.model.encoder.logits(features)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)

    def get_output_embeddings(self) -> MaskedLMHead:
        return self.model.encoder.lm_head

    def set_output_embeddings(self, head: MaskedLMHead) -> None:
        self.model.encoder.lm_head = head

    def _get_resized_lm_head(self, old_lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers resizes linear maps: matrix and bias of the head are one.
        symbols, dim = old_lm_head.weight.shape
        linear = nn.Linear(dim, symbols, device="meta")
        linear.weight, linear.bias = old_lm_head.weight, old_lm_head.bias
        resized = super()._get_resized_lm_head(linear, *args, **kwargs)
        old_lm_head.weight, old_lm_head.bias = resized.weight, resized.bias
        return old_lm_head


class SequenceClassification(LabelledModel):
    """The model and RoBERTa's head of whole inputs."""

    classifier: ClassificationHead

    def heads(self) -> dict[str, nn.Module]:
        config = self.config
        head = ClassificationHeadConfig(
            classes=config.num_labels or 0,
            inner_dim=config.classifier_inner_dim,
            activation=config.pooler_activation_fn,
            dropout=config.pooler_dropout,
            spectral_norm=config.spectral_norm_classification_head,
        )
        return {"classifier": ClassificationHead(config.hidden_size, head)}

    def read(self, features: Tensor) -> Tensor:
        return self.classifier(features)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)


class TokenClassification(LabelledModel):
    """The model and a linear map to the classes of each token."""

    dropout: nn.Dropout
    score: nn.Linear

    def heads(self) -> dict[str, nn.Module]:
        score = nn.Linear(self.config.hidden_size, self.config.num_labels or 0)
        return {"dropout": nn.Dropout(self.config.pooler_dropout), "score": score}

    def read(self, features: Tensor) -> Tensor:
        return self.score(self.dropout(features))

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits, labels, self.config)


class QuestionAnswering(TaskModel):
    """The model and a linear map to the scores of an answer's first and last token."""

    qa_outputs: nn.Linear

    def heads(self) -> dict[str, nn.Module]:
        return {"qa_outputs": nn.Linear(self.config.hidden_size, 2)}

    def read(self, features: Tensor) -> Tensor:
        return self.qa_outputs(features)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImplicitModelOutput:
        """Scores of the first and the last token of an answer, and with both positions ``(batch,)`` their loss."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }

        def loss_of(scores: Tensor) -> Tensor:
            return self.loss_function(*scores.unbind(-1), start_positions, end_positions)

        labelled = start_positions is not None and end_positions is not None
        scores, output = self._run(loss_of if labelled else None, inputs)
        start, end = (part.contiguous() for part in scores.unbind(-1))
        return ImplicitModelOutput(start_logits=start, end_logits=end, **output)


#: The tasks: how a family's class ends, and for which Auto class it is.
TASKS: dict[str, tuple[str, type[TaskModel]]] = {
    "ForMaskedLM": ("AutoModelForMaskedLM", MaskedLM),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", SequenceClassification),
    "ForTokenClassification": ("AutoModelForTokenClassification", TokenClassification),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", QuestionAnswering),
}


def models_of(config: type[ImplicitBertConfig]) -> tuple[type[ImplicitBertPreTrainedModel], ...]:
    """The classes of a family: without a head, then one for each of :data:`TASKS`."""
    stem = config.__name__.removesuffix("Config")
    common = {"__module__": config.__module__, "config_class": config}
    features = type(f"{stem}Model", (FeatureModel,), {**common, "__doc__": FeatureModel.__doc__})
    tasks = (
        type(stem + ending, (base,), {**common, "__doc__": base.__doc__, "feature_class": features})
        for ending, (_, base) in TASKS.items()
    )
    return features, *tasks


def auto_classes(config: type[ImplicitBertConfig]) -> dict[str, str]:
    """Auto class -> the family's class for it, by name, the configuration included."""
    stem = config.__name__.removesuffix("Config")
    tasks = {auto: stem + ending for ending, (auto, _) in TASKS.items()}
    return {"AutoConfig": config.__name__, "AutoModel": f"{stem}Model", **tasks}


def family_class(config: type[ImplicitBertConfig], auto: str) -> type[ImplicitBertPreTrainedModel]:
    """A family's model for an Auto class."""
    return getattr(sys.modules[config.__module__], auto_classes(config)[auto])


def register(config: type[ImplicitBertConfig]) -> None:
    """Let transformers' Auto classes open the models of a family. Again, it changes nothing."""
    for auto in auto_classes(config):
        if auto == "AutoConfig":
            AutoConfig.register(config.model_type, config, exist_ok=True)
        else:
            getattr(transformers, auto).register(config, family_class(config, auto), exist_ok=True)


def _is_whole(module: nn.Module) -> bool:
    """Whether transformers has loaded all of it, or will tie what is left."""
    return all(map(_is_there, itertools.chain(module.parameters(), module.buffers())))


def _is_there(tensor: Tensor) -> bool:
    # transformers' mark of what it has loaded.
    return getattr(tensor, "_is_hf_initialized", False)


@torch.no_grad()
def _fill(module: nn.Module, fresh: nn.Module) -> None:
    """Give ``module`` the values of ``fresh`` wherever transformers has loaded none."""
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    values = dict(fresh.named_parameters(remove_duplicate=False)) | dict(fresh.named_buffers(remove_duplicate=False))
    for name, tensor in own:
        if not _is_there(tensor):
            tensor.copy_(values[name])


def _align(module: nn.Module) -> None:
    """Move weights to where torch puts new ones: matrix products of others round otherwise.

    transformers maps a file into memory, in which they begin anywhere.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
