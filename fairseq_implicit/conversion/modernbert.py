"""ModernBERT in transformers' form (arXiv 2412.13663) and ode_bert: Euler on pre-norm layers is the same function.

Its layers have rotary positions, gated feed-forward networks, windows in all but every n-th of them and no biases; the
first begins without a norm. Each of these is an option that any ode_bert can have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion import plain_stack
from fairseq_implicit.conversion.misfits import refuse
from fairseq_implicit.conversion.said import other_rows
from fairseq_implicit.conversion.table import Table

#: Fields of config.json and the flags that say the same.
_FIELDS = {
    "num_hidden_layers": "encoder_layers",
    "hidden_size": "encoder_embed_dim",
    "intermediate_size": "encoder_ffn_embed_dim",
    "num_attention_heads": "encoder_attention_heads",
    "max_position_embeddings": "max_positions",
    "norm_eps": "layernorm_eps",
    "embedding_dropout": "embedding_dropout",
    "attention_dropout": "attention_dropout",
    "mlp_dropout": "activation_dropout",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "relu": "relu",
    "silu": "silu",
}
#: What config.json means where it does not say.
_UNSAID: dict[str, Any] = dict(
    norm_eps=1e-5, embedding_dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0, hidden_activation="gelu",
    classifier_activation="gelu", norm_bias=False, attention_bias=False, mlp_bias=False, classifier_bias=False,
    decoder_bias=True, tie_word_embeddings=True, local_attention=128, global_attn_every_n_layers=3,
    max_position_embeddings=8192,
)  # fmt: skip
_BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
#: The flags of every ModernBERT; where a checkpoint does not say, the last two are not set.
_ITS_OWN: dict[str, Any] = dict(
    ode_field="pre-norm", mixer="attention", attention_qk_norm=False, no_layernorm_embedding=False, no_first_norm=True,
    gated_feed_forward=True,
)  # fmt: skip
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
#: The older field of each kind's base, and its value where nothing is said.
_BASES = {_GLOBAL: ("global_rope_theta", 160_000.0), _LOCAL: ("local_rope_theta", 10_000.0)}

_THEIRS, _OURS = "model.layers.{layer}.", "encoder.depth.fields.{layer}."
_TABLE = Table(
    "ModernBERT with the head of masked LM or none",
    {
        "encoder.embed_tokens.weight": "model.embeddings.tok_embeddings.weight",
        "encoder.layernorm_embedding.{part}": "model.embeddings.norm.{part}",
        f"{_OURS}attention_norm.{{part}}": f"{_THEIRS}attn_norm.{{part}}",
        f"{_OURS}attention.qkv.{{part}}": f"{_THEIRS}attn.Wqkv.{{part}}",
        f"{_OURS}attention.out.{{part}}": f"{_THEIRS}attn.Wo.{{part}}",
        f"{_OURS}feed_forward_norm.{{part}}": f"{_THEIRS}mlp_norm.{{part}}",
        f"{_OURS}feed_forward.fc1.{{part}}": f"{_THEIRS}mlp.Wi.{{part}}",
        f"{_OURS}feed_forward.fc2.{{part}}": f"{_THEIRS}mlp.Wo.{{part}}",
        "encoder.depth.final_norm.{part}": "model.final_norm.{part}",
        "encoder.lm_head.dense.{part}": "head.dense.{part}",
        "encoder.lm_head.layer_norm.{part}": "head.norm.{part}",
        "encoder.lm_head.weight": "decoder.weight",
        "encoder.lm_head.bias": "decoder.bias",
    },
)


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the ode_bert that a ModernBERT is.

    Args:
        config: ``config.json``.
        weights: of ModernBertModel, or of it with the head of masked LM.

    Returns:
        flags, and weights under our names.

    Raises:
        ValueError: everything that makes it another function; or a weight that it does not have.
    """
    said = {**_UNSAID, **config}
    kinds = _layer_types(said)
    problems = list(_problems(said, kinds))
    if any(name.startswith("classifier.") for name in weights):
        problems.append("it has a head of classes, with a norm that those of an ode_bert have not")
    if problems:
        raise ValueError("no ode_bert is such a ModernBERT: " + "; ".join(problems))
    bases = {kind: _rope(said, kind)["rope_theta"] for kind in _BASES}
    settings = {
        "_name": "ode_bert",
        "ode_scheme": "euler",
        **_ITS_OWN,
        **{flag: said[name] for name, flag in _FIELDS.items()},
        # What attention gives is dropped at the rate of its probabilities, what the feed-forward network gives never.
        "dropout": said["attention_dropout"],
        "feed_forward_dropout": 0.0,
        "activation_fn": _ACTIVATIONS[said["hidden_activation"]],
        "no_biases": not said["norm_bias"],
        "untie_weights_roberta": not said["tie_word_embeddings"],
        "segment_types": 0,
        "attention_rotary_base": bases[_GLOBAL if _GLOBAL in kinds else _LOCAL],
    }
    if _LOCAL in kinds:
        settings["attention_window"] = said["local_attention"] // 2
    if len(set(kinds)) > 1:
        settings.update(attention_global_every=_period(kinds), attention_local_rotary_base=bases[_LOCAL])
    found = dict(weights)
    if "embeddings.tok_embeddings.weight" in found:
        found = {f"model.{name}": weight for name, weight in found.items()}
    if said["tie_word_embeddings"] and "decoder.bias" in found:
        found["decoder.weight"] = found["model.embeddings.tok_embeddings.weight"]
    found = _TABLE.imported(found)
    refuse(other_rows(config, found))
    return settings, found


def _layer_types(said: Mapping[str, Any]) -> list[str]:
    every = said["global_attn_every_n_layers"]
    found = said.get("layer_types") or [
        _LOCAL if layer % every else _GLOBAL for layer in range(said["num_hidden_layers"])
    ]
    if not isinstance(found, list) or len(found) != said["num_hidden_layers"]:
        raise ValueError(f"layer_types is {found!r}, and not a list of {said['num_hidden_layers']} kinds of layers")
    return found


def _period(kinds: Sequence[str]) -> int:
    """The distance of global layers, as far as the layers tell."""
    return next((layer for layer, kind in enumerate(kinds) if layer and kind == _GLOBAL), len(kinds))


def _rope(said: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The rotary positions of one kind of layers, in whichever of its spellings."""
    base = said.get(*_BASES[kind])
    if base is None:  # that of the global layers
        base = said.get(*_BASES[_GLOBAL])
    return {"rope_type": "default", "rope_theta": base, **((said.get("rope_parameters") or {}).get(kind) or {})}


def _problems(said: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[str]:
    """What makes it another function than any ode_bert's."""
    activation = said["hidden_activation"]
    if activation not in _ACTIVATIONS:
        yield f"hidden_activation is {activation}, and not one of {', '.join(_ACTIVATIONS)}"
    if said["classifier_activation"] != activation:
        yield f"classifier_activation is {said['classifier_activation']}, and hidden_activation {activation}"
    if len({bool(said[name]) for name in _BIASES}) > 1:
        yield ", ".join(f"{name} is {said[name]}" for name in _BIASES) + ", and there are all of these or none"
    if not said["decoder_bias"]:
        yield "decoder_bias is False, and the output always has one"
    if said.get("rope_scaling"):
        yield f"rope_scaling is {said['rope_scaling']}"
    for kind in dict.fromkeys(kinds):
        if kind not in _BASES:
            yield f"layer_types has {kind}, and not {_GLOBAL} or {_LOCAL} alone"
        elif (rope := _rope(said, kind))["rope_type"] != "default":
            yield f"the rope_type of {kind} is {rope['rope_type']}, and not default"
    if _LOCAL in kinds and said["local_attention"] < 2:
        yield f"local_attention is {said['local_attention']}, and a window holds at least one token on each side"
    period = _period(kinds)
    if _GLOBAL in kinds and set(kinds) != {_GLOBAL}:
        if list(kinds) != [_LOCAL if layer % period else _GLOBAL for layer in range(len(kinds))]:
            yield f"layer_types has not {_GLOBAL} at every n-th layer, from the first on: {', '.join(kinds)}"


def to_transformers(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of the ModernBERT that an ode_bert is.

    Rates of dropout that ModernBERT has no place for are left out: they are no part of the function.

    Args:
        settings: flags of the model, ``max_positions`` among them.
        weights: under our names.

    Raises:
        ValueError: everything that ModernBERT does not have.
    """
    said = {"no_first_norm": False, "gated_feed_forward": False, "ode_field": "pre-norm", **settings}
    problems = plain_stack.misfits(said, **_ITS_OWN, encoder_embedding_dim=None)
    activation, names = said.get("activation_fn", "gelu"), {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if activation not in names:
        problems.append(f"activation_fn is {activation}, and not one of {', '.join(names)}")
    base, window = said.get("attention_rotary_base"), said.get("attention_window")
    if base is None:
        problems.append("it has no rotary positions (attention_rotary_base)")
    for part, what in (
        ("encoder.embed_positions.", "learned positions (encoder_positions)"),
        ("encoder.embed_segments.", "segments (segment_types)"),
        ("classification_heads.", "classification heads, which are others there"),
    ):
        if any(name.startswith(part) for name in weights):
            problems.append(f"it has {what}")
    if problems:
        raise ValueError("no ModernBERT is such an ode_bert: " + "; ".join(problems))
    every = said.get("attention_global_every")
    kinds = [
        _GLOBAL if window is None or (every and layer % every == 0) else _LOCAL
        for layer in range(said["encoder_layers"])
    ]
    bases = {_GLOBAL: base, _LOCAL: said.get("attention_local_rotary_base") or base}
    config = {
        "model_type": "modernbert",
        **{name: said[flag] for name, flag in _FIELDS.items() if said.get(flag) is not None},
        **dict.fromkeys(("hidden_activation", "classifier_activation"), names[activation]),
        **dict.fromkeys(_BIASES, not said.get("no_biases", False)),
        "tie_word_embeddings": not said.get("untie_weights_roberta", False),
        "vocab_size": len(weights["encoder.embed_tokens.weight"]),
        "layer_types": kinds,
        "rope_parameters": {kind: {"rope_theta": base, "rope_type": "default"} for kind, base in bases.items()},
    }
    if window is not None:
        config["local_attention"] = 2 * window
    return config, _TABLE.exported(weights)
