"""ELECTRA in transformers' form (arXiv 2003.10555) and ode_bert, where its embeddings are as wide as its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion import bert
from fairseq_implicit.conversion.transformers_names import TransformersNames, factorised


def _names(head: str) -> TransformersNames:
    heads = {
        "encoder.lm_head.dense.{part}": "generator_predictions.dense.{part}",
        "encoder.lm_head.layer_norm.{part}": "generator_predictions.LayerNorm.{part}",
        f"classification_heads.{head}.{{rest}}": "classifier.{rest}",
    }
    return TransformersNames("ELECTRA", "electra.", heads, "generator_lm_head", "generator_lm_head.bias")


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the ode_bert that an ELECTRA is; see :func:`.bert.from_transformers`.

    Raises:
        ValueError: a setting or a weight that makes it another function, narrower embeddings among them.
    """
    misfits = []
    width = config.get("embedding_size", config["hidden_size"])
    if width != config["hidden_size"]:
        misfits.append(f"embedding_size is {width}, and only of hidden_size {config['hidden_size']} an ode_bert has")
    if config["hidden_act"] != "gelu":
        misfits.append(f"hidden_act is {config['hidden_act']}, and ELECTRA's masked-LM head has gelu whatever it is")
    settings, found = bert.imported(config, weights, _names(head), misfits)
    return {**settings, "pooler_activation_fn": "gelu"}, found


def to_transformers(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of the ELECTRA that an ode_bert is; see :func:`.bert.to_transformers`.

    Raises:
        ValueError: a setting or a weight that ELECTRA does not have.
    """
    misfits = [*factorised(settings)]
    pooler = settings.get("pooler_activation_fn", "tanh")
    if pooler != "gelu" and any(name.startswith("classification_heads.") for name in weights):
        misfits.append(f"pooler_activation_fn is {pooler}, and ELECTRA's head of classes has gelu")
    if settings.get("activation_fn", "gelu") != "gelu":
        misfits.append(f"activation_fn is {settings['activation_fn']}, and ELECTRA's masked-LM head has gelu")
    config, found = bert.exported(settings, weights, _names(head), "electra", misfits)
    return {**config, "embedding_size": config["hidden_size"]}, found
