"""What ``config.json`` says, against what it can say and against the weights beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

#: Fields whose values are whole numbers, and the least of each.
_COUNTS = dict(
    vocab_size=1, max_position_embeddings=1, type_vocab_size=0, embedding_size=1, hidden_size=1, intermediate_size=1,
    num_hidden_layers=1, num_attention_heads=1, num_hidden_groups=1, inner_group_num=1, global_attn_every_n_layers=1,
)  # fmt: skip
#: Fields whose values are numbers from 0 on.
_NUMBERS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "norm_eps"),
    *("embedding_dropout", "attention_dropout", "mlp_dropout"),
)
_SWITCHES = (
    *("tie_word_embeddings", "relative_attention", "share_att_key", "position_biased_input"),
    *("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias"),
)
#: Fields that count rows, and whose.
_ROWS = {
    "vocab_size": "encoder.embed_tokens.weight",
    "max_position_embeddings": "encoder.embed_positions.weight",
    "type_vocab_size": "encoder.embed_segments.weight",
}


def wrong_kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the fields that are there and hold no value of theirs."""
    for name, least in _COUNTS.items():
        value = config.get(name, least)
        if type(value) is not int or value < least:
            yield f"{name} is {value!r}, and not a whole number from {least} on"
    for name in _NUMBERS:
        value = config.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            yield f"{name} is {value!r}, and not a number from 0 on"
    for name in _SWITCHES:
        if type(value := config.get(name, False)) is not bool:
            yield f"{name} is {value!r}, and not true or false"


def other_rows(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Sentences on the embeddings that have another number of rows than is said.

    Args:
        config: ``config.json``.
        weights: under our names, positions without rows for the padding of our own.
    """
    for field, name in _ROWS.items():
        if name in weights and config.get(field, rows := len(weights[name])) != rows:
            yield f"{field} is {config[field]!r}, and {name} has {rows:,} rows"
