"""What BERT and RoBERTa have in common in transformers: names of weights and fields of ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion import plain_stack
from fairseq_implicit.conversion.misfits import refuse
from fairseq_implicit.conversion.table import Table

#: Fields of config.json and the flags that say the same.
_FIELDS = {
    "num_hidden_layers": "encoder_layers",
    "hidden_size": "encoder_embed_dim",
    "intermediate_size": "encoder_ffn_embed_dim",
    "num_attention_heads": "encoder_attention_heads",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "layernorm_eps",
}
POSITIONS, SEGMENTS = "encoder.embed_positions.weight", "encoder.embed_segments.weight"
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "relu": "relu"}
#: The options of a layer that BERT's have not.
_LAYER = dict(
    gated_feed_forward=False, no_biases=False, attention_rotary_base=None, attention_qk_norm=False,
    attention_window=None,
)  # fmt: skip
#: What an encoder has and its relatives have not; a config.json that does not say it has these.
_ENCODER = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}


@dataclass(frozen=True)
class LayerNames:
    """The names of one layer's modules. ``{layer}`` in the prefix is the number of our field."""

    prefix: str = "encoder.layer.{layer}."
    qkv: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    fc1: str = "intermediate.dense"
    fc2: str = "output.dense"
    norm: str = "output.LayerNorm"

    def table(self, base: str) -> dict[str, str | list[str]]:
        """Ours to theirs, which begin with ``base``."""
        ours, theirs = "encoder.depth.fields.{layer}.", base + self.prefix
        return {
            f"{ours}attention.qkv.{{part}}": [f"{theirs}{name}.{{part}}" for name in self.qkv],
            f"{ours}attention.out.{{part}}": f"{theirs}{self.out}.{{part}}",
            f"{ours}attention_norm.{{part}}": f"{theirs}{self.attention_norm}.{{part}}",
            f"{ours}feed_forward.fc1.{{part}}": f"{theirs}{self.fc1}.{{part}}",
            f"{ours}feed_forward.fc2.{{part}}": f"{theirs}{self.fc2}.{{part}}",
            f"{ours}feed_forward_norm.{{part}}": f"{theirs}{self.norm}.{{part}}",
        }


class TransformersNames:
    """The names of one model's weights, two ways.

    Args:
        model: as errors name it.
        base: how the names of all weights below the heads begin.
        heads: ours to theirs, of the heads, and of what else such a model has beside BERT.
        decoder: the module of the output matrix and its bias, which files may leave out or hold twice.
        bias: the bias of the masked-LM head itself.
        layer: what is in its layers.
    """

    def __init__(
        self,
        model: str,
        base: str,
        heads: Mapping[str, str],
        decoder: str,
        bias: str,
        layer: LayerNames = LayerNames(),  # noqa: B008  (frozen)
    ):
        self.base, self.decoder, self.bias = base, decoder, bias
        self.table = Table(
            model,
            {
                "encoder.embed_tokens.weight": f"{base}embeddings.word_embeddings.weight",
                POSITIONS: f"{base}embeddings.position_embeddings.weight",
                SEGMENTS: f"{base}embeddings.token_type_embeddings.weight",
                "encoder.layernorm_embedding.{part}": f"{base}embeddings.LayerNorm.{{part}}",
                **layer.table(base),
                "encoder.lm_head.weight": f"{decoder}.weight",
                "encoder.lm_head.bias": bias,
                **heads,
            },
        )

    def imported(self, weights: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
        """Their weights, with or without heads, under our names.

        Args:
            weights: of the model.
            tied: its output matrix is that of the token embeddings, whatever the file holds in its place.

        Raises:
            ValueError: a weight that such a model does not have.
        """
        found = {self._today(name): weight for name, weight in weights.items() if not name.endswith("position_ids")}
        if not any(name.startswith(self.base) for name in found):
            found = {self.base + name: weight for name, weight in found.items()}
        # The head's bias is there twice: tied, its own is the one that counts, and else the output matrix's.
        biases = [found.pop(name) for name in (self.bias, f"{self.decoder}.bias") if name in found]
        if biases:
            found[self.bias] = biases[0 if tied else -1]
            if tied:
                found[f"{self.decoder}.weight"] = found[f"{self.base}embeddings.word_embeddings.weight"]
        return self.table.imported(found)

    @staticmethod
    def _today(name: str) -> str:
        """The first BERTs were written by another framework."""
        return re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name))

    def exported(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names.

        Raises:
            ValueError: a weight that has no place there.
        """
        found = self.table.exported(weights)
        if self.bias in found:
            found[f"{self.decoder}.bias"] = found[self.bias]
        return found


def settings_of(config: Mapping[str, Any], misfits: Iterable[str] = ()) -> dict[str, Any]:
    """The flags of the ode_bert that a model is, from its ``config.json``; without positions and segments.

    Args:
        config: of the model.
        misfits: what else is known to make it another function, as sentences.

    Raises:
        ValueError: all that makes it another function.
    """
    refuse([*_misfits_of(config), *misfits])
    return {
        "_name": "ode_bert",
        "ode_scheme": "euler",
        "ode_field": "post-norm",
        **{flag: config[name] for name, flag in _FIELDS.items()},
        "activation_fn": ACTIVATIONS[config["hidden_act"]],
        "untie_weights_roberta": not config.get("tie_word_embeddings", True),
    }


def _misfits_of(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in _ENCODER.items():
        if config.get(name, value) != value:
            yield f"{name} is {config[name]}, and only of {value} an ode_bert can be made"
    if config["hidden_act"] not in ACTIVATIONS:
        yield f"hidden_act is {config['hidden_act']}: an ode_bert has {', '.join(ACTIVATIONS)}"


#: Of the settings of an ode_bert, what BERT itself has.
BERT_SETTINGS: dict[str, Any] = {"mixer": "attention", "ode_tied": False}


def without_positions(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Why a model is none with learned positions."""
    if POSITIONS not in weights or settings.get("encoder_positions") == "none":
        said = settings.get("encoder_positions", "auto")
        yield f"encoder_positions is {said}, and transformers' models have learned ones"


def factorised(settings: Mapping[str, Any]) -> Iterator[str]:
    """Why a model is none whose embeddings are as wide as its layers."""
    width = settings.get("encoder_embedding_dim")
    if width is not None:
        yield f"encoder_embedding_dim is {width}, and their embeddings are as wide as the layers"


def config_of(
    settings: Mapping[str, Any], misfits: Iterable[str] = (), own: Mapping[str, Any] = BERT_SETTINGS
) -> dict[str, Any]:
    """``config.json`` of the model that an ode_bert is, from its flags; without positions, segments and vocabulary.

    Args:
        settings: flags of the model.
        misfits: what else is known to make it another function than theirs, as sentences.
        own: the settings that such a model has.

    Raises:
        ValueError: all flags that make it another function.
    """
    required = {"ode_field": "post-norm", "no_layernorm_embedding": False, **_LAYER, **own}
    activation = settings.get("activation_fn", "gelu")
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    found = [*plain_stack.misfits(settings, **required), *misfits]
    if activation not in names:
        found.append(f"activation_fn is {activation}, which transformers' models have not: {', '.join(names)}")
    refuse(found)
    return {
        **{name: settings[flag] for name, flag in _FIELDS.items() if flag in settings},
        "layer_norm_eps": settings.get("layernorm_eps", 1e-5),
        "hidden_act": names[activation],
        "tie_word_embeddings": not settings.get("untie_weights_roberta", False),
    }
