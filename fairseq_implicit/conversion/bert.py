"""BERT in transformers' form (arXiv 1810.04805) and ode_bert: Euler on post-norm layers is the same function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion.misfits import refuse
from fairseq_implicit.conversion.rows import with_padding
from fairseq_implicit.conversion.said import other_rows
from fairseq_implicit.conversion.transformers_names import (
    BERT_SETTINGS,
    POSITIONS,
    SEGMENTS,
    TransformersNames,
    config_of,
    factorised,
    settings_of,
    without_positions,
)


def _names(head: str, classifier: str) -> TransformersNames:
    head = f"classification_heads.{head}"
    heads = {
        "encoder.lm_head.dense.{part}": "cls.predictions.transform.dense.{part}",
        "encoder.lm_head.layer_norm.{part}": "cls.predictions.transform.LayerNorm.{part}",
        f"{head}.dense.{{part}}": "bert.pooler.dense.{part}",
        f"{head}.out_proj.{{part}}": f"{classifier}.{{part}}",
    }
    return TransformersNames("BERT", "bert.", heads, "cls.predictions.decoder", "cls.predictions.bias")


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the ode_bert that a BERT is.

    Args:
        config: ``config.json``.
        weights: of BertModel, or of it with the heads of masked LM, of sentence pairs or of classes.
        head: our name of the head on the first token, whose inner layer is the pooler.

    Returns:
        flags, and weights under our names. The rows of positions up to the padding's, which BERT does not have, are 0.

    Raises:
        ValueError: a setting or a weight that makes it another function.
    """
    pairs = any(name.startswith("cls.seq_relationship.") for name in weights)
    return imported(config, weights, _names(head, "cls.seq_relationship" if pairs else "classifier"))


def imported(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    names: TransformersNames,
    misfits: Iterable[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of a model whose embeddings are BERT's; ``misfits`` are what else makes it another."""
    settings = settings_of(config, misfits)
    found = names.imported(weights, tied=not settings["untie_weights_roberta"])
    refuse(other_rows(config, found))
    settings.update(max_positions=len(found[POSITIONS]), segment_types=len(found[SEGMENTS]))
    return settings, with_padding(found, settings["max_positions"], config.get("pad_token_id") or 0)


def to_transformers(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    head: str = "sentence_classification_head",
    classifier: str = "classifier",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of the BERT that an ode_bert is.

    Args:
        settings: flags of the model, ``max_positions`` among them.
        weights: under our names.
        head: the one on the first token that is exported; others are refused.
        classifier: its name there, ``cls.seq_relationship`` for sentence pairs.

    Raises:
        ValueError: a setting or a weight that BERT does not have.
    """
    return exported(settings, weights, _names(head, classifier), "bert", factorised(settings))


def exported(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    names: TransformersNames,
    model_type: str,
    misfits: Iterable[str] = (),
    own: Mapping[str, Any] = BERT_SETTINGS,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of a model whose embeddings are BERT's; the rest as of :func:`config_of`."""
    config = config_of(settings, [*misfits, *without_positions(settings, weights)], own)
    found = dict(weights)
    rows, symbols = found[POSITIONS], found["encoder.embed_tokens.weight"]
    nobodys = len(rows) - settings["max_positions"]
    found[POSITIONS] = rows[nobodys:].clone()
    # An ode_bert without segments is a BERT whose only segment adds nothing.
    found.setdefault(SEGMENTS, symbols.new_zeros(1, symbols.shape[1]))
    config = {
        "model_type": model_type,
        **config,
        "vocab_size": len(symbols),
        "max_position_embeddings": settings["max_positions"],
        "type_vocab_size": len(found[SEGMENTS]),
        "pad_token_id": nobodys - 1,
    }
    return config, names.exported(found)
