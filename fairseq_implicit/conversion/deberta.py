"""DeBERTa v2 and v3 in transformers' form (arXiv 2006.03654, 2111.09543) and ode_bert with disentangled attention.

transformers has its masked-LM head under two names: ``lm_predictions``, as published files have it, which its class
reads where the configuration says ``legacy: false``, and ``cls`` of its own, by default, which it then finds in none of
these files. Both are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_implicit.conversion.misfits import refuse
from fairseq_implicit.conversion.rows import with_padding
from fairseq_implicit.conversion.said import other_rows
from fairseq_implicit.conversion.transformers_names import (
    ACTIVATIONS,
    POSITIONS,
    SEGMENTS,
    LayerNames,
    TransformersNames,
    config_of,
    factorised,
    settings_of,
)

_LAYER = LayerNames(qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"))
_OURS, _THEIRS = "encoder.depth.fields.{layer}.attention.", "deberta.encoder.layer.{layer}.attention.self."
#: The first layer's names of what all layers have in common.
_TABLE, _FIRST = "attention.table.", "encoder.depth.fields.0.attention.table."
_PUBLISHED, _LEGACY = "lm_predictions.lm_head", "cls.predictions"
#: In published files, and in no model of transformers: the head of replaced tokens.
_NOBODYS = "mask_predictions."
_NO_POSITIONS = ("embeddings.position_embeddings.", "deberta.embeddings.position_embeddings.")
_POOLERS = {**ACTIVATIONS, "tanh": "tanh"}


def _names(head: str, legacy: bool) -> TransformersNames:
    where = _LEGACY if legacy else _PUBLISHED
    transform = f"{where}.transform" if legacy else where
    others = {
        f"{_OURS}position_keys.{{part}}": f"{_THEIRS}pos_key_proj.{{part}}",
        f"{_OURS}position_queries.{{part}}": f"{_THEIRS}pos_query_proj.{{part}}",
        f"{_FIRST}embedding.weight": "deberta.encoder.rel_embeddings.weight",
        f"{_FIRST}norm.{{part}}": "deberta.encoder.LayerNorm.{part}",
        "encoder.lm_head.dense.{part}": f"{transform}.dense.{{part}}",
        "encoder.lm_head.layer_norm.{part}": f"{transform}.LayerNorm.{{part}}",
        f"classification_heads.{head}.dense.{{part}}": "pooler.dense.{part}",
        f"classification_heads.{head}.out_proj.{{part}}": "classifier.{part}",
    }
    return TransformersNames("DeBERTa", "deberta.", others, f"{where}.decoder", f"{where}.bias", _LAYER)


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the ode_bert that a DeBERTa v2 or v3 is.

    Args:
        config: ``config.json``.
        weights: of DebertaV2Model, or of it with the heads of masked LM or of classes. What transformers leaves out as
            well is left out: the head of replaced tokens, and positions that its input does not have.
        head: our name of the head of classes.

    Raises:
        ValueError: settings or weights that make it another function.
    """
    terms, norms = _terms(config), _norms(config)
    settings = settings_of(config, _misfits(config, terms, norms))
    positions = config.get("position_biased_input", True)
    left_out = (_NOBODYS,) if positions else (_NOBODYS, *_NO_POSITIONS)
    weights = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
    legacy = not any(name.startswith(_PUBLISHED) for name in weights)
    # The published head has no matrix of its own, whatever the configuration says.
    settings["untie_weights_roberta"] = legacy and settings["untie_weights_roberta"]
    found = _names(head, legacy).imported(weights, tied=not settings["untie_weights_roberta"])
    refuse(other_rows(config, found))
    for layer in range(1, settings["encoder_layers"]):
        found.update({name.replace(".0.", f".{layer}.", 1): found[name] for name in [*found] if _FIRST in name})
    farthest = config.get("max_relative_positions", -1)
    settings.update(
        mixer="disentangled",
        disentangled_terms=",".join(terms),
        disentangled_buckets=max(config.get("position_buckets", -1), 0),
        disentangled_distance=farthest if farthest > 0 else config["max_position_embeddings"],
        disentangled_own_maps=not config.get("share_att_key", False),
        disentangled_plain_table="layer_norm" not in norms,
        encoder_positions="learned" if positions else "none",
        max_positions=config["max_position_embeddings"],
        segment_types=config.get("type_vocab_size", 0),
        pooler_activation_fn=_POOLERS[config.get("pooler_hidden_act", "gelu")],
    )
    return settings, with_padding(found, settings["max_positions"], config.get("pad_token_id") or 0)


def _terms(config: Mapping[str, Any]) -> list[str]:
    """As a list of words or as one word with bars between."""
    given = config.get("pos_att_type") or []
    return [term.strip() for term in given.lower().split("|")] if isinstance(given, str) else list(given)


def _norms(config: Mapping[str, Any]) -> set[str]:
    return {name.strip() for name in str(config.get("norm_rel_ebd") or "none").lower().split("|")}


def _misfits(config: Mapping[str, Any], terms: list[str], norms: set[str]) -> Iterator[str]:
    if not config.get("relative_attention", False):
        yield "relative_attention is False, and disentangled attention is relative"
    if not terms or not set(terms) <= {"c2p", "p2c"}:
        yield f"pos_att_type is {'|'.join(terms) or 'empty'}, and only of c2p, p2c or both an ode_bert has"
    if config.get("conv_kernel_size", 0) > 0:
        yield (
            f"conv_kernel_size is {config['conv_kernel_size']}, and a convolution of the embeddings beside the first "
            "layer is no part of an ode_bert"
        )
    if not norms <= {"none", "layer_norm"}:
        yield f"norm_rel_ebd is {config['norm_rel_ebd']}, and only of none or layer_norm an ode_bert has"
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("embedding_size", width) != width:
        yield (
            f"embedding_size is {config['embedding_size']} beside hidden_size {width}, and an ode_bert normalises "
            "narrower embeddings before their map"
        )
    if config.get("attention_head_size", width // heads) * heads != width:
        yield f"attention_head_size is {config['attention_head_size']}, and only of {width // heads} an ode_bert has"
    if config.get("pooler_hidden_act", "gelu") not in _POOLERS:
        yield f"pooler_hidden_act is {config['pooler_hidden_act']}: an ode_bert has {', '.join(_POOLERS)}"
    if config.get("pooler_hidden_size", width) != width:
        yield f"pooler_hidden_size is {config['pooler_hidden_size']}, and only of {width} an ode_bert has"


def to_transformers(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    head: str = "sentence_classification_head",
    legacy: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of the DeBERTa that an ode_bert is.

    Args:
        settings: flags of the model, ``max_positions`` among them.
        weights: under our names.
        head: the one on the first token that is exported; others are refused.
        legacy: name the masked-LM head ``cls`` and not ``lm_predictions``; a matrix of its own has only that.

    Raises:
        ValueError: settings or weights that DeBERTa does not have.
    """
    legacy = legacy or settings.get("untie_weights_roberta", False)
    pooler = settings.get("pooler_activation_fn", "tanh")
    poolers = {ours: theirs for theirs, ours in reversed(_POOLERS.items())}
    misfits = [*factorised(settings)]
    if pooler not in poolers:
        misfits.append(f"pooler_activation_fn is {pooler}, which transformers' models have not: {', '.join(poolers)}")
    own = {"mixer": "disentangled", "ode_tied": False}
    config = config_of(settings, misfits, own)
    found, symbols = dict(weights), weights["encoder.embed_tokens.weight"]
    refuse(_apart(found))
    found = {name: weight for name, weight in found.items() if _TABLE not in name or name.startswith(_FIRST)}
    if (rows := found.get(POSITIONS)) is not None:
        found[POSITIONS] = rows[len(rows) - settings["max_positions"] :].clone()
    names = _names(head, legacy)
    theirs = names.exported(found)
    if not legacy:
        # They are the embeddings' matrix and the head's bias, under no second name.
        for part in ("weight", "bias"):
            theirs.pop(f"{names.decoder}.{part}", None)
    own_maps = settings.get("disentangled_own_maps", False)
    config = {
        "model_type": "deberta-v2",
        **config,
        "vocab_size": len(symbols),
        "max_position_embeddings": settings["max_positions"],
        "type_vocab_size": len(found.get(SEGMENTS, ())),
        "relative_attention": True,
        "pos_att_type": settings.get("disentangled_terms", "c2p,p2c").split(","),
        "position_buckets": settings.get("disentangled_buckets", 256) or -1,
        "max_relative_positions": settings.get("disentangled_distance", 512),
        "share_att_key": not own_maps,
        "norm_rel_ebd": "none" if settings.get("disentangled_plain_table", False) else "layer_norm",
        "position_biased_input": rows is not None,
        "pooler_hidden_act": poolers[pooler],
    }
    if any(name.startswith("encoder.lm_head.") for name in found):
        config["legacy"] = legacy
    return config, theirs


def _apart(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Where layers have other tables than the first."""
    for name, weight in weights.items():
        if _TABLE in name:
            first = weights.get(_FIRST + name.partition(_TABLE)[2])
            if first is None or not torch.equal(first, weight):
                yield f"{name} is another table than the first layer's, and DeBERTa has one for all"
