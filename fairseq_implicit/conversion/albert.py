"""ALBERT in transformers' form (arXiv 1909.11942) and ode_bert: one tied block, or as many groups as layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion import bert
from fairseq_implicit.conversion.transformers_names import LayerNames, TransformersNames

#: Ours are the fields, theirs the groups of one layer each.
_LAYER = LayerNames(
    prefix="encoder.albert_layer_groups.{layer}.albert_layers.0.",
    qkv=("attention.query", "attention.key", "attention.value"),
    out="attention.dense",
    attention_norm="attention.LayerNorm",
    fc1="ffn",
    fc2="ffn_output",
    norm="full_layer_layer_norm",
)


def _names(head: str, classifier: str) -> TransformersNames:
    head = f"classification_heads.{head}"
    others = {
        "encoder.embedding_map.{part}": "albert.encoder.embedding_hidden_mapping_in.{part}",
        "encoder.lm_head.dense.{part}": "predictions.dense.{part}",
        "encoder.lm_head.layer_norm.{part}": "predictions.LayerNorm.{part}",
        f"{head}.dense.{{part}}": "albert.pooler.{part}",
        f"{head}.out_proj.{{part}}": f"{classifier}.{{part}}",
    }
    return TransformersNames("ALBERT", "albert.", others, "predictions.decoder", "predictions.bias", _LAYER)


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the ode_bert that an ALBERT is; see :func:`.bert.from_transformers`.

    Raises:
        ValueError: settings or weights that make it another function.
    """
    layers, groups, inner = (config[name] for name in ("num_hidden_layers", "num_hidden_groups", "inner_group_num"))
    misfits = []
    if groups not in (1, layers):
        misfits.append(f"num_hidden_groups is {groups}, and an ode_bert has 1 or one for each of its {layers} layers")
    if inner != 1:
        misfits.append(f"inner_group_num is {inner}, and a block of an ode_bert is 1 layer")
    pairs = any(name.startswith("sop_classifier.") for name in weights)
    names = _names(head, "sop_classifier.classifier" if pairs else "classifier")
    settings, found = bert.imported(config, weights, names, misfits)
    settings.update(
        ode_tied=groups == 1,
        encoder_embedding_dim=config["embedding_size"],
        feed_forward_dropout=0.0,  # there is none after its feed-forward networks
    )
    return settings, found


def to_transformers(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    head: str = "sentence_classification_head",
    classifier: str = "classifier",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of the ALBERT that an ode_bert is; see :func:`.bert.to_transformers`.

    Args:
        classifier: the head's name there, ``sop_classifier.classifier`` for the order of sentences.

    Raises:
        ValueError: settings or weights that ALBERT does not have.
    """
    tied, width = settings.get("ode_tied", False), settings.get("encoder_embedding_dim")
    misfits = ["encoder_embedding_dim is not set, and ALBERT has a map from its embeddings to its layers"]
    own = {"mixer": "attention", "ode_tied": tied}
    config, found = bert.exported(
        settings, weights, _names(head, classifier), "albert", misfits if width is None else (), own
    )
    groups = 1 if tied else config["num_hidden_layers"]
    return {**config, "embedding_size": width, "num_hidden_groups": groups, "inner_group_num": 1}, found
