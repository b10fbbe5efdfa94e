"""What BERT and RoBERTa have in common in transformers: names of weights and fields of ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion import plain_stack
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
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "relu": "relu"}
#: The options of a layer that BERT's have not.
_LAYER = dict(
    mixer="attention", gated_feed_forward=False, no_biases=False, attention_rotary_base=None, attention_qk_norm=False,
    attention_window=None,
)  # fmt: skip
#: What an encoder has and its relatives have not; a config.json that does not say it has these.
_ENCODER = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}


class TransformersNames:
    """The names of one model's weights, two ways.

    Args:
        model: as errors name it.
        base: how the names of all weights below the heads begin.
        heads: ours to theirs, of the heads.
        decoder: the module of the output matrix and its bias, which files may leave out or hold twice.
        bias: the bias of the masked-LM head itself.
    """

    def __init__(self, model: str, base: str, heads: Mapping[str, str], decoder: str, bias: str):
        self.base, self.decoder, self.bias = base, decoder, bias
        layer, ours = f"{base}encoder.layer.{{layer}}.", "encoder.depth.fields.{layer}."
        self.table = Table(
            model,
            {
                "encoder.embed_tokens.weight": f"{base}embeddings.word_embeddings.weight",
                "encoder.embed_positions.weight": f"{base}embeddings.position_embeddings.weight",
                "encoder.embed_segments.weight": f"{base}embeddings.token_type_embeddings.weight",
                "encoder.layernorm_embedding.{part}": f"{base}embeddings.LayerNorm.{{part}}",
                f"{ours}attention.qkv.{{part}}": [
                    f"{layer}attention.self.{name}.{{part}}" for name in ("query", "key", "value")
                ],
                f"{ours}attention.out.{{part}}": f"{layer}attention.output.dense.{{part}}",
                f"{ours}attention_norm.{{part}}": f"{layer}attention.output.LayerNorm.{{part}}",
                f"{ours}feed_forward.fc1.{{part}}": f"{layer}intermediate.dense.{{part}}",
                f"{ours}feed_forward.fc2.{{part}}": f"{layer}output.dense.{{part}}",
                f"{ours}feed_forward_norm.{{part}}": f"{layer}output.LayerNorm.{{part}}",
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


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the ode_bert that a model is, from its ``config.json``; without positions and segments.

    Raises:
        ValueError: a field that makes it another function.
    """
    for name, value in _ENCODER.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]}, and only of {value} an ode_bert can be made")
    if config["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {config['hidden_act']}: an ode_bert has {', '.join(_ACTIVATIONS)}")
    return {
        "_name": "ode_bert",
        "ode_scheme": "euler",
        "ode_field": "post-norm",
        **{flag: config[name] for name, flag in _FIELDS.items()},
        "activation_fn": _ACTIVATIONS[config["hidden_act"]],
        "untie_weights_roberta": not config.get("tie_word_embeddings", True),
    }


def config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the model that an ode_bert is, from its flags; without positions, segments and vocabulary.

    Raises:
        ValueError: a flag that makes it another function than theirs.
    """
    plain_stack.check(settings, ode_field="post-norm", no_layernorm_embedding=False, **_LAYER)
    if settings.get("encoder_positions") == "none":
        raise ValueError("encoder_positions is none, and transformers' models have learned ones")
    activation = settings.get("activation_fn", "gelu")
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    if activation not in names:
        raise ValueError(f"activation_fn is {activation}, which transformers' models have not: {', '.join(names)}")
    return {
        **{name: settings[flag] for name, flag in _FIELDS.items() if flag in settings},
        "layer_norm_eps": settings.get("layernorm_eps", 1e-5),
        "hidden_act": names[activation],
        "tie_word_embeddings": not settings.get("untie_weights_roberta", False),
    }
