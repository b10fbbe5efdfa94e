"""RoBERTa in fairseq's and in transformers' form (arXiv 1907.11692) and ode_bert: Euler is the same function."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fairseq_implicit.conversion.misfits import refuse
from fairseq_implicit.conversion.said import other_rows
from fairseq_implicit.conversion.table import Table
from fairseq_implicit.conversion.transformers_names import (
    POSITIONS,
    SEGMENTS,
    TransformersNames,
    config_of,
    factorised,
    settings_of,
    without_positions,
)

_VERSION = "encoder.sentence_encoder.version"
_THEIRS, _OURS = "encoder.sentence_encoder.layers.{layer}.", "encoder.depth.fields.{layer}."
FAIRSEQ = Table(
    "RoBERTa encoder",
    {
        "encoder.embed_tokens.weight": "encoder.sentence_encoder.embed_tokens.weight",
        "encoder.embed_positions.weight": "encoder.sentence_encoder.embed_positions.weight",
        "encoder.layernorm_embedding.{part}": "encoder.sentence_encoder.layernorm_embedding.{part}",
        "encoder.depth.final_norm.{part}": "encoder.sentence_encoder.layer_norm.{part}",
        f"{_OURS}attention.qkv.{{part}}": [f"{_THEIRS}self_attn.{name}_proj.{{part}}" for name in "qkv"],
        f"{_OURS}attention.out.{{part}}": f"{_THEIRS}self_attn.out_proj.{{part}}",
        f"{_OURS}attention_norm.{{part}}": f"{_THEIRS}self_attn_layer_norm.{{part}}",
        f"{_OURS}feed_forward.fc1.{{part}}": f"{_THEIRS}fc1.{{part}}",
        f"{_OURS}feed_forward.fc2.{{part}}": f"{_THEIRS}fc2.{{part}}",
        f"{_OURS}feed_forward_norm.{{part}}": f"{_THEIRS}final_layer_norm.{{part}}",
        "encoder.lm_head.{rest}": "encoder.lm_head.{rest}",
        "classification_heads.{rest}": "classification_heads.{rest}",
    },
)


def _today(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The names of published checkpoints, some of which are older, in fairseq's present form."""
    for key, value in weights.items():
        name = re.sub(r"^decoder\.", "encoder.", key).replace(".emb_layer_norm.", ".layernorm_embedding.")
        fused = re.fullmatch(r"(.+\.self_attn\.)in_proj_(weight|bias)", name)
        if fused is not None:
            for part, projection in zip("qkv", value.chunk(3), strict=True):
                yield f"{fused[1]}{part}_proj.{fused[2]}", projection
        elif name != _VERSION:
            yield name, value


def from_fairseq(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of fairseq's RoBERTa, post-norm or pre-norm, under our names.

    Raises:
        ValueError: a weight that a RoBERTa encoder does not have, so that nothing is dropped unseen, or one missing.
    """
    return FAIRSEQ.imported(dict(_today(weights)))


def to_fairseq(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an ode_bert of plain layers, post-norm or pre-norm, under the names of fairseq's RoBERTa.

    Raises:
        ValueError: a weight that a RoBERTa encoder does not have.
    """
    found = FAIRSEQ.exported(weights)
    # Without it fairseq takes the checkpoint for one from before stacks ended in a norm, and drops theirs.
    return {**found, _VERSION: found["encoder.sentence_encoder.embed_tokens.weight"].new_tensor([3.0])}


def checkpoint_from_fairseq(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Convert a whole checkpoint: weights, and the model's configuration for hub, validation and fine-tuning.

    The optimiser's state is left out (its parameters have other shapes): continue with ``--finetune-from-model`` or
    ``--restore-file … --reset-optimizer``.

    Args:
        checkpoint: as fairseq's ``load_checkpoint_to_cpu`` returns it.

    Raises:
        ValueError: not a RoBERTa checkpoint.
    """
    stored = checkpoint["cfg"]["model"]
    source = vars(stored) if isinstance(stored, argparse.Namespace) else dict(stored)
    if "encoder_layers" not in source:
        raise ValueError(
            f"the checkpoint holds a {source.get('_name') or source.get('arch')} model, not a RoBERTa encoder"
        )
    kept = (
        "encoder_layers",
        "encoder_embed_dim",
        "encoder_ffn_embed_dim",
        "encoder_attention_heads",
        "activation_fn",
        "pooler_activation_fn",
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "pooler_dropout",
        "max_positions",
        "untie_weights_roberta",
        "spectral_norm_classification_head",
    )
    model = {name: source[name] for name in kept if name in source}
    model.update(
        _name="ode_bert",
        ode_field="pre-norm" if source.get("encoder_normalize_before") else "post-norm",
        ode_scheme="euler",
        no_layernorm_embedding=not source.get("layernorm_embedding", True),
    )
    return {
        **checkpoint,
        "args": None,  # published checkpoints have these flags of RoBERTa, which fairseq would prefer to cfg
        "cfg": {**checkpoint["cfg"], "model": model},
        "model": from_fairseq(checkpoint["model"]),
        "last_optimizer_state": None,
    }


def _names(head: str) -> TransformersNames:
    heads = {
        "encoder.lm_head.dense.{part}": "lm_head.dense.{part}",
        "encoder.lm_head.layer_norm.{part}": "lm_head.layer_norm.{part}",
        f"classification_heads.{head}.{{rest}}": "classifier.{rest}",
        "classification_heads.pooler.{rest}": "roberta.pooler.{rest}",
    }
    return TransformersNames("RoBERTa", "roberta.", heads, "lm_head.decoder", "lm_head.bias")


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the ode_bert that transformers' RoBERTa is.

    Args:
        config: ``config.json``.
        weights: of RobertaModel, or of it with the heads of masked LM or of classes.
        head: our name of the head of classes. A pooler, which RoBERTa was never trained with, becomes ``pooler``.

    Returns:
        flags, and weights under our names.

    Raises:
        ValueError: a setting or a weight that makes it another function.
    """
    sentence = f"hidden_act is {config['hidden_act']}, and RoBERTa's masked-LM head has gelu whatever it is"
    settings = settings_of(config, [sentence] if config["hidden_act"] != "gelu" else [])
    found = _names(head).imported(weights, tied=not settings["untie_weights_roberta"])
    refuse(other_rows(config, found))
    if len(found[SEGMENTS]) == 1 and not found[SEGMENTS].any():
        # RoBERTa has no segments: the row is there for the sake of BERT's class.
        del found[SEGMENTS]
    first = config["pad_token_id"] + 1
    settings.update(
        max_positions=len(found[POSITIONS]) - first,
        segment_types=len(found.get(SEGMENTS, ())),
    )
    return settings, found


def to_transformers(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor], head: str = "sentence_classification_head"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of the RoBERTa that an ode_bert is; arguments as of :func:`from_transformers`.

    Raises:
        ValueError: a setting or a weight that RoBERTa does not have.
    """
    misfits = [*factorised(settings), *without_positions(settings, weights)]
    if settings.get("activation_fn", "gelu") != "gelu":
        misfits.append(f"activation_fn is {settings['activation_fn']}, and RoBERTa's masked-LM head has gelu")
    config = config_of(settings, misfits)
    symbols, positions = weights["encoder.embed_tokens.weight"], weights[POSITIONS]
    found = {SEGMENTS: symbols.new_zeros(1, symbols.shape[1]), **weights}
    config = {
        "model_type": "roberta",
        **config,
        "vocab_size": len(symbols),
        "max_position_embeddings": len(positions),
        "type_vocab_size": len(found[SEGMENTS]),
        "pad_token_id": len(positions) - settings["max_positions"] - 1,
    }
    return config, _names(head).exported(found)
